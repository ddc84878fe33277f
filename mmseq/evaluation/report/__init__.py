"""One self-contained `report.html`: what was trained, how well it does everything, and what that looks like.

    write_report("report.html", title="mmseq demo", results=results, media=media, training="runs/demo/metrics.jsonl")

No network, no scripts, no files beside it. What was not measured leaves no empty section. Each section is the template
of its name; numbers are prepared in `numbers.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mmseq.errors import DataError, require
from mmseq.evaluation.pictures import data_uri, difference, png, webp
from mmseq.evaluation.report.figures import number, plot, tasks_picture, track
from mmseq.evaluation.report.numbers import closed_loop, headline
from mmseq.evaluation.report.wording import key_title, task_of, task_sentence, task_title
from mmseq.evaluation.results import Result
from mmseq.tokenization.pictures import strip

SECTIONS = {
    "tasks": "One model, many tasks",
    "results": "Results at a glance",
    "rollouts": "The robot in closed loop",
    "pictures": "Imagined pictures and video",
    "actions": "Commands",
    "texts": "What it says",
    "value": "Progress over an episode",
    "tokenizers": "Pictures and commands as tokens",
    "training": "Learning curves",
    "data": "Data",
    "timings": "Where the time went",
    "method": "How to repeat this",
}
SCATTER_POINTS = 400


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

    Raises: DataError when a file or a rollout cannot be read, DependencyError without jinja2.
    """
    media = media or {}
    curves = read_metrics(training) if training else {"train": {}, "validation": {}}
    filled = lambda part: {key: value for key, value in media.get(part, {}).items() if value}
    measured = {"command": command, "config": config, "seeds": sorted({str(r.seed) for r in results})}
    measured |= {part: media.get(part) or {} for part in ("skipped", "excluded")}
    tokens = {part: filled(part) for part in ("reconstructions", "action_tokenizer")}
    skipped = media.get("skipped", {})
    content: dict[str, Any] = {
        "tasks": tasks_picture({k: v for k, v in media.get("arrows", {}).items() if k not in skipped}),
        "results": headline(results, media) if results else None,
        "rollouts": closed_loop(rollouts) if rollouts else None,
        "pictures": filled("frames"),
        "actions": filled("actions"),
        "texts": filled("texts"),
        "value": filled("curves"),
        "tokenizers": tokens | {"book": media.get("codebook") or None} if any(tokens.values()) else None,
        "training": {task: of for task, of in curves["train"].items() if not task.startswith("*")},
        "data": accounting,
        "timings": timings,
        "method": measured if any(measured.values()) else None,
    }
    page = (
        environment()
        .get_template("page.html")
        .render(
            content,
            title=title,
            lead=lead,
            facts=facts or {},
            sections=[(key, name) for key, name in SECTIONS.items() if content[key]],
            held_out=curves["validation"],
            spent={k: v for k, v in media.get("seconds", {}).items() if v >= 0.05},
        )
    )
    Path(path).write_text(page, encoding="utf-8")


def environment(*folders: Path) -> Any:
    """Jinja's, with the templates, filters and functions of reports; folders: with further templates.

    Raises: DependencyError without jinja2.
    """
    jinja2 = require("jinja2", "report")
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    picture = lambda frame: data_uri(png(frame), "image/png")
    made.filters |= {"png": picture, "number": number, "duration": duration, "task_title": task_title}
    made.filters |= {"sentence": task_sentence, "key_title": key_title, "task_of": task_of}
    made.globals |= {"film": _film, "difference": difference, "beside": partial(strip, scale=1, gap=2)}
    made.globals |= {"plot": plot, "track": track, "scatter": _scatter}
    return made


def _scatter(robot: Mapping[str, Any], axis: int) -> str:
    """Predicted against true values of one axis; on the dashed line they agree."""
    true, predicted = robot["true"][:, axis], robot["predicted"][:, axis]
    chosen = np.unique(np.linspace(0, len(true) - 1, min(SCATTER_POINTS, len(true))).round().astype(int))
    a, b = true[chosen], predicted[chosen]
    low, high = float(min(a.min(), b.min())), float(max(a.max(), b.max()))
    pad = 0.04 * (high - low) or 0.5
    limits = (low - pad, high + pad)
    return plot(
        [],
        width=230,
        height=220,
        points=list(zip(a.tolist(), b.tolist())),
        x_range=limits,
        y_range=limits,
        diagonal=True,
        x_label="true",
        y_label="predicted",
        title=f"{robot['axes'][axis]}: predicted against true",
    )


def _film(example: Mapping[str, Any]) -> str:
    both = np.concatenate([example["real"], example["predicted"]], axis=2)
    return data_uri(webp(both, max(2.0, example["rate_hz"] / 4)), "image/webp")


def duration(value: float) -> str:
    if value < 60:
        return f"{value:.1f} s"
    if value < 3600:
        return f"{int(value // 60)} min {int(value % 60):02d} s"
    return f"{int(value // 3600)} h {int(value % 3600 // 60):02d} min"


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
