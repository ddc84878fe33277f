"""The report's examples: pictures, commands, texts and curves as the model predicted them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from html import escape
from typing import Any

import numpy as np

from mmseq.evaluation.figures import number, plot
from mmseq.evaluation.markup import Section, image_tag, key_title, table, task_of
from mmseq.evaluation.pictures import data_uri, difference, webp
from mmseq.evaluation.wording import task_sentence
from mmseq.tokenization.pictures import strip

SCATTER_POINTS = 400
beside = partial(strip, scale=1, gap=2)


def pictures(media: Mapping[str, Any]) -> Section | None:
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
        sentence = task_sentence(task_of(key))
        parts.append(f'<h3>{escape(key_title(key))}</h3><p class="muted">{escape(sentence)}</p>')
        shown = (2 if several else 4) if key == task_of(key) else (1 if several else 2)
        parts.append(_film_strips(examples[:shown]) if several else _picture_rows(examples[:shown]))
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
        cells = "".join(f"<td>{image_tag(example[name][0], label)}</td>" for name, label in columns)
        gap = difference(example["real"][0], example["predicted"][0])
        rows.append(
            f'<tr><td class="side">{_describe(example)}</td>{cells}<td>{image_tag(gap, "difference")}</td></tr>'
        )
    return f'<div class="scroll"><table class="shots"><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'


def _film_strips(examples: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for example in examples:
        gap = difference(example["real"], example["predicted"])
        rows = [("real", example["real"]), ("predicted", example["predicted"])]
        rows += [("last frame", example["last"]), ("difference", gap)]
        strips = "".join(f"<span>{label}</span>{image_tag(beside(frames), label)}" for label, frames in rows)
        both = np.concatenate([example["real"], example["predicted"]], axis=2)
        film = data_uri(webp(both, max(2.0, example["rate_hz"] / 4)), "image/webp")
        size = f"width:{2 * 112}px"
        parts.append(
            f'<p style="max-width:none">{_describe(example)}</p><div class="strips">{strips}<span>real, predicted<br>'
            f'slowed 4 times</span><span><img class="pixels" style="{size}" alt="real and predicted" '
            f'src="{film}"></span></div>'
        )
    return "".join(parts)


def vectors(media: Mapping[str, Any]) -> Section | None:
    actions = {k: v for k, v in media.get("actions", {}).items() if v}
    if not actions:
        return None
    order = sorted(actions, key=lambda k: task_of(k) != "inverse_dynamics")
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
            name = f"{key_title(key)}, {robot['embodiment']}"
            if place == 0:
                parts.append(f'<h3>{escape(name)}</h3><p class="muted">{escape(task_sentence(task_of(key)))}</p>')
                parts.append(_scatter(robot) + table(head, rows, fit=True))
            else:
                body = table(head, rows, fit=True)
                parts.append(f"<details><summary>{escape(name)}: error per axis</summary>{body}</details>")
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


def texts(media: Mapping[str, Any]) -> Section | None:
    texts = {k: v for k, v in media.get("texts", {}).items() if v}
    if not texts:
        return None
    parts = [
        "<p>What the model wrote, as it came. It is right when it is a known phrasing of the episode's own task, "
        "capitals and punctuation aside.</p>"
    ]
    for key, examples in texts.items():
        right = sum(e["right"] for e in examples)
        sentence = task_sentence(task_of(key)) if "." not in key else ""
        cards = "".join(_said(e) for e in examples[:9])
        parts.append(
            f'<h3>{escape(key_title(key))}</h3><p class="muted">{escape(sentence)} Right in {right} of the '
            f'{len(examples)} samples drawn first.</p><div class="grid3">{cards}</div>'
        )
    return "texts", "What it says", "".join(parts)


def _said(example: Mapping[str, Any]) -> str:
    image = image_tag(example["image"], "the last frame it saw") if example["image"] is not None else ""
    mark, css = ("✓", "good") if example["right"] else ("✗", "bad")
    said = escape(example["predicted"][:160]) or "<i>nothing</i>"
    truth = "" if example["right"] else f"<small>true: {escape(example['truth'])}</small>"
    return f'<div class="says">{image}<div><span class="mark {css}">{mark}</span> {said}{truth}</div></div>'


def values(media: Mapping[str, Any]) -> Section | None:
    curves = {k: v for k, v in media.get("curves", {}).items() if v}
    if not curves:
        return None
    parts = [
        "<p>How much of the way the model thinks is done, asked at single pictures along an episode it has never "
        "seen. A model that understands the task rises with the true share; the number is the rank correlation of "
        "the two.</p>"
        '<div class="key"><span><i class="l"></i>predicted</span><span><i class="l soft"></i>true</span></div>'
    ]
    for key, episodes in curves.items():
        parts.append(f"<h3>{escape(key_title(key))}</h3>")
        cards = []
        for curve in episodes[:6]:
            lines = [
                ("soft", curve["seconds"], curve["true"]),
                ("marked", curve["seconds"], curve["predicted"]),
            ]
            figure = plot(lines, x_label="seconds", y_range=(0, 1), title="progress over the episode", height=150)
            frames = image_tag(beside(curve["frames"]), "begin, middle, end") if curve["frames"] is not None else ""
            name = escape(curve["text"] or curve["episode"])
            cards.append(
                f'<div class="plotted"><h4>{name} <span>{curve["correlation"]:+.2f}</span></h4>{figure}'
                f'<div style="padding:4px 3% 0 13%">{frames}</div></div>'
            )
        parts.append(f'<div class="grid3">{"".join(cards)}</div>')
    return "value", "Progress over an episode", "".join(parts)


def tokenizers(media: Mapping[str, Any]) -> Section | None:
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
            f"<span>{label}</span>{image_tag(beside(row), label)}" for label, row in zip(("real", "decoded"), both)
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
        parts.append(table(["axis", ">rounding error", ">mean command", "unit"], rows, fit=True))
    return "tokenizers", "Pictures and commands as tokens", "".join(parts)
