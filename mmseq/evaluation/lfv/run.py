"""Runs cells: records what they learn from, lets each method learn, drives what it learned, and keeps a row a task.

What is there already is kept, so that a benchmark that was stopped goes on, and one more method costs one more cell.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmseq.evaluation.lfv.manifest import Cell, Config, cells, fingerprint, layouts
from mmseq.evaluation.lfv.record import Recorder
from mmseq.evaluation.lockstep import Controller, Layout, Outcome, Seen, drive
from mmseq.evaluation.results import machine, wilson
from mmseq.plugins import find
from mmseq.simulation.experts import task_language

FLOORS = ("blanked_images", "other_words")  # of the method's own policy; and `random` once a seed


@dataclass(frozen=True, kw_only=True)
class Row:
    """Successes of one task in one cell, under one shift.

    group: `robot` for tasks with demonstrations, `video` for those that were seen as video only. outcomes: of each
    layout, in order, so that cells compare layout by layout.
    """

    method: str
    demonstrations: int
    video: str
    seed: int
    group: str
    task: str
    shift: str
    outcomes: list[bool]
    minutes: float  # of the whole cell
    manifest: str  # `manifest.fingerprint`
    machine: str


def run(config: Config, say: Callable[[str], None] = print) -> list[Row]:
    """All cells of a configuration, from `config.out` where they are there already.

    Raises: ConfigError before anything is recorded.
    """
    config.check()
    rows: list[Row] = []
    for cell in cells(config):
        kept = Path(config.out) / "cells" / str(cell) / "rows.json"
        stored = _stored(kept, config)
        if stored is None:
            say(f"{cell}")
            stored = _run_cell(cell, config, kept.parent, say)
            kept.write_text(json.dumps([asdict(row) for row in stored], indent=1) + "\n")
        rows += stored
    return rows


def _run_cell(cell: Cell, config: Config, out: Path, say: Callable[[str], None]) -> list[Row]:
    data = Recorder(config, cell.seed, say).data(cell.video, cell.demonstrations)
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    controller = find("methods", cell.method)(config, say).train(data, out, cell.seed)
    driven: list[tuple[str, str, str, list[Outcome]]] = []
    for shift in config.shifts:
        for method, own in ((cell.method, controller), *(_floors(controller) if shift == "plain" else ())):
            for group, tasks in (("robot", config.robot_tasks), ("video", config.video_tasks)):
                if tasks and (own is controller or group == "video"):
                    words = _reworded if config.reworded else None
                    found = drive(own, layouts(config, tasks, shift), max_steps=config.max_steps, texts=words)
                    driven.append((method, shift, group, found))
    minutes = (time.monotonic() - began) / 60
    said = {"demonstrations": cell.demonstrations, "video": cell.video, "seed": cell.seed, "minutes": minutes}
    said |= {"manifest": fingerprint(config), "machine": machine()}
    return [
        Row(method=method, shift=shift, group=group, task=task, outcomes=outcomes, **said)
        for method, shift, group, found in driven
        for task, outcomes in _by_task(found)
    ]


def _floors(controller: Controller) -> Iterable[tuple[str, Controller]]:
    """What a policy that sees nothing, or hears other words, still does; a method may not offer the first."""
    if blanked := getattr(controller, "blanked", None):
        yield "blanked_images", blanked()
    yield "other_words", OtherWords(controller)
    yield "random", RandomActions()


class OtherWords:
    """A policy that is always asked for the same thing, whatever the task."""

    def __init__(self, controller: Controller, text: str = task_language("coffee-button").instructions[0]):
        self._controller, self._text = controller, text

    def act(self, seen: Sequence[Seen]) -> Sequence[np.ndarray]:
        return self._controller.act([Seen(s.layout, s.observation, self._text, s.step) for s in seen])


class RandomActions:
    """Uniform within the limits, of the layout's seed."""

    def act(self, seen: Sequence[Seen]) -> Sequence[np.ndarray]:
        return [np.random.default_rng([s.layout.seed, s.step]).uniform(-1, 1, (1, 4)) for s in seen]


def _reworded(layout: Layout, instructions: Sequence[str]) -> str:
    return instructions[-1]


def _by_task(found: Sequence[Outcome]) -> list[tuple[str, list[bool]]]:
    tasks = dict.fromkeys(outcome.layout.task for outcome in found)
    return [(task, [o.success for o in found if o.layout.task == task]) for task in tasks]


def _stored(path: Path, config: Config) -> list[Row] | None:
    """The rows of a cell that was run with the same manifest; None when it was not."""
    try:
        rows = [Row(**row) for row in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError):
        return None
    return rows if all(row.manifest == fingerprint(config) for row in rows) else None


def summarise(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each method, robot data, video, group and shift: successes over tasks and seeds, and the Wilson interval."""
    keys = dict.fromkeys((r.method, r.demonstrations, r.video, r.group, r.shift) for r in rows)
    out = []
    for key in keys:
        chosen = [r for r in rows if (r.method, r.demonstrations, r.video, r.group, r.shift) == key]
        wins, count = sum(sum(r.outcomes) for r in chosen), sum(len(r.outcomes) for r in chosen)
        low, high = wilson(wins, count)
        names = ("method", "demonstrations", "video", "group", "shift")
        minutes = max(r.minutes for r in chosen)
        seeds = len({r.seed for r in chosen})
        out.append(
            dict(zip(names, key))
            | {"successes": wins, "episodes": count, "low": low, "high": high, "seeds": seeds, "minutes": minutes}
        )
    return out


def print_summary(rows: Sequence[Row]) -> None:
    """A table of `summarise`."""
    from rich.console import Console
    from rich.table import Table

    table = Table("method", "demos", "video", "tasks", "shift", "success", "95 % interval", "seeds", "min")
    for row in summarise(rows):
        share = f"{row['successes']}/{row['episodes']} = {row['successes'] / row['episodes']:.0%}"
        interval, said = f"{row['low']:.0%} to {row['high']:.0%}", f"{row['minutes']:.1f}"
        table.add_row(
            *(row["method"], str(row["demonstrations"]), row["video"], row["group"], row["shift"]),
            *(share, interval, str(row["seeds"]), said),
        )
    Console().print(table)
