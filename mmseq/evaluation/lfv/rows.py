"""Rows of the benchmark: one for each task of a cell under a shift."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mmseq.evaluation.lfv.manifest import Config, fingerprint


@dataclass(frozen=True, kw_only=True)
class Row:
    """Successes of one task in one cell, under one shift.

    group: `robot` for tasks with demonstrations, `video` for those that were seen as video only. outcomes: of each
    layout, in order, so that cells compare layout by layout. floor_of: where `method` is a floor, the method whose
    policy was driven blind or deaf.
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
    floor_of: str | None = None


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write a JSON list, one object for each row."""
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def read_rows(path: Path, config: Config, method: str) -> list[Row] | None:
    """The rows of a method's cell that was run with the same manifest; None when it was not, or without the floors that
    are asked for."""
    try:
        rows = [Row(**row) for row in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError):
        return None
    floors = method in config.floors and "plain" in config.shifts
    if floors and all(row.method == method for row in rows):
        return None
    return rows if rows and all(row.manifest == fingerprint(config) for row in rows) else None
