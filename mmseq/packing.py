"""Packing: several sequences in one row, no attention across them, nothing dropped or cropped.

`pack` fills rows of a fixed number of tokens (exactly, where lengths allow it); `Batch` is the rows laid end to end as
one line of tokens for the model, with where each document begins and what is learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mmseq.errors import ConfigError
from mmseq.inputs import ModelInput
from mmseq.sequence import TokenSequence
from mmseq.vocabulary import Vocabulary


def pack(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Rows of indices whose lengths sum to at most `row_tokens`, each as full as it can be.

    A row takes the longest sequence that is left and the set of others that fills it best. Every
    index appears in exactly one row. The order of rows, and of indices in a row, is a function of
    `lengths` alone. Raises: ConfigError when a sequence is longer than a row.
    """
    waiting: dict[int, list[int]] = {}
    for index in reversed(range(len(lengths))):
        waiting.setdefault(int(lengths[index]), []).append(index)
    if waiting and max(waiting) > row_tokens:
        raise ConfigError(
            f"a sequence of {max(waiting)} tokens does not fit into a row of {row_tokens}",
            fix="raise data.row_tokens or shorten the task",
        )
    order = sorted(waiting, reverse=True)
    rows: list[list[int]] = []
    while order:
        chosen = [order[0], *_fill({n: len(waiting[n]) - (n == order[0]) for n in order}, row_tokens - order[0])]
        rows.append([waiting[n].pop() for n in chosen])
        order = [n for n in order if waiting[n]]
    return rows


def _fill(available: dict[int, int], room: int) -> list[int]:
    """The lengths, of those available (length: how many), whose sum is the largest within `room`."""
    # bit n of an integer says whether some subset sums to n; a length that is there c times enters as
    # packets of 1, 2, 4, ... so that every number of it up to c can be taken
    sums, mask = [1], (2 << room) - 1
    packets: list[tuple[int, int]] = []
    for length, count in available.items():
        count = min(count, room // length)
        size = 1
        while count > 0 and not sums[-1] >> room & 1:
            size = min(size, count)
            packets.append((length, size))
            sums.append((sums[-1] | sums[-1] << length * size) & mask)
            count, size = count - size, size * 2
    total = sums[-1].bit_length() - 1
    chosen: list[int] = []
    for before, (length, size) in zip(reversed(sums[:-1]), reversed(packets), strict=True):
        if not before >> total & 1:
            chosen += [length] * size
            total -= length * size
    return chosen


@dataclass
class Batch:
    """Packed rows as one line of T tokens.

    lengths: tokens of each document in order, padding last as a document of its own; targets by range: (at (N,),
    code (N,), document task index (N,)). parts: how many ranks share the line (`model/sequence_parallel.py`); tensors
    hold this rank's tokens, lengths the whole line's documents.
    """

    input: ModelInput
    lengths: list[int]
    targets: dict[str, tuple[Tensor, Tensor, Tensor]]
    used_tokens: int
    parts: int = 1

    @property
    def tokens(self) -> int:
        return len(self.input)

    def to(self, device: torch.device | str) -> Batch:
        move = lambda group: tuple(t.to(device, non_blocking=True) for t in group)
        targets = {name: move(group) for name, group in self.targets.items()}
        return replace(self, input=self.input.to(device), targets=targets)  # type: ignore[arg-type]


def collate(
    sequences: Sequence[TokenSequence],
    vocabulary: Vocabulary,
    *,
    tasks: Sequence[int] | None = None,
    pad_to: int | None = None,
) -> Batch:
    """Lay sequences end to end. tasks: a task index per sequence, for the loss by task.

    pad_to: total tokens; what is left becomes one padding document without targets.
    """
    tasks = tasks if tasks is not None else [0] * len(sequences)
    lengths = [len(s) for s in sequences]
    used = sum(lengths)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    line = ModelInput.join([s.input for s in sequences])
    if pad_to is not None and pad_to > used:
        line = line.padded(pad_to, vocabulary.structure("<pad>"))
        lengths.append(pad_to - used)
    at = np.concatenate([s.target_at + start for s, start in zip(sequences, starts)])
    kind = np.concatenate([s.target_range for s in sequences])
    task = np.repeat(np.asarray(tasks, dtype=np.int64), [len(s.target_at) for s in sequences])
    targets = {}
    for index, (name, ids) in enumerate(vocabulary.ranges.items()):
        chosen = kind == index
        if chosen.any():
            where = at[chosen]
            codes = line.ids[where + 1] - ids.start
            targets[name] = (torch.from_numpy(where), torch.from_numpy(codes), torch.from_numpy(task[chosen]))
    for s, start in zip(sequences, starts):  # only now: what is hidden is still learned
        line.ids[s.masked + start] = vocabulary.structure("<mask>")
    return Batch(line.tensors(), lengths, targets, used)
