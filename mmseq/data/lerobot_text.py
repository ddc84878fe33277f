"""Texts of an episode, step by step: several tasks, subtasks, and the language annotations of LeRobot 0.6.

A step's task is that of its row (`task_index`), its plan the subtask that is under way: of the column `subtask_index`,
or the last one that `language_persistent` had said by then.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmseq.data.lerobot_files import REFETCH, is_text, scalars, whole
from mmseq.data.lerobot_layout import PERSISTENT, Record
from mmseq.data.lerobot_rows import Rows
from mmseq.data.reader import Phrasings, by_step
from mmseq.episode import TextSpan
from mmseq.errors import DataError, EpisodeError


class Texts:
    """What the episodes of a dataset say. meta/mmseq.json adds paraphrases and plans to tasks."""

    def __init__(self, rows: Rows, fps: float):
        self.rows, self.layout, self.fps = rows, rows.layout, fps
        self._extra = _read_extra(self.layout.path / "meta" / "mmseq.json")

    def of(self, record: Record, at: np.ndarray) -> tuple[list[str], list[str], list[TextSpan]]:
        """(texts, plans, spans) of an episode. at: the frame of each step."""
        tasks, subtasks = self._tasks(record, at), self._subtasks(record, at)
        more = {task: self._extra.get(task, {}) for said in set(tasks) for task in said}
        phrased = [
            tuple(dict.fromkeys(p for t in said for p in (t, *more[t].get("paraphrases", ())))) for said in tasks
        ]
        plans = subtasks or [tuple(more[t]["plan"] for t in said if more[t].get("plan")) for said in tasks]
        texts, spans = by_step("text", phrased)
        steps, more_spans = by_step("plan", plans)
        return texts, steps, [*spans, *more_spans]

    def _tasks(self, record: Record, at: np.ndarray) -> Phrasings:
        name = self.rows.streams.get("text", ("task_index",))[0]
        if self.rows.has(record, name) and (name != "task_index" or self.layout.tasks):
            return [(task,) if task else () for task in self._looked_up(record, name, self.layout.tasks, at)]
        stated = record.meta.get("tasks")
        stated = [stated] if isinstance(stated, str) else [] if stated is None else list(stated)
        return [tuple(task for task in stated if task)] * len(at)

    def _subtasks(self, record: Record, at: np.ndarray) -> Phrasings:
        """[] where nobody wrote any."""
        name = self.rows.streams.get("plan", ("subtask_index",))[0]
        found: list[str] = []
        if self.rows.has(record, name):
            texts = self.layout.subtasks if name == "subtask_index" else self.layout.tasks
            found = self._looked_up(record, name, texts, at)
        elif self.rows.has(record, PERSISTENT):
            rows = self.rows.column(record, PERSISTENT).to_pylist()
            times = np.arange(len(rows)) / self.fps
            if self.rows.has(record, "timestamp"):  # of which annotations speak, whatever it is
                times = scalars(self.rows.column(record, "timestamp"))
            found = [active(rows[i], float(times[i]), "subtask") for i in at]
        return [(text,) if text else () for text in found] if any(found) else []

    def _looked_up(self, record: Record, name: str, texts: dict[int, str], at: np.ndarray) -> list[str]:
        """The texts of a column that holds texts, or their numbers."""
        values = self.rows.column(record, name)
        if is_text(values.type):
            said = values.to_pylist()
            return [said[i] or "" for i in at]
        numbers = [whole(v) for v in scalars(values)[at]]
        if unknown := [n for n in numbers if n is not None and n not in texts]:
            raise EpisodeError(
                f"{self.rows.called(record)}: {name} is {unknown[0]}, for which meta/ has no text", fix=REFETCH
            )
        return ["" if n is None else texts[n] for n in numbers]


def active(entries: Sequence[dict[str, Any]] | None, now_s: float, style: str) -> str:
    """The annotation of a style that holds now: the latest one that is not in the future; "" for none."""
    said = [e for e in entries or () if e.get("style") == style and e.get("content") and e["timestamp"] <= now_s]
    return max(said, key=lambda e: e["timestamp"])["content"] if said else ""


def _read_extra(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    try:
        tasks = json.loads(path.read_bytes()).get("tasks", {})
        for task, extra in tasks.items():
            paraphrases, plan = extra.get("paraphrases", []), extra.get("plan", "")
            if not isinstance(paraphrases, list) or not all(isinstance(p, str) for p in [*paraphrases, plan]):
                raise TypeError(f"task {task!r} has {extra!r}")
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(
            f"{path} cannot be read: {error}",
            fix='write {"tasks": {"<task>": {"paraphrases": ["..."], "plan": "..."}}}',
        ) from error
    return tasks
