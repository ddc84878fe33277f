"""Packing: the share of slots that hold a token, and tokens lost (or repeated), against rows filled in order.

    mmseq bench packing --json packing.json

Two sets of lengths: samples of the demo's mix, in its rows of 2,048 tokens; and lengths from 20 to 8,000, as many of
each magnitude, in rows of 8,192. The baseline lays sequences into rows as they come and pads where the next one does
not fit, which drops and crops nothing either.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmseq.bench.rows import BenchRow, Spread, require_positive, row
from mmseq.bench.samples import make_tokens
from mmseq.data.mixture import BLOCK_SAMPLES, Mixture, load_mix
from mmseq.packing import pack


@dataclass(kw_only=True)
class Config:
    """What `mmseq bench packing` measures."""

    blocks: int = 4  # of 4,096 samples, packed of each set
    seed: int = 0  # of what is drawn

    def check(self) -> None:
        """Raises: ConfigError naming the option."""
        require_positive(self, "blocks")


def bench(config: Config) -> tuple[list[BenchRow], list[str]]:
    """Rows, and what else there is to say. Raises: ConfigError."""
    config.check()
    with tempfile.TemporaryDirectory() as folder:
        tokenizers = make_tokens(Path(folder), vocabulary=1024)
        mix, tokens = load_mix(Path(folder, "mix.yaml")), Path(folder, "tokens")
        mixture = Mixture(mix, tokens, tokenizers, row_tokens=2048, seed=config.seed)
        demo = [[s.length for line in mixture.block(b) for s in line] for b in range(config.blocks)]
    random = np.random.default_rng(config.seed)
    demo = [random.permutation(lengths).tolist() for lengths in demo]  # a block comes as the rows it was packed into
    spread = [
        np.exp(random.uniform(np.log(20), np.log(8000), BLOCK_SAMPLES)).astype(int).tolist()
        for _ in range(config.blocks)
    ]
    rows, notes = [], []
    for name, blocks, size in (("demo_mix", demo, 2048), ("20_to_8000", spread, 8192)):
        packed = [pack(lengths, size) for lengths in blocks]
        useful = [sum(n) / (len(p) * size) for n, p in zip(blocks, packed)]
        plain = [sum(n) / (in_order(n, size) * size) for n in blocks]
        # tokens of sequences that are in no row, or in more than one (rows hold them whole)
        placed = [np.bincount([i for line in p for i in line], minlength=len(n)) for n, p in zip(blocks, packed)]
        lost = sum(int(np.abs(times - 1) @ np.array(n)) for n, times in zip(blocks, placed))
        theirs, seed, plainly = Spread(tuple(plain)), config.seed, "rows in order"
        rows.append(row(f"packing.{name}", "share", Spread(tuple(useful)), plainly, theirs, seed=seed))
        none = Spread((0.0,))
        rows.append(row(f"packing.{name}.lost", "tokens", Spread((float(lost),)), plainly, none, better="lower"))
        notes.append(
            f"{name}: {sum(map(len, blocks)):,} sequences of {min(map(min, blocks))} to {max(map(max, blocks)):,} "
            f"tokens, {sum(map(sum, blocks)):,} in all, in {sum(map(len, packed)):,} rows of {size:,}; "
            f"{min(useful):.4%} useful in the least useful block"
        )
    return rows, notes


def in_order(lengths: Sequence[int], row_tokens: int) -> int:
    """How many rows sequences fill when each is laid behind the one before, or begins the next row."""
    rows, room = 0, 0
    for length in lengths:
        if length > room:
            rows, room = rows + 1, row_tokens
        room -= length
    return rows
