"""Texts of an episode, step by step: several tasks, subtasks, and the language annotations of LeRobot 0.6.

A step's task is that of its row (`task_index`), its plan the subtask that is under way: of the column `subtask_index`,
or the last one that `language_persistent` had said by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from mmseq.episode import TextSpan

PERSISTENT, EVENTS = "language_persistent", "language_events"


def by_step(stream: str, phrasings: Sequence[tuple[str, ...]]) -> tuple[list[str], list[TextSpan]]:
    """What holds for the whole episode, or the spans of a text that changes. phrasings: of each step, () for none."""
    cuts = [0, *(i for i in range(1, len(phrasings)) if phrasings[i] != phrasings[i - 1]), len(phrasings)]
    if len(cuts) == 2:
        return list(phrasings[0]), []
    return [], [TextSpan(stream, a, b, phrasings[a]) for a, b in pairwise(cuts) if phrasings[a]]


def active(rows: Sequence[Sequence[dict[str, Any]] | None], times_s: np.ndarray, style: str) -> list[str]:
    """The annotation of a style that holds at each step: the latest one that is not in its future; "" for none."""
    found = []
    for entries, now in zip(rows, times_s):
        said = [e for e in entries or () if e.get("style") == style and e.get("content") and e["timestamp"] <= now]
        found.append(max(said, key=lambda e: e["timestamp"])["content"] if said else "")
    return found


def styles(rows: Sequence[Sequence[dict[str, Any]] | None]) -> set[str]:
    """The styles of annotations that occur."""
    return {str(entry.get("style")) for entries in rows for entry in entries or ()}
