"""The report's numbers: every result beside its baselines, and success in closed loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmseq.evaluation.pictures import moving_picture
from mmseq.evaluation.report.figures import number, track
from mmseq.evaluation.report.wording import CEILINGS, CONTROLLERS, baseline_words, measure_words, split_name, stem
from mmseq.evaluation.results import Result, wilson

VIDEO_BYTES = 7_000_000  # of all rollouts together, so that the report stays below 15 MB
VIDEOS_PER_TASK = 3
UNITS = {"of the axis range": "of range", "share": "", "correlation": "", "unitless": ""}  # where they are shorter
_COMPARED = {"good": ", beaten", "bad": ", not reached", "even": ", not told apart"}


def headline(results: Sequence[Result], media: Mapping[str, Any]) -> dict[str, Any]:
    """The table of results: `main` and `aside`, rows by task, and the range of bars in dB where there are some."""
    decibels = [v for r in results if r.unit == "dB" for v in (r.value, r.baseline_value)]
    db_range = (5 * np.floor((min(decibels) - 1) / 5), 5 * np.ceil((max(decibels) + 0.5) / 5)) if decibels else None
    by_task: dict[str, list[list[Result]]] = {}
    for result in results:
        task, measure = split_name(result.name)
        measures = by_task.setdefault(task, [])
        # further baselines of a measure follow it and share its row
        if measures and stem(measure) != measure and split_name(measures[-1][0].name)[1] == stem(measure):
            measures[-1].append(result)
        else:
            measures.append([result])
    listed: dict[str, dict[str, list[dict[str, Any]]]] = {"main": {}, "aside": {}}
    for task, measures in by_task.items():
        for row in measures:
            part = "aside" if task.endswith("_tokenizer") or "." in split_name(row[0].name)[1] else "main"
            listed[part].setdefault(task, []).append(_row(row, media, db_range))
    return {**listed, "decibels": db_range}


def _row(row: Sequence[Result], media: Mapping[str, Any], db_range: tuple[float, float] | None) -> dict[str, Any]:
    """One measure with its baselines: the first has the tick, the others stand below it."""
    result, gains = row[0], media.get("gains", {})
    most = 1.15 * max(result.value, *(r.baseline_value for r in row), 1e-12)
    low, high = {"dB": db_range, "share": (0.0, 1.0), "correlation": (0.0, 1.0)}.get(result.unit) or (0.0, most)
    interval = media.get("intervals", {}).get(result.name)
    if interval is None and result.unit == "share" and 0 <= result.value <= 1:
        interval = wilson(round(result.value * result.n), result.n)
    verdict = _verdict(result, gains.get(result.name), interval)
    others = [r.baseline_value for r in row[1:]]
    compared = [""] + [_COMPARED.get(_verdict(r, gains.get(r.name)), "") for r in row[1:]]
    return {
        "name": result.name,
        "words": measure_words(split_name(result.name)[1]),
        "sense": "more is better" if result.better == "higher" else "less is better",
        "value": _shown(result.value, result.unit),
        "unit": UNITS.get(result.unit, result.unit),
        "bar": track(result.value, result.baseline_value, low, high, verdict, interval, others=others),
        "baselines": [
            (r.name, _shown(r.baseline_value, r.unit), baseline_words(r.baseline_name) + said)
            for r, said in zip(row, compared)
        ],
        "n": f"{result.n:,}",
    }


def _shown(value: float, unit: str) -> str:
    if unit == "share":
        return f"{100 * value:.1f} %"
    if unit in ("dB", "correlation", "bits/token"):
        return f"{value:.2f}"
    return f"{value:.3f}" if unit == "of the axis range" else number(value)


def _verdict(result: Result, gain: Any, interval: Any = None) -> str:
    """The colour of a bar. A ceiling is no opponent, and an interval that holds zero is no difference."""
    if result.baseline_name in CEILINGS:
        return "plain"
    if gain is not None and gain[0] <= 0 <= gain[1]:
        return "even"
    if gain is None and interval is not None and interval[0] <= result.baseline_value <= interval[1]:
        return "even"
    return "good" if result.gain > 0 else "bad" if result.gain < 0 else "even"


def closed_loop(rollouts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The table of success by task and policy, and the films of the first policy."""
    policies = list(dict.fromkeys(str(r.get("policy", "model")) for r in rollouts))
    tasks: list[str | None] = list(dict.fromkeys(str(r["task"]) for r in rollouts))
    rows = []
    for task in tasks if len(tasks) == 1 else [*tasks, None]:
        cells = []
        for policy in policies:
            some = [r for r in rollouts if task in (None, r["task"]) and str(r.get("policy", "model")) == policy]
            cells.append(_success(some, "plain" if policy == policies[0] else "even") if some else None)
        rows.append((task, cells))
    head = ["task", *(h for p in policies for h in (f">{CONTROLLERS.get(p, p)}", "95 % interval (Wilson)"))]
    films, left_out = _films([r for r in rollouts if str(r.get("policy", "model")) == policies[0]])
    return {"head": head, "rows": rows, "films": films, "left_out": left_out}


def _success(rollouts: Sequence[Mapping[str, Any]], css: str) -> dict[str, Any]:
    won, n = sum(bool(r["success"]) for r in rollouts), len(rollouts)
    low, high = wilson(won, n)
    bar = track(won / n, None, 0, 1, css, (low, high))
    return {
        "won": won,
        "n": n,
        "share": f"{100 * won / n:.0f}",
        "bar": bar,
        "interval": f"{100 * low:.0f} to {100 * high:.0f}",
    }


def _films(rollouts: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """What is shown, and how many are not: a task's first come before any task's later ones, so none is cut off."""
    seen: dict[str, int] = {}
    ranked = []
    for r in rollouts:
        film = r["frames"] if r.get("video") is None and "frames" in r else r.get("video")
        if film is not None:
            seen[r["task"]] = seen.get(r["task"], 0) + 1
            ranked.append((seen[r["task"]], r, film))
    films, size = [], 0
    for rank, r, film in sorted(ranked, key=lambda entry: entry[0]):
        if rank <= VIDEOS_PER_TASK and size <= VIDEO_BYTES:
            uri, kind = moving_picture(film, float(r.get("rate_hz", 20)))
            if size + len(uri) <= VIDEO_BYTES:
                size += len(uri)
                films.append({"uri": uri, "kind": kind, "task": str(r["task"]), "success": bool(r["success"])})
    return films, len(ranked) - len(films)
