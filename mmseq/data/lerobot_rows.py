"""Rows of a LeRobot dataset: the columns of an episode, and vectors of numbers with the names of their axes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mmseq.data.kept import Kept
from mmseq.data.lerobot_files import REFETCH, read_parquet, whole
from mmseq.data.lerobot_layout import PERSISTENT, Layout, Record
from mmseq.data.mapping import Slice, Streams, kind_of, taken
from mmseq.errors import EpisodeError, MMSeqError
from mmseq.streams import OWN_VECTORS

_TEXTS = ("task_index", "subtask_index", "timestamp", PERSISTENT)
_OPEN_TABLES = 4  # data files of which the columns in use are kept


class Rows:
    """The rows of `layout`; streams: which columns fill which. Memory holds the columns of a few data files."""

    def __init__(self, layout: Layout, streams: Streams):
        self.layout, self.streams = layout, streams
        self._used = {n for s, names in streams.items() if kind_of(s) != "picture" for n in names}
        self._used |= {n for n in _TEXTS if n in layout.types}
        self._widths: dict[str, int] = {}
        self._tables: Kept[Path, pa.Table] = Kept(_OPEN_TABLES)
        for name in (name for names in streams.values() for name in names if isinstance(name, Slice)):
            self.taken(name)

    def record(self, index: int) -> Record:
        """An episode. Raises: EpisodeError when it cannot be read."""
        record = self.layout.records[index]
        if record.problem:
            raise EpisodeError(f"{self.called(record)}: {record.problem}")
        return record

    def called(self, record: Record) -> str:
        return f"{self.layout.path}, episode {record.index}"

    def _table(self, path: Path) -> pa.Table:
        """The columns in use of a file, as far as it has them."""
        table = self._tables.take(path)
        return self._tables.put(path, read_parquet(path, self._used) if table is None else table)

    def has(self, record: Record, name: str) -> bool:
        """Whether every file of an episode has a column."""
        return all(name in self._table(path).column_names for path, _, _ in record.parts)

    def column(self, record: Record, name: str) -> pa.Array:
        """A column's rows of an episode, in the order of its frames.

        Raises: EpisodeError when one of its files has no such column.
        """
        chunks: list[pa.Array] = []
        for path, start, end in record.parts:
            table = self._table(path)
            if name not in table.column_names:
                raise EpisodeError(f"{self.called(record)}: {path} lacks the column {name!r}", fix=REFETCH)
            chunks += table[name].slice(start, end - start).chunks
        try:
            rows = pa.concat_arrays([c if c.type == chunks[0].type else c.cast(chunks[0].type) for c in chunks])
        except pa.ArrowException as error:
            raise EpisodeError(
                f"{self.called(record)}: its files disagree on {name!r}: {error}", fix=REFETCH
            ) from error
        return rows if record.order is None else rows.take(pa.array(record.order))

    def matrix(self, record: Record, name: str) -> np.ndarray:
        """A column of numbers, float32 (rows, axes). Raises: EpisodeError for rows of unequal widths."""
        array = self.column(record, name)
        rows = len(array)
        if pa.types.is_nested(array.type):
            uneven = not pa.types.is_fixed_size_list(array.type) and len(set(array.value_lengths().to_pylist())) > 1
            if array.null_count or uneven:
                raise EpisodeError(f"{self.called(record)}: {name} has rows of unequal widths, or none", fix=REFETCH)
            array = array.flatten()
        try:
            return array.to_numpy(zero_copy_only=False).astype(np.float32).reshape(rows, -1)
        except (TypeError, ValueError) as error:
            raise EpisodeError(f"{self.called(record)}: {name} holds no numbers: {error}", fix=REFETCH) from error

    def width(self, name: str) -> int:
        """How many numbers a row has: what meta/info.json says where any episode agrees, else what most have."""
        if name not in self._widths:
            shape = self.layout.features.get(name, {}).get("shape") or [1]
            said, seen = whole(shape[-1]), Counter[int]()
            for record in (r for r in self.layout.records if not r.problem):
                try:
                    seen[self.matrix(record, name).shape[1]] += 1
                except MMSeqError:
                    continue
                if said in seen:
                    break
            most = max(seen, key=lambda w: (seen[w], w), default=said or 1)
            self._widths[name] = said if said is not None and said in seen else most
        return self._widths[name]

    def taken(self, name: str) -> int:
        """How many numbers of a row a stream takes. Raises: DataError when the map takes more than there are."""
        part = taken(name, self.width(name))
        return part.stop - part.start

    def axes(self, stream: str) -> list[str]:
        """The names of a vector's axes, over all columns that are joined."""
        names: list[str] = []
        for column in self.streams[stream]:
            own = len(self.streams[stream]) > 1 or stream not in OWN_VECTORS
            width, said = self.width(column), self.layout.features.get(column, {}).get("names")
            last = column.rpartition(".")[2]
            every = [last] if own and width == 1 and not said else axis_names(said, width, last if own else "axis")
            names += every[taken(column, width)]
        return unique(names)

    def vector(self, record: Record, stream: str) -> np.ndarray:
        """A vector stream with a row per frame, float32 (rows, axes).

        Raises: EpisodeError for values that are not finite, or rows as wide as no other episode's.
        """
        parts = [self.matrix(record, name) for name in self.streams[stream]]
        for name, values in zip(self.streams[stream], parts):
            if values.shape[1] != self.width(name):
                raise EpisodeError(
                    f"{self.called(record)}: {name} has {values.shape[1]} numbers in a row, others have "
                    f"{self.width(name)}",
                    fix=REFETCH,
                )
        names = self.streams[stream]
        values = np.concatenate([v[:, taken(name, v.shape[1])] for name, v in zip(names, parts)], axis=1)
        bad = ~np.isfinite(values)
        if bad.any():
            step, axis = np.argwhere(bad)[0]
            raise EpisodeError(
                f"{self.called(record)}: {'+'.join(self.streams[stream])} axis {self.axes(stream)[axis]!r} is "
                f"{values[step, axis]} at step {step}",
                fix="leave the episode out with --skip-bad, or repair it",
            )
        return values


def axis_names(said: Any, width: int, stem: str = "axis") -> list[str]:
    """Names of the axes from a list, [[...]], {"motors": [...]} or {"x": 0, "y": 1}; numbered where they do not fit.

    A name that occurs again is numbered: x, gripper, gripper_2.
    """

    def flat(value: Any) -> list[str]:
        if isinstance(value, dict):
            if value and all(whole(v) is not None and not isinstance(v, str) for v in value.values()):
                return [str(name) for name in sorted(value, key=value.__getitem__)]
            return [name for inner in value.values() for name in flat(inner)]
        if isinstance(value, list | tuple):
            return [name for inner in value for name in flat(inner)]
        return [] if value is None else [str(value)]

    names = flat(said)
    if len(names) != width:
        stem = names[0] if len(names) == 1 else stem
        names = [f"{stem}_{i}" for i in range(width)]
    return unique(names)


def unique(names: list[str]) -> list[str]:
    """The same names, the second of its kind with _2 behind it, and so on."""
    found: list[str] = []
    for name in names:
        number, candidate = 2, name
        while candidate in found or (candidate != name and candidate in names):
            candidate, number = f"{name}_{number}", number + 1
        found.append(candidate)
    return found
