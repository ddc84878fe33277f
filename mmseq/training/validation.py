"""Validation: what the model loses on held-out episodes, by task."""

from __future__ import annotations

import math
from typing import Any

import torch

from mmseq.data.mixture import Mixture
from mmseq.packing import Batch, collate
from mmseq.tokenization.bundle import Tokenizers
from mmseq.training.config import TrainConfig


def validation_batches(config: TrainConfig, mixture: Mixture, tokenizers: Tokenizers) -> list[Batch]:
    """The same held-out samples each time, one batch per task."""
    out = []
    for stream in mixture.streams:
        count = min(config.validation_samples, len(stream))
        places = [round(i * (len(stream) - 1) / max(1, count - 1)) for i in range(count)]
        samples = [stream.moment(p) for p in places]
        sequences = [mixture.build(s) for s in samples]
        out.append(collate(sequences, tokenizers.vocabulary, tasks=[s.task for s in samples]))
    return out


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
