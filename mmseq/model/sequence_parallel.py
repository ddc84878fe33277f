"""Ulysses sequence parallelism (Jacobs et al. 2023): several ranks share one line of tokens.

Each of N ranks keeps T / N consecutive tokens and runs embeddings, norms, MLPs and the loss on them alone.
Attention needs whole documents, but heads are independent of each other: an exchange turns (T / N, all
heads) into (T, H / N heads) and back, so each rank attends over the whole line with its share of the heads.

Axes: T tokens of the line, t = T / N those of a rank, N ranks, H query heads, G key/value heads, h = H / N,
g = G / N, K head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmseq.model import attention
from mmseq.model.attention import Documents
from mmseq.packing import Batch


def share(batch: Batch, index: int, parts: int, *, pad: int) -> Batch:
    """The `index`-th of `parts` equal slices of a line of tokens.

    Documents keep their whole lengths; positions and targets count from the slice's first token. A line
    that cannot be divided gets one more padding document, of the token `pad`. Every slice has the ranges
    of the whole line, with no targets where it has none: ranks must use the same weights.
    """
    assert batch.parts == 1, "a slice cannot be shared again"
    spare = -batch.tokens % parts
    size = (batch.tokens + spare) // parts
    first, last = index * size, (index + 1) * size

    def of_slice(at: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        mine = (at >= first) & (at < last)
        return at[mine] - first, *(x[mine] for x in others)

    return replace(
        batch,
        input=batch.input.padded(batch.tokens + spare, pad).cut(first, last),
        lengths=[*batch.lengths, spare] if spare else batch.lengths,
        targets={name: of_slice(*group) for name, group in batch.targets.items()},  # type: ignore[misc]
        parts=parts,
    )


@dataclass
class SharedDocuments(Documents):
    """The documents of a whole line whose tokens lie on the ranks of `group`, in their order."""

    group: Any = None


def documents_across(batch: Batch, device: torch.device, group: Any) -> Documents:
    """The documents of a batch; `group` holds the line when the batch is a slice of it."""
    if batch.parts == 1:
        return Documents(batch.lengths, device)
    assert group is not None
    return SharedDocuments(batch.lengths, device, group)


def attend(
    q_THK: Float[Tensor, "T H K"],
    k_TGK: Float[Tensor, "T G K"],
    v_TGK: Float[Tensor, "T G K"],
    documents: Documents,
    backend: str = "document",
) -> Float[Tensor, "T H K"]:
    """Causal attention within each document, over the ranks that share the line when there are several."""
    if not isinstance(documents, SharedDocuments):
        return attention.attend(q_THK, k_TGK, v_TGK, documents, backend)
    group = documents.group
    parts, dtype = torch.distributed.get_world_size(group), v_TGK.dtype
    H, G = q_THK.shape[1], k_TGK.shape[1]
    if G % parts:  # fewer key/value heads than ranks: ranks get copies
        repeats = math.lcm(G, parts) // G
        k_TGK, v_TGK = (x.repeat_interleave(repeats, 1) for x in (k_TGK, v_TGK))
        G *= repeats
    # one exchange for all three: rank n gets the n-th share of the heads of each
    shares = [x.to(dtype).unflatten(1, (parts, -1)) for x in (q_THK, k_TGK, v_TGK)]
    received = _Exchange.apply(torch.cat(shares, 2).transpose(0, 1).contiguous(), group)  # N, t, h + 2g, K
    q, k, v = received.flatten(0, 1).split([H // parts, G // parts, G // parts], 1)
    out_ThK = attention.attend(q, k, v, documents, backend)
    received = _Exchange.apply(out_ThK.unflatten(0, (parts, -1)).contiguous(), group)  # N, t, h, K
    return received.transpose(0, 1).flatten(1, 2)


class _Exchange(torch.autograd.Function):
    """Row n of (N, ...) goes to rank n, and row n of the result came from rank n; gradients go the same way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        out = torch.empty_like(x)
        torch.distributed.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous()
        out = torch.empty_like(gradient)
        torch.distributed.all_to_all_single(out, gradient, group=ctx.group)
        return out, None
