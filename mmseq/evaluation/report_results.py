"""The report's numbers: every result beside its baselines, and success in closed loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from mmseq.evaluation.figures import number, track
from mmseq.evaluation.markup import Section, split_name, table
from mmseq.evaluation.pictures import moving_picture
from mmseq.evaluation.results import Result, wilson
from mmseq.evaluation.wording import CEILINGS, CONTROLLERS, baseline_words, measure_words, task_sentence, task_title

VIDEO_BYTES = 7_000_000  # of all rollouts together, so that the report stays below 15 MB
VIDEOS_PER_TASK = 3


def headline(results: Sequence[Result], media: Mapping[str, Any]) -> Section | None:
    if not results:
        return None
    intervals, gains = media.get("intervals", {}), media.get("gains", {})
    decibels = [v for r in results if r.unit == "dB" for v in (r.value, r.baseline_value)]
    db_range = (5 * np.floor((min(decibels) - 1) / 5), 5 * np.ceil((max(decibels) + 0.5) / 5)) if decibels else (0, 1)
    by_task: dict[str, list[list[Result]]] = {}
    for result in results:
        task, measure = split_name(result.name)
        measures = by_task.setdefault(task, [])
        # further baselines of a measure follow it and share its row
        if measures and _further(result) and split_name(measures[-1][0].name)[1] == _stem(measure):
            measures[-1].append(result)
        else:
            measures.append([result])
    rows: dict[bool, list[str]] = {False: [], True: []}
    for task, measures in by_task.items():
        for aside in (False, True):
            some = [
                row for row in measures if (task.endswith("_tokenizer") or "." in split_name(row[0].name)[1]) == aside
            ]
            if some:
                rows[aside].append(
                    f'<tr class="group"><td colspan="5">{escape(task_title(task))}'
                    f"<span>{escape(task_sentence(task))}</span></td></tr>"
                )
            rows[aside] += [_headline_row(row, intervals, gains, db_range) for row in some]
    head = (
        '<tr><th>what</th><th class="n">model</th><th></th>'
        '<th class="base">baseline</th><th class="n">samples</th></tr>'
    )
    listed = lambda body: (
        f'<div class="scroll"><table class="results">{head}{"".join(body)}</table></div>' if body else ""
    )
    tokenizers = listed(rows[True])
    if tokenizers and rows[False]:
        tokenizers = f"<details><summary>task by task, and the tokenizers alone</summary>{tokenizers}</details>"
    low, high = db_range
    scale = f" Bars in dB run from {low:g} to {high:g}, so their lengths are not proportions." if decibels else ""
    key = (
        '<span><i class="good"></i>better than the baseline</span><span><i class="bad"></i>worse</span>'
        '<span><i></i>not told apart from it</span><span><i class="tick"></i>baseline</span>'
        '<span><i class="tick soft"></i>further baselines, ceiling</span><span>thin line: 95 % interval</span>'
    )
    html = (
        "<p>Each number stands beside what one would get without looking: repeating the last frame, always sending "
        "the mean command, always giving the most frequent answer. Both are measured on the same held-out samples "
        "by the same rule.</p>"
        f'<div class="key">{key}</div>{listed(rows[False])}{tokenizers}'
        f'<p class="note">Likeness is PSNR, the mean over pictures of 10 log<sub>10</sub>(255² / mean squared error) '
        f"at the tokenizer's resolution; more is better, and 1 dB is a fifth less error. A command's error is a share "
        f"of the axis' range in the training data.{scale}</p>"
    )
    return "results", "Results at a glance", html


def _further(result: Result) -> bool:
    measure = split_name(result.name)[1]
    return _stem(measure) != measure


def _stem(measure: str) -> str:
    """A measure without the suffix that names a further baseline."""
    for mark in ("_over_", "_of_ceiling"):
        measure = measure.split(mark)[0]
    return measure


def _headline_row(
    row: Sequence[Result], intervals: Mapping[str, Any], gains: Mapping[str, Any], db_range: tuple[float, float]
) -> str:
    """One measure with its baselines: the first has the tick, the others stand below it."""
    result = row[0]
    if result.unit == "dB":
        low, high = db_range
    elif result.unit in ("share", "correlation"):
        low, high = 0.0, 1.0
    else:
        low, high = 0.0, 1.15 * max(result.value, *(r.baseline_value for r in row), 1e-12)
    interval = intervals.get(result.name)
    if interval is None and result.unit == "share" and 0 <= result.value <= 1:
        interval = wilson(round(result.value * result.n), result.n)
    bar = track(
        result.value,
        result.baseline_value,
        low,
        high,
        _verdict(result, gains.get(result.name), interval),
        interval,
        others=[r.baseline_value for r in row[1:]],
    )
    sense = "more is better" if result.better == "higher" else "less is better"
    baselines = "".join(
        f'<div title="{escape(r.name)}"{" class=more" if i else ""}>'
        f'<span class="n">{_shown(r.baseline_value, r.unit)}</span>'
        f"<small>{escape(baseline_words(r.baseline_name))}{_compared(r, gains.get(r.name)) if i else ''}</small></div>"
        for i, r in enumerate(row)
    )
    unit = {"of the axis range": "of range", "share": "", "correlation": "", "unitless": ""}.get(
        result.unit, result.unit
    )
    return (
        f"<tr><td>{escape(measure_words(split_name(result.name)[1]))}"
        f"<small><code>{escape(result.name)}</code>, {sense}</small></td>"
        f'<td class="n"><b>{_shown(result.value, result.unit)}</b><span class="unit">{escape(unit)}</span></td>'
        f'<td>{bar}</td><td class="base">{baselines}</td><td class="n">{result.n:,}</td></tr>'
    )


def _shown(value: float, unit: str) -> str:
    if unit == "share":
        return f"{100 * value:.1f} %"
    if unit in ("dB", "correlation", "bits/token"):
        return f"{value:.2f}"
    return f"{value:.3f}" if unit == "of the axis range" else number(value)


def _compared(result: Result, gain: Any) -> str:
    return {"good": ", beaten", "bad": ", not reached", "even": ", not told apart"}.get(_verdict(result, gain), "")


def _verdict(result: Result, gain: Any, interval: Any = None) -> str:
    """The colour of a bar. A ceiling is no opponent, and an interval that holds zero is no difference."""
    if result.baseline_name in CEILINGS:
        return "plain"
    if gain is not None and gain[0] <= 0 <= gain[1]:
        return "even"
    if gain is None and interval is not None and interval[0] <= result.baseline_value <= interval[1]:
        return "even"
    return "good" if result.gain > 0 else "bad" if result.gain < 0 else "even"


def closed_loop(rollouts: Sequence[Mapping[str, Any]]) -> Section | None:
    if not rollouts:
        return None
    policies = list(dict.fromkeys(str(r.get("policy", "model")) for r in rollouts))
    tasks = list(dict.fromkeys(str(r["task"]) for r in rollouts))
    count = lambda some: (sum(bool(r["success"]) for r in some), len(some))
    rows = []
    for task in [*tasks, None]:
        if task is None and len(tasks) == 1:
            continue
        cells = ["<b>all tasks</b>" if task is None else escape(task)]
        for policy in policies:
            some = [r for r in rollouts if task in (None, r["task"]) and str(r.get("policy", "model")) == policy]
            won, n = count(some)
            if not n:
                cells += [">", ""]
                continue
            low, high = wilson(won, n)
            bar = track(won / n, None, 0, 1, "plain" if policy == policies[0] else "even", (low, high))
            cells += [
                f">{100 * won / n:.0f} %<small>{won} of {n}</small>",
                f"{bar}<small>{100 * low:.0f} to {100 * high:.0f} %</small>",
            ]
        rows.append(cells)
    head = ["task", *(h for p in policies for h in (f">{escape(CONTROLLERS.get(p, p))}", "95 % interval (Wilson)"))]
    html = (
        "<p>The model controls the robot: it looks, sends commands, looks again. An episode counts only when the task "
        "itself reports success.</p>" + table(head, rows)
    )
    return "rollouts", "The robot in closed loop", html + _videos(rollouts, policies[0])


def _videos(rollouts: Sequence[Mapping[str, Any]], policy: str) -> str:
    shown: dict[str, int] = {}
    cards, size, left_out = [], 0, 0
    with_video = [r for r in rollouts if _video_of(r) is not None and str(r.get("policy", "model")) == policy]
    # a task's first videos come before any task's later ones, so that the limit cuts no task off
    ranks: list[int] = []
    for r in with_video:
        shown[r["task"]] = shown.get(r["task"], 0) + 1
        ranks.append(shown[r["task"]])
    for rank, r in sorted(zip(ranks, with_video), key=lambda pair: pair[0]):
        uri, kind = (
            ("", "")
            if rank > VIDEOS_PER_TASK or size > VIDEO_BYTES
            else moving_picture(_video_of(r), float(r.get("rate_hz", 20)))
        )
        if not uri or size + len(uri) > VIDEO_BYTES:
            left_out += 1
            continue
        size += len(uri)
        word = '<b class="good">success</b>' if r["success"] else '<b class="bad">failure</b>'
        media = (
            f'<video autoplay loop muted playsinline controls src="{uri}"></video>'
            if kind == "video/mp4"
            else f'<img alt="rollout of {escape(str(r["task"]))}" src="{uri}">'
        )
        cards.append(f'<div class="card">{media}<div>{escape(str(r["task"]))}<br>{word}</div></div>')
    if not cards:
        return ""
    rest = f" {left_out} more were recorded and are not shown." if left_out else ""
    note = f"Rollouts as they came, successes and failures alike.{rest}"
    return f'<div class="grid6">{"".join(cards)}</div><p class="note">{note}</p>'


def _video_of(rollout: Mapping[str, Any]) -> Any:
    return rollout.get("video") if rollout.get("video") is not None else rollout.get("frames")
