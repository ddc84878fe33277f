"""Runs cells: records what they learn from, lets each method learn, drives what it learned, and keeps a row a task.

What is there already is kept, so that a benchmark that was stopped goes on, and one more method costs one more cell.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from mmseq.errors import ConfigError, did_you_mean
from mmseq.evaluation.lfv.manifest import (
    Cell,
    Config,
    cells,
    fingerprint,
    layouts,
    there_is,
    training_fingerprint,
    way_to,
)
from mmseq.evaluation.lfv.record import Recorder, unheard
from mmseq.evaluation.lfv.report import write_page
from mmseq.evaluation.lfv.rows import Row, read_rows, write_rows
from mmseq.evaluation.lockstep import Controller, Layout, Outcome, Seen, drive
from mmseq.evaluation.results import command, machine
from mmseq.plugins import find
from mmseq.simulation.experts import task_language


def run(config: Config, say: Callable[[str], None] = print) -> list[Row]:
    """All cells of a configuration, from `config.out` where they are there already, and a page about them.

    A cell whose method needs what its video has not (true labels where its speed was changed) is left out, and said to
    be. Raises: ConfigError before anything is recorded.
    """
    config.check()
    for task in (*config.robot_tasks, *config.video_tasks):
        task_language(task)
    lacking = {cell: _lacking(cell, config) for cell in cells(config)}
    if all(lacking.values()):
        (cell, lacks), *_ = lacking.items()
        raise ConfigError(f"{cell}: there is no {' and no '.join(lacks)}", fix=way_to(config, lacks))
    rows: list[Row] = []
    for cell, lacks in lacking.items():
        if lacks:
            say(f"{cell} is left out: there is no {' and no '.join(lacks)}")
            continue
        kept = Path(config.out) / "cells" / str(cell) / "rows.json"
        stored = read_rows(kept, config, cell.method)
        if stored is None:
            say(f"{cell}")
            trained = Path(config.out) / "trained" / f"{cell}-{training_fingerprint(config)}"
            stored = _run_cell(cell, config, trained, say)
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_rows(kept, stored)
        rows += stored
    write_page(Path(config.out) / "report.html", rows, config, command())
    return rows


def _needs(method: str) -> Sequence[str]:
    return getattr(find("methods", method), "needs", ())


def _lacking(cell: Cell, config: Config) -> list[str]:
    """What the method of a cell needs and the cell has not. Raises: ConfigError when no cell ever has it."""
    there = there_is(config, cell.video)
    for name in _needs(cell.method):
        if name not in there:
            raise ConfigError(f"methods: {cell.method!r} needs {name!r}: {did_you_mean(name, there)}")
    return [name for name in _needs(cell.method) if not there[name]]


def _run_cell(cell: Cell, config: Config, out: Path, say: Callable[[str], None]) -> list[Row]:
    poses = "poses" in _needs(cell.method)
    data = Recorder(config, cell.seed, say).data(cell.video, cell.demonstrations, poses=poses)
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    controller = find("methods", cell.method)(config, say).train(data, out, cell.seed)
    floors = cell.method in config.floors
    driven: list[tuple[str, str, str, list[Outcome]]] = []
    groups = {"robot": config.robot_tasks, "video": config.video_tasks}
    floored = "video" if config.video_tasks else "robot"
    for shift in config.shifts:
        for method, own in ((cell.method, controller), *(_floors(controller) if shift == "plain" and floors else ())):
            for group, tasks in groups.items():
                if tasks and (own is controller or group == floored):
                    words = _reworded if config.reworded else None
                    found = drive(own, layouts(config, tasks, shift), max_steps=config.max_steps, texts=words)
                    driven.append((method, shift, group, found))
    minutes = (time.monotonic() - began) / 60
    said = {"demonstrations": cell.demonstrations, "video": cell.video, "seed": cell.seed, "minutes": minutes}
    said |= {"manifest": fingerprint(config), "machine": machine()}
    return [
        Row(
            method=method,
            floor_of=cell.method if method != cell.method else None,
            shift=shift,
            group=group,
            task=task,
            outcomes=outcomes,
            **said,
        )
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
    """A policy that is always asked for the same thing, whatever the task; in that task for another."""

    def __init__(self, controller: Controller, tasks: tuple[str, str] = ("coffee-button", "door-lock")):
        self._controller, self._tasks = controller, tasks

    def act(self, seen: Sequence[Seen]) -> Sequence[np.ndarray]:
        return self._controller.act([Seen(s.layout, s.observation, self._text(s.layout.task), s.step) for s in seen])

    def _text(self, task: str) -> str:
        asked, instead = self._tasks
        return task_language(instead if task == asked else asked).instructions[0]


class RandomActions:
    """Uniform within the limits, of the layout's seed."""

    def act(self, seen: Sequence[Seen]) -> Sequence[np.ndarray]:
        return [np.random.default_rng([s.layout.seed, s.step]).uniform(-1, 1, (1, 4)) for s in seen]


def _reworded(layout: Layout, instructions: Sequence[str]) -> str:
    return unheard(layout.task)


def _by_task(found: Sequence[Outcome]) -> list[tuple[str, list[bool]]]:
    tasks = dict.fromkeys(outcome.layout.task for outcome in found)
    return [(task, [o.success for o in found if o.layout.task == task]) for task in tasks]
