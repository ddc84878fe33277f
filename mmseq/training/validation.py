"""Validation: what the model loses on held-out episodes, and how far off its answers are, by task.

Answers are teacher-forced: each token is predicted from the true ones before it, all in the one pass that also
gives the loss. That is cheap, and works the same at every ZeRO stage and when ranks share lines of tokens; it says how
training goes. How good whole answers are, which have to live with their own mistakes, is what `mmseq eval` measures.

Every group of ranks takes its share of the batches; what comes out does not depend on how many there are.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mmseq.data.mixture import Mixture
from mmseq.data.moments import Sample
from mmseq.errors import DataError, MMSeqError
from mmseq.packing import Batch, collate
from mmseq.sequence import TokenSequence, void_sequence
from mmseq.streams import stream_row
from mmseq.tokenization.values import Span, values_of
from mmseq.training.config import TrainConfig
from mmseq.training.distributed import agree, most

PICTURES = 4  # samples per task that are shown


@dataclass
class HeldOut:
    """A batch of held-out sequences and what they are. numbers: of each sample among all. shown: those to draw."""

    batch: Batch
    sequences: list[TokenSequence]
    samples: list[Sample]
    numbers: list[int]
    shown: set[int]


@dataclass
class Measured:
    """bits_per_token: by task. teacher_forced: by task and measure (`values.py`). pictures: by name (H, W, 3)."""

    bits_per_token: dict[str, float] = field(default_factory=dict)
    teacher_forced: dict[str, dict[str, float]] = field(default_factory=dict)
    pictures: dict[str, np.ndarray] = field(default_factory=dict)


def held_out_batches(config: TrainConfig, mixture: Mixture, *, part: int = 0, parts: int = 1) -> list[HeldOut]:
    """Every `parts`-th batch from the `part`-th on: the same held-out samples each time, in batches of at most the
    tokens that a pass of training has."""
    groups, shown = _plan(config, mixture)
    return [_build(mixture, group, shown) for group in groups[part::parts]]


def _plan(config: TrainConfig, mixture: Mixture) -> tuple[list[list[tuple[int, Sample]]], set[int]]:
    """All held-out samples with their numbers, those of a batch together, and the numbers of those to draw."""
    groups: list[list[tuple[int, Sample]]] = []
    by_task: dict[int, list[int]] = {}
    number = 0
    for moments in mixture.moments:
        count = min(config.validation_samples, len(moments))
        samples = [moments.moment(p) for p in _spread(count, len(moments))]
        groups += _within(list(enumerate(samples, number)), config.data.row_tokens * config.data.rows_per_pass)
        by_task.setdefault(moments.task_index, []).extend(range(number, number + count))
        number += count
    shown = {numbers[i] for numbers in by_task.values() for i in _spread(min(PICTURES, len(numbers)), len(numbers))}
    return groups, shown


def _spread(count: int, size: int) -> list[int]:
    """`count` places of 0 .. size - 1, evenly from the first to the last."""
    return [round(i * (size - 1) / max(1, count - 1)) for i in range(count)]


def _within(samples: list[tuple[int, Sample]], limit: int) -> Iterator[list[tuple[int, Sample]]]:
    """Samples in order, as many together as have at most `limit` tokens, at least one."""
    group: list[tuple[int, Sample]] = []
    for number, sample in samples:
        if group and sum(s.length for _, s in group) + sample.length > limit:
            yield group
            group = []
        group.append((number, sample))
    if group:
        yield group


def _build(mixture: Mixture, group: list[tuple[int, Sample]], shown: set[int]) -> HeldOut:
    numbers, samples = [n for n, _ in group], [s for _, s in group]
    sequences = [mixture.build(s) for s in samples]
    batch = collate(sequences, mixture.tokenizers.vocabulary, tasks=[s.task for s in samples])
    return HeldOut(batch, sequences, samples, numbers, shown.intersection(numbers))


class Validation:
    """The held-out samples of a run, shared out over its ranks.

    group, groups: which of how many groups of ranks this one is in. Raises: MMSeqError on all ranks when a sample
    cannot be read on one of them.
    """

    def __init__(self, config: TrainConfig, mixture: Mixture, *, group: int, groups: int):
        self.mixture, self.tokenizers = mixture, mixture.tokenizers
        self.batches: list[HeldOut] = []
        failed: MMSeqError | None = None
        try:
            self.batches = held_out_batches(config, mixture, part=group, parts=groups)
        except MMSeqError as error:
            failed = error
        if agree(failed is not None):
            raise failed or DataError("a held-out sample cannot be read; another rank says which")
        self.rounds = most(len(self.batches))  # with ZeRO 3 ranks pass equally often
        self._nothing = collate([void_sequence(mixture.builder)], self.tokenizers.vocabulary)

    def __bool__(self) -> bool:
        return self.rounds > 0

    @torch.no_grad()
    def measure(self, engine: Any) -> Measured:
        """What the weights of now give. Every rank calls it, and gets the same."""
        names = self.mixture.task_names
        total = torch.zeros(2, len(names) + 1, device=engine.device, dtype=torch.float64)
        sums: dict[tuple[str, str], np.ndarray] = {}
        pictures: dict[str, np.ndarray] = {}
        model = engine.module.model
        engine.eval()
        for i in range(self.rounds):
            held = self.batches[i] if i < len(self.batches) else None
            batch = self._nothing if held is None else held.batch
            _, part, answers = engine(model.share(batch).to(engine.device), teacher_forced=True)
            total += part
            whole = _whole(answers, model.sequence_group)
            if held is not None and whole is not None:
                self._measure(held, whole, sums, pictures)
        engine.train()
        torch.distributed.all_reduce(total)
        nats, counts = total.tolist()
        bits = {n: nats[i] / counts[i] / math.log(2) for i, n in enumerate(names) if counts[i]}
        return _over_ranks(Measured(bits, pictures=pictures), sums, names)

    def _measure(
        self,
        held: HeldOut,
        answers: dict[str, tuple[np.ndarray, np.ndarray]],
        sums: dict[tuple[str, str], np.ndarray],
        pictures: dict[str, np.ndarray],
    ) -> None:
        for number, sample, span, drawn in spans(held, answers, self.mixture):
            task = self.mixture.task_names[sample.task]
            for name, value in values_of(span.stream).measure(span, self.tokenizers).items():
                sums[task, name] = sums.get((task, name), np.zeros(2)) + value
            shown = values_of(span.stream).draw(span, self.tokenizers) if number in held.shown else None
            if shown is not None:
                pictures[f"{task}/{number}" + (f".{drawn}" if drawn else "")] = shown


def spans(
    held: HeldOut, answers: dict[str, tuple[np.ndarray, np.ndarray]], mixture: Mixture
) -> Iterator[tuple[int, Sample, Span, int]]:
    """Every predicted segment of a batch with its answer: sample number, sample, span, place among its sample's.

    answers: by range, nats and codes (N,) in the order of the batch's targets.
    """
    done: Counter[str] = Counter()
    ranges = mixture.tokenizers.vocabulary.ranges
    for number, sample, sequence in zip(held.numbers, held.samples, held.sequences, strict=True):
        robot = mixture.shards[sample.source].plan.robot(sample.episode)
        for place, segment in enumerate(s for s in sequence.segments if s.predicted):
            name = stream_row(segment.stream).range
            stop = segment.stop - segment.padding
            at = slice(done[name], done[name] + stop - segment.start)
            done[name] = at.stop
            nats, codes = (values[at] for values in answers[name])
            true = sequence.ids[segment.start : stop] - ranges[name].start
            yield (
                number,
                sample,
                Span(stream=segment.stream, embodiment=robot, true=true, predicted=codes, nats=nats),
                place,
            )


def _whole(
    answers: dict[str, tuple[torch.Tensor, torch.Tensor]], group: Any
) -> dict[str, tuple[np.ndarray, np.ndarray]] | None:
    """The answers of a whole line, in its order: of all ranks that share it, on the first of them; None on others."""
    mine = {n: (nats.float().cpu().numpy(), codes.cpu().numpy()) for n, (nats, codes) in answers.items()}
    if group is None:
        return mine
    slices: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(slices, mine, group=group)
    if torch.distributed.get_rank(group) != 0:
        return None
    return {n: tuple(np.concatenate([s[n][i] for s in slices]) for i in (0, 1)) for n in mine}  # type: ignore[misc]


def _over_ranks(found: Measured, sums: dict[tuple[str, str], np.ndarray], names: list[str]) -> Measured:
    """The means over all ranks' sums, and all pictures, in the order of the tasks."""
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, (sums, found.pictures))
    total: dict[tuple[str, str], np.ndarray] = {}
    for part, _ in gathered:
        for key, value in part.items():
            total[key] = total.get(key, np.zeros(2)) + value
    means = {key: float(value[0] / value[1]) for key, value in total.items()}
    forced = {task: {m: v for (t, m), v in sorted(means.items()) if t == task} for task in names}
    pictures = {name: image for _, part in gathered for name, image in part.items()}
    return Measured(found.bits_per_token, {t: m for t, m in forced.items() if m}, dict(sorted(pictures.items())))
