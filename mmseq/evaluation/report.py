"""One self-contained `report.html`: what was trained, how well it does everything, and what that looks like.

    write_report("report.html", title="mmseq demo", results=results, media=media, training="runs/demo/metrics.jsonl")

No network, no scripts, no files beside it. What was not measured leaves no empty section.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from mmseq.errors import DataError
from mmseq.evaluation import report_examples as examples
from mmseq.evaluation import report_results as measured
from mmseq.evaluation.figures import plot, tasks_picture, track
from mmseq.evaluation.markup import Section, duration, table
from mmseq.evaluation.results import Result
from mmseq.evaluation.wording import task_title


def write_report(
    path: str | Path,
    *,
    title: str,
    results: Sequence[Result] = (),
    media: Mapping[str, Any] | None = None,
    training: str | Path | None = None,
    accounting: Sequence[Mapping[str, Any]] = (),
    rollouts: Sequence[Mapping[str, Any]] = (),
    timings: Mapping[str, float] | None = None,
    config: str | None = None,
    command: str | None = None,
    facts: Mapping[str, str] | None = None,
    lead: str | None = None,
) -> None:
    """Write the report.

    media: as `evaluate_generation` returns it. training: a run's metrics.jsonl. accounting: rows of
    `Mixture.shares()`. rollouts: {"task", "success"} and, where it is to be shown, "video": MP4, WebP or GIF bytes, or
    frames (N, H, W, 3); optional "policy" (a name; each name gets its own column, such as "image blanked"), "rate_hz".
    timings: seconds per stage. facts: a few short numbers for the top, name -> value. lead: the opening paragraph.

    Raises: DataError when a file or a rollout cannot be read.
    """
    media = media or {}
    curves = read_metrics(training) if training else {}
    sections = [
        _overview(media),
        measured.headline(results, media),
        measured.closed_loop(rollouts),
        examples.pictures(media),
        examples.vectors(media),
        examples.texts(media),
        examples.values(media),
        examples.tokenizers(media),
        _training(curves),
        _accounting(accounting, curves),
        _timings(timings or {}, media),
        _method(results, media, config, command),
    ]
    Path(path).write_text(_page(title, lead, facts or {}, [s for s in sections if s]), encoding="utf-8")


def _page(title: str, lead: str | None, facts: Mapping[str, str], sections: Sequence[Section]) -> str:
    css = files("mmseq.evaluation").joinpath("report.css").read_text()
    lead = lead or (
        "One transformer was trained on robot episodes and video as interleaved token sequences. This page shows "
        "what the same weights do when different things are given and different things are asked for."
    )
    tiles = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>" for k, v in facts.items())
    nav = "".join(f'<a href="#{key}">{escape(name)}</a>' for key, name, _ in sections)
    body = "".join(f'<section id="{key}"><h2>{escape(name)}</h2>{html}</section>' for key, name, html in sections)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{css}</style></head><body>'
        f'<header class="top"><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>'
        + (f'<dl class="facts">{tiles}</dl>' if tiles else "")
        + f"</header><nav><div>{nav}</div></nav><main>{body}</main>"
        "<footer>Written by mmseq. Everything on this page is in this one file.</footer></body></html>\n"
    )


def read_metrics(path: str | Path) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """metrics.jsonl -> {"train" | "validation": {task: [(step, bits per token)]}}; a repeated step counts once.

    "train" also holds `*tokens_per_s`, the speed at each step.
    """
    found: dict[str, dict[str, dict[float, float]]] = {"train": {}, "validation": {}}
    try:
        lines = Path(path).read_text().splitlines()
        for line in filter(str.strip, lines):
            row = json.loads(line)
            if row.get("kind") not in found:
                continue
            kept = found[row["kind"]]
            for task, bits in row["bits_per_token"].items():
                kept.setdefault(task, {})[float(row["step"])] = float(bits)
            if "tokens_per_s" in row:
                kept.setdefault("*tokens_per_s", {})[float(row["step"])] = float(row["tokens_per_s"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"cannot read the training metrics {path}: {error!r}") from error
    return {kind: {task: sorted(of.items()) for task, of in tasks.items()} for kind, tasks in found.items()}


def _overview(media: Mapping[str, Any]) -> Section | None:
    skipped = media.get("skipped", {})
    arrows = {k: v for k, v in media.get("arrows", {}).items() if k not in skipped}
    picture = tasks_picture(arrows)
    if not picture:
        return None
    streams = (
        ("text", "words"),
        ("vision", "camera pictures"),
        ("proprio", "the robot's own state"),
        ("action", "commands to the robot"),
        ("scalar", "progress, success"),
    )
    key = "".join(
        f'<span><i class="swatch" style="background:var(--{css})"></i>{label}</span>' for css, label in streams
    )
    html = (
        "<p>Everything a robot sees, is told and does becomes a row of tokens, and one transformer learns to continue "
        "such rows. What is <b>given</b> (filled) and what is <b>predicted</b> (outlined) makes the task: the same "
        "weights move a robot, imagine what it will see, and say what happens in a video.</p>"
        f'<figure style="margin:0"><div class="scroll">{picture}</div><div class="key">{key}</div>'
        "<figcaption>The tasks of this model. A number in brackets is a length in control steps or frames, "
        "<code>@+</code> says how many steps later.</figcaption></figure>"
    )
    return "tasks", "One model, many tasks", html


def _training(curves: Mapping[str, Any]) -> Section | None:
    tasks = [t for t in curves.get("train", {}) if not t.startswith("*")]
    if not tasks:
        return None
    plots = []
    for task in tasks:
        train, held = curves["train"][task], curves["validation"].get(task, [])
        lines = [("train", [x for x, _ in train], [y for _, y in train])]
        if held:
            lines.append(("marked", [x for x, _ in held], [y for _, y in held]))
        last = f"{held[-1][1]:.2f} held out" if held else f"{train[-1][1]:.2f}"
        figure = plot(lines, x_label="step", y_label="bits/token", least_height=0.5, title=f"learning curve of {task}")
        plots.append(f'<div class="plotted"><h4>{escape(task_title(task))} <span>{last}</span></h4>{figure}</div>')
    any_held = any(curves["validation"].values())
    key = '<span><i class="l soft"></i>training</span>' + (
        '<span><i class="l"></i>held-out episodes</span>' if any_held else ""
    )
    html = (
        "<p>How surprised the model is by what it has to predict, in bits per token, task by task. All tasks are "
        "learned at the same time by the same weights.</p>"
        f'<div class="key">{key}</div><div class="grid3">{"".join(plots)}</div>'
    )
    return "training", "Learning curves", html


def _accounting(rows: Sequence[Mapping[str, Any]], curves: Mapping[str, Any]) -> Section | None:
    if not rows:
        return None
    top = max(float(r["tokens"]) for r in rows)
    body = [
        [
            escape(task_title(str(r["task"]))) + f"<small><code>{escape(str(r['task']))}</code></small>",
            escape(str(r["source"])),
            f">{100 * float(r['samples']):.1f} %",
            f">{100 * float(r['tokens']):.1f} %",
            track(float(r["tokens"]), None, 0, top, "plain"),
            f">{float(r['tokens_per_sample']):,.0f}",
            f">{int(r['episodes']):,}",
            f">{int(r['moments']):,}",
        ]
        for r in rows
    ]
    head = ["task", "source", ">samples", ">tokens", "", ">tokens each", ">episodes", ">moments"]
    sources: dict[str, float] = {}
    for r in rows:
        sources[str(r["source"])] = sources.get(str(r["source"]), 0.0) + float(r["tokens"])
    by_source = ", ".join(f"{escape(name)} {100 * share:.0f} %" for name, share in sources.items())
    html = (
        f"<p>What the model read, by task and source. Tokens by source: {by_source}. A <i>moment</i> is a step of an "
        "episode at which the task can be asked.</p>" + table(head, body)
    )
    return "data", "Data", html


def _timings(timings: Mapping[str, float], media: Mapping[str, Any]) -> Section | None:
    if not timings:
        return None
    top = max(timings.values()) or 1.0
    rows = [[escape(k), f">{duration(v)}", track(v, None, 0, top, "plain")] for k, v in timings.items()]
    rows.append(["<b>total</b>", f"><b>{duration(sum(timings.values()))}</b>", ""])
    html = table(["stage", ">time", ""], rows)
    spent = {k: v for k, v in media.get("seconds", {}).items() if v >= 0.05}
    if spent:
        inner = table(["evaluated", ">time"], [[escape(k), f">{duration(v)}"] for k, v in spent.items()], fit=True)
        html += f"<details><summary>time of the evaluation, task by task</summary>{inner}</details>"
    return "timings", "Where the time went", html


def _method(
    results: Sequence[Result], media: Mapping[str, Any], config: str | None, command: str | None
) -> Section | None:
    parts = []
    if command:
        parts.append(f"<h3>Command</h3><pre>{escape(command.strip())}</pre>")
    if config:
        parts.append(f"<details><summary>configuration</summary><pre>{escape(config.strip())}</pre></details>")
    if media.get("skipped"):
        rows = [[f"<code>{escape(k)}</code>", escape(str(v))] for k, v in media["skipped"].items()]
        parts.append("<h3>Not measured</h3>" + table(["task", "why"], rows))
    if media.get("excluded"):
        rows = [[f"<code>{escape(k)}</code>", escape(str(v))] for k, v in media["excluded"].items()]
        parts.append("<h3>Episodes left out</h3>" + table(["episode", "why"], rows))
    if results:
        seeds = ", ".join(sorted({str(r.seed) for r in results}))
        parts.append(
            "<h3>How it was measured</h3><p>Samples are drawn from held-out episodes in turn, so that few samples "
            f"cover many episodes (seed {seeds}). Decoding takes the best code: of bins the median, else the "
            "likeliest. Intervals are Wilson's for shares, otherwise a bootstrap over episodes; whether a result "
            "differs from its baseline is judged by the bootstrap of the difference on the same samples. The "
            "shuffled-actions baseline is the same model given the commands of "
            "another sample.</p>"
        )
    return ("method", "How to repeat this", "".join(parts)) if parts else None
