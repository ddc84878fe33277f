"""Validation: what the model loses on held-out episodes, by task."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from mmseq.data.mixture import Mixture, Sample
from mmseq.packing import Batch, collate
from mmseq.tokenization.bundle import Tokenizers
from mmseq.training.config import TrainConfig


def validation_batches(config: TrainConfig, mixture: Mixture, tokenizers: Tokenizers) -> list[Batch]:
    """The same held-out samples each time, in batches of at most the tokens that a pass of training has."""
    limit = config.data.row_tokens * config.data.rows_per_pass
    out = []
    for stream in mixture.streams:
        count = min(config.validation_samples, len(stream))
        places = [round(i * (len(stream) - 1) / max(1, count - 1)) for i in range(count)]
        samples = [stream.moment(p) for p in places]
        for chosen in _within(samples, limit):
            sequences = [mixture.build(s) for s in chosen]
            out.append(collate(sequences, tokenizers.vocabulary, tasks=[s.task for s in chosen]))
    return out


def _within(samples: list[Sample], limit: int) -> Iterator[list[Sample]]:
    """Samples in order, as many together as have at most `limit` tokens, at least one."""
    group: list[Sample] = []
    for sample in samples:
        if group and sum(s.length for s in group) + sample.length > limit:
            yield group
            group = []
        group.append(sample)
    if group:
        yield group


@torch.no_grad()
def validate(engine: Any, batches: list[Batch], names: list[str]) -> dict[str, float]:
    """Held-out bits per token by task."""
    engine.eval()
    total = torch.zeros(2, len(names) + 1, device=engine.device, dtype=torch.float64)
    model = engine.module.model
    for batch in batches:
        _, sums = engine(model.share(batch).to(engine.device))
        total += sums
    engine.train()
    if model.sequence_group is not None:
        torch.distributed.all_reduce(total, group=model.sequence_group)
    nats, counts = total.tolist()
    return {n: nats[i] / counts[i] / math.log(2) for i, n in enumerate(names) if counts[i]}
