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
    copies: tuple[Int[Tensor, " N"], Float[Tensor, " N"]] | None = None,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Per position: negative log-likelihood in nats, and what is minimised (with z-loss added).

    z-loss (PaLM, Chowdhery et al. 2022) keeps the log-partition near zero. C codes in the range.
    copies: a code per position and what is added to its logit (see `add_copies`).
    """
    rows = max(1, CHUNK_ELEMENTS // weight_CD.shape[0])
    if len(hidden_ND) <= rows:
        return _chunk(z_weight, hidden_ND, weight_CD, target_N, *(copies or ()))
    parts = [
        checkpoint(
            *(_chunk, z_weight, hidden_ND[p], weight_CD, target_N[p], *(c[p] for c in copies or ())),
            use_reentrant=False,
        )
        for p in (slice(i, i + rows) for i in range(0, len(hidden_ND), rows))
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])  # type: ignore[index]


def add_copies(
    logits_NC: Float[Tensor, "N C"], codes_N: Int[Tensor, " N"], gate_N: Float[Tensor, " N"]
) -> Float[Tensor, "N C"]:
    """Raise the logit of the code that a position may copy, by as much as the model decides.

    A pointer in the sense of CopyNet (Gu et al. 2016): codes that were never seen in training can be
    repeated, and what has to be learned of a video is what changes.
    """
    return logits_NC.scatter_add(1, codes_N[:, None], gate_N[:, None])


def _chunk(
    z_weight: float, hidden_ND: Tensor, weight_CD: Tensor, target_N: Tensor, *copies: Tensor
) -> tuple[Tensor, Tensor]:
    logits_NC = (hidden_ND @ weight_CD.t()).float()
    if copies:
        logits_NC = add_copies(logits_NC, *copies)
    nll = F.cross_entropy(logits_NC, target_N, reduction="none")
    if not z_weight:
        return nll, nll
    return nll, nll + z_weight * logits_NC.logsumexp(-1).square()
