"""One self-contained `report.html`: what was trained, how well it does everything, and what that looks like.

    write_report("report.html", title="mmseq demo", results=results, media=media, training="runs/demo/metrics.jsonl")

No network, no scripts, no files beside it. What was not measured leaves no empty section.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from mmseq.errors import DataError
from mmseq.evaluation.figures import number, plot, tasks_picture, track
from mmseq.evaluation.pictures import data_uri, difference, moving_picture, png, strip, webp
from mmseq.evaluation.results import Result, wilson
from mmseq.evaluation.wording import CEILINGS, baseline_words, measure_words, task_sentence, task_title

VIDEO_BYTES = 7_000_000  # of all rollouts together, so that the report stays below 15 MB
VIDEOS_PER_TASK = 4
SCATTER_POINTS = 400
Section = tuple[str, str, str]  # id, title, HTML


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
        _headline(results, media),
        _rollouts(rollouts),
        _pictures(media),
        _vectors(media),
        _texts(media),
        _values(media),
        _tokenizers(media),
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


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table; cells that begin with `>` are numbers, aligned to the right."""

    def cell(text: str, tag: str) -> str:
        return f'<{tag} class="n">{text[1:]}</{tag}>' if text.startswith(">") else f"<{tag}>{text}</{tag}>"

    top = "".join(cell(h, "th") for h in head)
    body = "".join("<tr>" + "".join(cell(c, "td") for c in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'


def _image(frame: np.ndarray, alt: str) -> str:
    css = ' class="pixels"' if frame.shape[0] <= 96 else ""
    return f'<img{css} alt="{escape(alt)}" src="{data_uri(png(frame), "image/png")}">'


def _split(name: str) -> tuple[str, str]:
    task, _, measure = name.partition(".")
    return task, measure or "value"


def _base(key: str) -> str:
    """The task of a key of the media: `chain.plan` and `caption_human` -> `chain`, `caption`."""
    return key.split(".")[0].removesuffix("_human")


def _key_title(key: str) -> str:
    part = f" ({key.split('.', 1)[1]})" if "." in key else ""
    human = ", human video" if key.split(".")[0].endswith("_human") else ""
    return task_title(_base(key)) + part + human


# ---------------------------------------------------------------------- what it is


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
        "<figcaption>The tasks of this model. <code>action[16]</code> is a chunk of 16 commands, "
        "<code>image@+16</code> the camera picture 16 control steps later.</figcaption></figure>"
    )
    return "tasks", "One model, many tasks", html


# ---------------------------------------------------------------------- numbers


def _headline(results: Sequence[Result], media: Mapping[str, Any]) -> Section | None:
    if not results:
        return None
    intervals, gains = media.get("intervals", {}), media.get("gains", {})
    decibels = [v for r in results if r.unit == "dB" for v in (r.value, r.baseline_value)]
    db_range = (5 * np.floor((min(decibels) - 1) / 5), 5 * np.ceil((max(decibels) + 0.5) / 5)) if decibels else (0, 1)
    by_task: dict[str, list[Result]] = {}
    for result in results:
        by_task.setdefault(_split(result.name)[0], []).append(result)
    rows = []
    for task, of_task in by_task.items():
        sentence = task_sentence(task)
        rows.append(
            f'<tr class="group"><td colspan="5">{escape(task_title(task))}<span>{escape(sentence)}</span></td></tr>'
        )
        rows += [_headline_row(r, intervals.get(r.name), gains.get(r.name), db_range) for r in of_task]
    low, high = db_range
    scale = f" Bars in dB run from {low:g} to {high:g}, so their lengths are not proportions." if decibels else ""
    key = (
        '<span><i class="good"></i>better than the baseline</span><span><i class="bad"></i>worse</span>'
        '<span><i></i>not told apart from it</span><span><i class="tick"></i>baseline</span>'
        "<span>thin line: 95 % interval</span>"
    )
    html = (
        "<p>Each number stands beside what one would get without looking: repeating the last frame, always sending "
        "the mean command, always giving the most frequent answer. Both are measured on the same held-out samples "
        "by the same rule.</p>"
        f'<div class="key">{key}</div><div class="scroll"><table><tr><th>what</th><th class="n">model</th>'
        '<th></th><th class="n">baseline</th><th class="n">samples</th></tr>' + "".join(rows) + "</table></div>"
        f'<p class="note">Likeness is PSNR, the mean over pictures of 10 log<sub>10</sub>(255² / mean squared error) '
        f"at the tokenizer's resolution; more is better, and 1 dB is a fifth less error. A command's error is a share "
        f"of the axis' range in the training data.{scale}</p>"
    )
    return "results", "Results at a glance", html


def _headline_row(result: Result, interval: Any, gain: Any, db_range: tuple[float, float]) -> str:
    verdict = _verdict(result, gain)
    if result.unit == "dB":
        low, high = db_range
    elif result.unit in ("share", "correlation"):
        low, high = 0.0, 1.0
    else:
        low, high = 0.0, 1.15 * max(result.value, result.baseline_value, 1e-12)
    share = result.unit == "share"
    show = lambda v: f"{100 * v:.1f}" if share else (f"{v:.2f}" if result.unit in ("dB", "correlation") else number(v))
    unit = {"share": "%", "correlation": "", "of the axis range": "of range", "unitless": ""}.get(
        result.unit, result.unit
    )
    extra = "_over_" in result.name or "_of_ceiling" in result.name
    sense = "more is better" if result.better == "higher" else "less is better"
    return (
        f"<tr{' class=more' if extra else ''}><td>{escape(measure_words(_split(result.name)[1]))}"
        f"<small><code>{escape(result.name)}</code>, {sense}</small></td>"
        f'<td class="n"><b>{show(result.value)}</b><span class="unit">{escape(unit)}</span></td>'
        f"<td>{track(result.value, result.baseline_value, low, high, verdict, interval)}</td>"
        f'<td class="n">{show(result.baseline_value)}<small>{escape(baseline_words(result.baseline_name))}</small></td>'
        f'<td class="n">{result.n:,}</td></tr>'
    )


def _verdict(result: Result, gain: Any) -> str:
    """The colour of a bar. A ceiling is no opponent, and an interval that holds zero is no difference."""
    if result.baseline_name in CEILINGS:
        return "plain"
    if gain is not None and gain[0] <= 0 <= gain[1]:
        return "even"
    return "good" if result.gain > 0 else "bad" if result.gain < 0 else "even"


# ---------------------------------------------------------------------- closed loop


def _rollouts(rollouts: Sequence[Mapping[str, Any]]) -> Section | None:
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
    head = ["task", *(h for p in policies for h in (f">{escape(p)}", "95 % interval (Wilson)"))]
    html = (
        "<p>The model controls the robot: it looks, sends commands, looks again. An episode counts only when the task "
        "itself reports success.</p>" + _table(head, rows)
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
    return f'<div class="grid4">{"".join(cards)}</div><p class="note">{note}</p>'


def _video_of(rollout: Mapping[str, Any]) -> Any:
    return rollout.get("video") if rollout.get("video") is not None else rollout.get("frames")


# ---------------------------------------------------------------------- pictures


def _pictures(media: Mapping[str, Any]) -> Section | None:
    frames = {k: v for k, v in media.get("frames", {}).items() if v}
    if not frames:
        return None
    parts = [
        "<p>What the model expects the camera to see, beside what it saw. The samples shown are those in which most "
        "moves, whatever the model made of them. <i>Last frame</i> is the baseline: nothing changes. The difference is "
        "to the real picture, dark where they agree.</p>"
    ]
    for key, examples in frames.items():
        several = examples[0]["real"].shape[0] > 1
        sentence = task_sentence(_base(key))
        parts.append(f'<h3>{escape(_key_title(key))}</h3><p class="muted">{escape(sentence)}</p>')
        parts.append(_film_strips(examples[:3]) if several else _picture_rows(examples[:5]))
    return "pictures", "Imagined pictures and video", "".join(parts)


def _describe(example: Mapping[str, Any]) -> str:
    text = f"“{escape(example['text'])}”<br>" if example.get("text") else ""
    where = f"{example['step'] / example['rate_hz']:.1f} s into the episode"
    model, last = example["psnr_predicted"], example["psnr_last"]
    css = "good" if model > last else "bad"
    return (
        f'{text}<span class="muted">{where}, camera {escape(example["camera"])}</span><br>'
        f'<span class="{css}">{model:.1f} dB</span> <span class="muted">last frame {last:.1f}</span>'
    )


def _picture_rows(examples: Sequence[Mapping[str, Any]]) -> str:
    columns = [("real", "real"), ("predicted", "predicted"), ("shuffled", "other actions"), ("last", "last frame")]
    columns = [(name, label) for name, label in columns if examples[0].get(name) is not None]
    head = "".join(f"<th>{label}</th>" for _, label in columns) + "<th>difference</th>"
    rows = []
    for example in examples:
        cells = "".join(f"<td>{_image(example[name][0], label)}</td>" for name, label in columns)
        gap = difference(example["real"][0], example["predicted"][0])
        rows.append(f'<tr><td class="side">{_describe(example)}</td>{cells}<td>{_image(gap, "difference")}</td></tr>')
    return f'<div class="scroll"><table class="shots"><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'


def _film_strips(examples: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for example in examples:
        gap = difference(example["real"], example["predicted"])
        rows = [("real", example["real"]), ("predicted", example["predicted"])]
        rows += [("last frame", example["last"]), ("difference", gap)]
        strips = "".join(f"<span>{label}</span>{_image(strip(frames), label)}" for label, frames in rows)
        both = np.concatenate([example["real"], example["predicted"]], axis=2)
        film = data_uri(webp(both, max(2.0, example["rate_hz"] / 4)), "image/webp")
        size = f"width:{2 * 112}px"
        parts.append(
            f'<p style="max-width:none">{_describe(example)}</p><div class="strips">{strips}<span>real, predicted<br>'
            f'slowed 4 times</span><span><img class="pixels" style="{size}" alt="real and predicted" src="{film}"></span>'
            "</div>"
        )
    return "".join(parts)


# ---------------------------------------------------------------------- actions


def _vectors(media: Mapping[str, Any]) -> Section | None:
    actions = {k: v for k, v in media.get("actions", {}).items() if v}
    if not actions:
        return None
    order = sorted(actions, key=lambda k: _base(k) != "inverse_dynamics")
    parts = []
    for place, key in enumerate(order):
        for robot in actions[key]:
            head = ["axis", ">model", ">mean command", ">ratio", ">correlation", "unit"]
            rows = [
                [
                    escape(axis),
                    f">{number(float(robot['error'][i]))}",
                    f">{number(float(robot['baseline_error'][i]))}",
                    f">{_ratio(robot['error'][i], robot['baseline_error'][i])}",
                    f">{float(robot['correlation'][i]):.2f}",
                    escape(robot["units"][i]),
                ]
                for i, axis in enumerate(robot["axes"])
            ]
            name = f"{_key_title(key)}, {robot['embodiment']}"
            if place == 0:
                parts.append(f'<h3>{escape(name)}</h3><p class="muted">{escape(task_sentence(_base(key)))}</p>')
                parts.append(_scatter(robot) + _table(head, rows))
            else:
                parts.append(
                    f"<details><summary>{escape(name)}: error per axis</summary>{_table(head, rows)}</details>"
                )
    intro = (
        "<p>Predicted against true commands, each axis in its own unit. On the dashed line they agree. The tables give "
        "the mean absolute error and that of always sending the mean command.</p>"
    )
    return "actions", "Commands", intro + "".join(parts)


def _ratio(error: float, baseline: float) -> str:
    return f"{error / baseline:.2f}" if baseline > 1e-12 else "–"


def _scatter(robot: Mapping[str, Any]) -> str:
    true, predicted = robot["true"], robot["predicted"]
    chosen = np.unique(np.linspace(0, len(true) - 1, min(SCATTER_POINTS, len(true))).round().astype(int))
    plots = []
    for i, axis in enumerate(robot["axes"]):
        a, b = true[chosen, i], predicted[chosen, i]
        low, high = float(min(a.min(), b.min())), float(max(a.max(), b.max()))
        pad = 0.04 * (high - low) or 0.5
        limits = (low - pad, high + pad)
        unit = f" ({robot['units'][i]})" if robot["units"][i] != "unitless" else ""
        figure = plot(
            [],
            width=230,
            height=220,
            points=list(zip(a.tolist(), b.tolist())),
            x_range=limits,
            y_range=limits,
            diagonal=True,
            x_label="true",
            y_label="predicted",
            title=f"{axis}: predicted against true",
        )
        plots.append(f'<div class="plotted"><h4>{escape(axis)}<span>{escape(unit)}</span></h4>{figure}</div>')
    return f'<div class="grid4">{"".join(plots)}</div>'


# ---------------------------------------------------------------------- text and value


def _texts(media: Mapping[str, Any]) -> Section | None:
    texts = {k: v for k, v in media.get("texts", {}).items() if v}
    if not texts:
        return None
    parts = [
        "<p>What the model wrote, as it came. It is right when it is a known phrasing of the episode's own task, "
        "capitals and punctuation aside.</p>"
    ]
    for key, examples in texts.items():
        right = sum(e["right"] for e in examples)
        sentence = task_sentence(_base(key)) if "." not in key else ""
        cards = "".join(_said(e) for e in examples[:9])
        parts.append(
            f'<h3>{escape(_key_title(key))}</h3><p class="muted">{escape(sentence)} Of the {len(examples)} samples '
            f'drawn first, {right} are right.</p><div class="grid3">{cards}</div>'
        )
    return "texts", "What it says", "".join(parts)


def _said(example: Mapping[str, Any]) -> str:
    image = _image(example["image"], "the last frame it saw") if example["image"] is not None else ""
    mark, css = ("✓", "good") if example["right"] else ("✗", "bad")
    said = escape(example["predicted"][:160]) or "<i>nothing</i>"
    truth = "" if example["right"] else f"<small>true: {escape(example['truth'])}</small>"
    return f'<div class="says">{image}<div><span class="mark {css}">{mark}</span> {said}{truth}</div></div>'


def _values(media: Mapping[str, Any]) -> Section | None:
    curves = {k: v for k, v in media.get("curves", {}).items() if v}
    if not curves:
        return None
    parts = [
        "<p>How much of the way the model thinks is done, asked at single pictures along an episode it has never seen. "
        "A model that understands the task rises with the true share; the number is the rank correlation of the two.</p>"
        '<div class="key"><span><i class="l"></i>predicted</span><span><i class="l soft"></i>true</span></div>'
    ]
    for key, episodes in curves.items():
        parts.append(f"<h3>{escape(_key_title(key))}</h3>")
        cards = []
        for curve in episodes[:6]:
            lines = [
                ("soft", curve["seconds"], curve["true"]),
                ("marked", curve["seconds"], curve["predicted"]),
            ]
            figure = plot(lines, x_label="seconds", y_range=(0, 1), title="progress over the episode", height=150)
            frames = _image(strip(curve["frames"], 4), "begin, middle, end") if curve["frames"] is not None else ""
            name = escape(curve["text"] or curve["episode"])
            cards.append(
                f'<div class="plotted"><h4>{name} <span>{curve["correlation"]:+.2f}</span></h4>{figure}'
                f'<div style="padding:4px 3% 0 13%">{frames}</div></div>'
            )
        parts.append(f'<div class="grid3">{"".join(cards)}</div>')
    return "value", "Progress over an episode", "".join(parts)


# ---------------------------------------------------------------------- tokenizers


def _tokenizers(media: Mapping[str, Any]) -> Section | None:
    pictures, book = media.get("reconstructions", {}), media.get("codebook", {})
    if not pictures and not media.get("action_tokenizer"):
        return None
    parts = []
    if pictures:
        size = ""
        if book:
            size = (
                f" A picture becomes {book['tokens_per_frame']} tokens from a codebook of {book['size']:,}, of which "
                f"{book['used']:,} occur here (perplexity {book['perplexity']:.0f})."
            )
        parts.append(
            "<p>Held-out pictures turned into tokens and back. Nothing the model draws can be better than this."
            + size
            + "</p>"
        )
    for kind, shown in pictures.items():
        both = np.stack([shown["real"], shown["decoded"]])
        strips = "".join(
            f"<span>{label}</span>{_image(strip(row), label)}" for label, row in zip(("real", "decoded"), both)
        )
        mean = float(np.mean(shown["psnr"]))
        parts.append(f'<h3>{kind.capitalize()} pictures, {mean:.1f} dB</h3><div class="strips">{strips}</div>')
    for robot, detail in media.get("action_tokenizer", {}).items():
        rows = [
            [
                escape(axis),
                f">{number(float(detail['error'][i]))}",
                f">{number(float(detail['baseline_error'][i]))}",
                escape(unit),
            ]
            for i, (axis, unit) in enumerate(zip(detail["axes"], detail["units"]))
        ]
        parts.append(f"<h3>Commands of {escape(robot)}, {detail['bins']} bins per axis</h3>")
        parts.append(_table(["axis", ">rounding error", ">mean command", "unit"], rows))
    return "tokenizers", "Pictures and commands as tokens", "".join(parts)


# ---------------------------------------------------------------------- training


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
        figure = plot(lines, x_label="step", y_label="bits/token", title=f"learning curve of {task}")
        plots.append(f'<div class="plotted"><h4>{escape(task_title(task))} <span>{last}</span></h4>{figure}</div>')
    any_held = any(curves["validation"].values())
    key = '<span><i class="l soft"></i>training</span>' + (
        '<span><i class="l"></i>held-out episodes</span>' if any_held else ""
    )
    html = (
        "<p>How surprised the model is by what it has to predict, in bits per token, task by task. All tasks are learned at "
        "the same time by the same weights.</p>"
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
        "episode at which the task can be asked.</p>" + _table(head, body)
    )
    return "data", "Data", html


def _timings(timings: Mapping[str, float], media: Mapping[str, Any]) -> Section | None:
    if not timings:
        return None
    top = max(timings.values()) or 1.0
    rows = [[escape(k), f">{_seconds(v)}", track(v, None, 0, top, "plain")] for k, v in timings.items()]
    rows.append(["<b>total</b>", f"><b>{_seconds(sum(timings.values()))}</b>", ""])
    html = _table(["stage", ">time", ""], rows)
    spent = {k: v for k, v in media.get("seconds", {}).items() if v >= 0.05}
    if spent:
        inner = _table(["evaluated", ">time"], [[escape(k), f">{_seconds(v)}"] for k, v in spent.items()])
        html += f"<details><summary>time of the evaluation, task by task</summary>{inner}</details>"
    return "timings", "Where the time went", html


def _seconds(value: float) -> str:
    if value < 60:
        return f"{value:.1f} s"
    if value < 3600:
        return f"{int(value // 60)} min {int(value % 60):02d} s"
    return f"{int(value // 3600)} h {int(value % 3600 // 60):02d} min"


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
        parts.append("<h3>Not measured</h3>" + _table(["task", "why"], rows))
    if media.get("excluded"):
        rows = [[f"<code>{escape(k)}</code>", escape(str(v))] for k, v in media["excluded"].items()]
        parts.append("<h3>Episodes left out</h3>" + _table(["episode", "why"], rows))
    if results:
        seeds = ", ".join(sorted({str(r.seed) for r in results}))
        parts.append(
            "<h3>How it was measured</h3><p>Samples are drawn from held-out episodes in turn, so that few samples cover "
            f"many episodes (seed {seeds}). Decoding is greedy. Intervals are Wilson's for shares, otherwise a bootstrap "
            "over episodes; whether a result differs from its baseline is judged by the bootstrap of the difference on "
            "the same samples. The shuffled-actions baseline is the same model given the commands of another sample.</p>"
        )
    return ("method", "How to repeat this", "".join(parts)) if parts else None
