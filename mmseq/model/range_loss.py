"""Range loss: cross entropy only where the task predicts, only over the segment's own range.

Hidden states of predicted positions are gathered per range and multiplied with that slice of the
output matrix, in chunks, so neither full logits nor positions without loss are ever computed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 1 << 24  # logits alive at once: 64 MiB in fp32


def range_losses(
    hidden_ND: Float[Tensor, "N D"],
    weight_CD: Float[Tensor, "C D"],
    target_N: Int[Tensor, " N"],
    z_weight: float = 0.0,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Per position: negative log-likelihood in nats, and what is minimised (with z-loss added).

    z-loss (PaLM, Chowdhery et al. 2022) keeps the log-partition near zero. C codes in the range.
    """
    rows = max(1, CHUNK_ELEMENTS // weight_CD.shape[0])
    if len(hidden_ND) <= rows:
        return _chunk(hidden_ND, weight_CD, target_N, z_weight)
    parts = [
        checkpoint(_chunk, hidden_ND[i : i + rows], weight_CD, target_N[i : i + rows], z_weight, use_reentrant=False)
        for i in range(0, len(hidden_ND), rows)
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])  # type: ignore[index]


def _chunk(hidden_ND: Tensor, weight_CD: Tensor, target_N: Tensor, z_weight: float) -> tuple[Tensor, Tensor]:
    logits_NC = (hidden_ND @ weight_CD.t()).float()
    nll = F.cross_entropy(logits_NC, target_N, reduction="none")
    if not z_weight:
        return nll, nll
    return nll, nll + z_weight * logits_NC.logsumexp(-1).square()
