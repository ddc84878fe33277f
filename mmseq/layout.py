"""Layout: what fixes the lengths of sequences and the places of tokens in them, before any data is read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np

from mmseq.errors import TaskError
from mmseq.streams import VECTOR, VISION
from mmseq.tasks import PlacedSegment


@dataclass(frozen=True)
class Layout:
    """What fixes lengths and slots besides the task: the tokenizers' sizes.

    Slots tell the model where inside its frame or chunk a token lies, which RoPE alone teaches slowly. In a predicted
    segment a position carries the slot of the token that it must predict, so that it knows which axis or place comes
    next; after the last token it begins again, where nothing is learned. A place is a row and a column (of a chunk: the
    step and the axis), each with a row of the slot table; what a token has is their sum.

    grid: rows and columns of tokens in a frame. merge: given vision joins merge x merge of them. vectors: the ranges of
    vector streams. soft: positions of a given frame where an encoder gives them, 0 where codes do. flat: one slot for
    each place, as models from before had them: of at most 256 tokens a frame or chunk.
    """

    grid: tuple[int, int]
    merge: int = 2
    vectors: tuple[str, ...] = ()
    soft: int = 0
    flat: bool = False

    STEPS, AXES, FLAT = 256, 128, 256

    def __post_init__(self):
        if self.merge < 1 or self.grid[0] % self.merge or self.grid[1] % self.merge:
            raise TaskError(f"merge {self.merge} does not divide the vision grid {self.grid}")
        if self.flat and self.frame_tokens > self.FLAT:
            raise TaskError(f"a frame has {self.frame_tokens} tokens, tokenizers from before have {self.FLAT} slots")

    @property
    def frame_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def frame_positions(self, predicted: bool) -> int:
        """Positions that one frame takes."""
        return self.frame_tokens if predicted else self.soft or self.frame_tokens // self.merge**2

    @cached_property
    def tables(self) -> dict[str, tuple[int, int, int]]:
        """Of each use of slots its first row in the table, then rows and columns of its places."""
        rows, columns = self.grid
        if self.flat:
            first, later = self.vectors[:2], self.vectors[2:]  # those came when tables had their places already
            names = ["vision", "merged", *first, *(f"next {name}" for name in ("vision", *first))]
            names += [*later, *(f"next {name}" for name in later)]
            return {name: (1 + i * self.FLAT, 0, self.FLAT) for i, name in enumerate(names)}
        merged = (1, self.soft) if self.soft else (rows // self.merge, columns // self.merge)
        sizes = {"vision": (rows, columns), "merged": merged, "next vision": (rows, columns)}
        for name in self.vectors:
            sizes |= {name: (self.STEPS, self.AXES), f"next {name}": (self.STEPS, self.AXES)}
        firsts = accumulate((r + c for r, c in sizes.values()), initial=1)  # row 0 is of tokens without a place
        return {name: (first, *size) for first, (name, size) in zip(firsts, sizes.items())}

    @property
    def slot_rows(self) -> int:
        """Rows of the slot table."""
        first, rows, columns = list(self.tables.values())[-1]
        return first + rows + columns

    def slots(self, use: str, columns: int, first: int, count: int) -> np.ndarray:
        """Slots (count, S) of places first .. first + count - 1, row by row of `columns`: copy, do not change."""
        key = (use, columns, first, count)
        found = self._made.get(key)
        if found is None:
            if len(self._made) > 4096:  # longer and longer texts, each of its own length
                self._made.clear()
            found = self._made[key] = self._slots(*key)
            found.flags.writeable = False
        return found

    @cached_property
    def _made(self) -> dict[tuple[str, int, int, int], np.ndarray]:
        return {}

    def _slots(self, use: str, columns: int, first: int, count: int) -> np.ndarray:
        index, table = np.arange(first, first + count), self.tables.get(use)
        if table is None:
            return np.zeros((count, 1 if self.flat else 2), dtype=np.int64)
        start, rows, _ = table
        if use in self.vectors:
            self._require(use, -(-(first + count) // columns), columns)
        if self.flat:
            return (start + index % self._flat_period(use))[:, None]
        return np.stack([start + index // columns % rows, start + rows + index % columns], 1)

    def _flat_period(self, use: str) -> int:
        if use == "merged":
            return self.frame_positions(False)
        return self.frame_tokens if use.endswith("vision") else self.FLAT

    def require(self, placed: PlacedSegment, axes: int) -> None:
        """Raises: TaskError for a segment of a vector that has more places than there are slots."""
        if placed.row.kind is VECTOR:
            self._require(str(placed.segment), placed.steps, axes)

    def _require(self, what: str, steps: int, axes: int) -> None:
        fits = steps * axes <= self.FLAT if self.flat else steps <= self.STEPS and axes <= self.AXES
        if not fits:
            most = f"{self.FLAT} codes" if self.flat else f"{self.STEPS} steps of {self.AXES} axes"
            raise TaskError(
                f"{what} has {steps} steps of {axes} axes, at most {most} are told apart",
                fix="train tokenizers and a model anew, or shorten it" if self.flat else "shorten it",
            )


def says_its_rate(segment: PlacedSegment) -> bool:
    """Whether a header without an offset has the time from frame to frame."""
    return segment.row.kind is VISION and segment.row.timed and segment.segment.length is not None


def merge_codes(codes: np.ndarray, layout: Layout) -> np.ndarray:
    """(frames, tokens) codes in raster order -> (frames, positions, merge * merge)."""
    rows, columns = layout.grid
    m = layout.merge
    blocks = codes.reshape(-1, rows // m, m, columns // m, m).transpose(0, 1, 3, 2, 4)
    return blocks.reshape(len(blocks), -1, m * m)


def split_codes(patches: np.ndarray, layout: Layout) -> np.ndarray:
    """The inverse of `merge_codes`: (frames, positions, merge * merge) -> (frames, tokens)."""
    rows, columns = layout.grid
    m = layout.merge
    blocks = patches.reshape(-1, rows // m, columns // m, m, m).transpose(0, 1, 3, 2, 4)
    return blocks.reshape(len(blocks), -1)


def sequence_length(
    placed: Sequence[PlacedSegment],
    layout: Layout,
    *,
    cameras: int,
    numbered: bool,
    axes: Mapping[str, int],
    text_lengths: Mapping[str, int],
) -> int:
    """The length `SequenceBuilder.build` will give, from metadata alone (packing needs no data).

    cameras: how many `image` stands for. numbered: whether headers name the camera. axes: those of every vector
    stream. text_lengths: tokens of each text stream, its end token included.
    Raises: TaskError for a segment that has more places than there are slots.
    """
    total = 3  # <bos> <embodiment> ... <eos>
    for p in placed:
        segment, kind = p.segment, p.row.kind
        timed = segment.offset is not None or says_its_rate(p)
        header = 1 + timed + segment.at.startswith("@-")
        width = axes[p.stream] if kind is VECTOR else 1
        layout.require(p, width)
        if kind.cameras:
            views = 1 if segment.camera else cameras
            total += views * (header + numbered + p.steps * layout.frame_positions(p.predicted))
        else:
            shape = kind.shape(p.steps, layout.frame_tokens, width)
            total += header + (text_lengths[p.stream] if shape is None else math.prod(shape))
    return total
