"""Range loss: cross entropy only where the task predicts, only over the segment's own range.

Hidden states of predicted positions are gathered per range and multiplied with that slice of the
output matrix, some of its columns at a time. Neither full logits nor positions without loss are ever
computed: of N x C logits, a tile of 4 MiB or of 256 columns is alive. Gradients are made in the
forward pass, while the tile is there, so backward only scales them (as in Liger's fused linear cross
entropy, Hsu et al. 2024; tiles of columns are those of Cut Cross-Entropy, Wijmans et al. 2024).

Axes: N predicted positions, D width, C codes of the range, c codes of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE_ELEMENTS = 1 << 20  # logits alive at once, 4 MiB in fp32: a CPU's cache holds them, `mmseq bench loss` measures it
GPU_TILE_ELEMENTS = 1 << 23  # 32 MiB, so that a GPU is not kept waiting by the starts of small kernels
TILE_COLUMNS = 256  # but at least so many columns of them, for matrix products that are worth their start


def range_loss(
    hidden_ND: Float[Tensor, "N D"],
    weight_CD: Float[Tensor, "C D"],
    target_N: Int[Tensor, " N"],
    z_weight: float = 0.0,
    copies: tuple[Int[Tensor, " N"], Float[Tensor, " N"]] | None = None,
) -> tuple[Float[Tensor, " N"], Float[Tensor, ""]]:
    """Negative log-likelihood of each position in nats, without gradient, and the sum that is minimised.

    The sum adds the z-loss (PaLM, Chowdhery et al. 2022), z_weight times the squared log-partition, which
    keeps that near zero. copies: a code per position and what is added to its logit (see `add_copies`).
    Logits are multiplied in the dtype of autocast, else of the arguments; sums are at least fp32.
    """
    codes_N, gate_N = copies or (None, None)
    if not torch.is_grad_enabled():  # which autograd functions do not see
        hidden_ND, weight_CD, gate_N = (
            hidden_ND.detach(),
            weight_CD.detach(),
            None if gate_N is None else gate_N.detach(),
        )
    return _RangeLoss.apply(hidden_ND, weight_CD, target_N, z_weight, codes_N, gate_N)  # type: ignore[return-value]


def add_copies(
    logits_NC: Float[Tensor, "N C"], codes_N: Int[Tensor, " N"], gate_N: Float[Tensor, " N"]
) -> Float[Tensor, "N C"]:
    """Raise the logit of the code that a position may copy, by as much as the model decides.

    A pointer in the sense of CopyNet (Gu et al. 2016): codes that were never seen in training can be
    repeated, and what has to be learned of a video is what changes.
    """
    return logits_NC.scatter_add(1, codes_N[:, None], gate_N[:, None])


class _Tile:
    """Columns first .. last - 1 of the logits. What lies in other columns is masked, which needs no synchronisation."""

    def __init__(self, first: int, last: int):
        self.first, self.last = first, last

    def place(self, codes_N: Tensor) -> tuple[Tensor, Tensor]:
        """Of a code per row: its column (N, 1), and whether it is here (N, 1)."""
        at_N1 = (codes_N - self.first)[:, None]
        here_N1 = (at_N1 >= 0) & (at_N1 < self.last - self.first)
        return at_N1.clamp(0, self.last - self.first - 1), here_N1

    def rows(self, weight_CD: Tensor) -> Tensor:
        return weight_CD[self.first : self.last]

    def logits(
        self, hidden_ND: Tensor, weight_CD: Tensor, codes_N: Tensor | None, gate_N: Tensor | None, room: _Room
    ) -> Tensor:
        """(N, c), in at least fp32. hidden_ND: in the dtype to multiply in."""
        product_Nc = room.product_Nc[:, : self.last - self.first]
        torch.mm(hidden_ND, self.rows(weight_CD).to(hidden_ND.dtype).t(), out=product_Nc)
        logits_Nc = room.logits_Nc[:, : self.last - self.first]
        if logits_Nc.dtype != product_Nc.dtype:
            logits_Nc.copy_(product_Nc)
        if codes_N is not None and gate_N is not None:
            at_N1, here_N1 = self.place(codes_N)
            logits_Nc.scatter_add_(1, at_N1, gate_N[:, None].to(logits_Nc.dtype) * here_N1)
        return logits_Nc


class _Room:
    """Memory of one tile after the other; freed and taken again, an allocator would keep more of it.

    product_Nc in the dtype to multiply in, logits_Nc in at least fp32: one tensor where that is the same.
    """

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device):
        self.product_Nc = torch.empty(rows, columns, dtype=dtype, device=device)
        sums = _sum_type(dtype)
        self.logits_Nc = self.product_Nc if sums == dtype else torch.empty(rows, columns, dtype=sums, device=device)


def _tiles(rows: int, columns: int, device: torch.device) -> Iterator[_Tile]:
    elements = TILE_ELEMENTS if device.type == "cpu" else GPU_TILE_ELEMENTS
    count = -(-columns // max(TILE_COLUMNS, elements // max(1, rows)))
    width = -(-columns // count)
    return (_Tile(first, min(first + width, columns)) for first in range(0, columns, width))


def _sum_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _RangeLoss(torch.autograd.Function):
    """`_loss` as one step of autograd: its second output is differentiable, once."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_CD: Tensor,
        target_N: Tensor,
        z_weight: float,
        codes_N: Tensor | None,
        gate_N: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        kind = hidden_ND.device.type
        dtype = torch.promote_types(hidden_ND.dtype, weight_CD.dtype)
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
        wanted = tuple(ctx.needs_input_grad[i] for i in (0, 1, 5))
        with torch.autocast(kind, enabled=False):
            nats_N, total, ctx.gradients = _loss(
                hidden_ND, weight_CD, target_N, z_weight, codes_N, gate_N, dtype=dtype, wanted=wanted
            )
        ctx.mark_non_differentiable(nats_N)
        return nats_N, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, scale: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.gradients, "the gradients of a range loss can be taken once"
        hidden_ND, weight_CD, gate_N = (None if g is None else g.mul_(scale) for g in ctx.gradients)
        ctx.gradients = ()
        return hidden_ND, weight_CD, None, None, None, gate_N


def _loss(
    hidden_ND: Tensor,
    weight_CD: Tensor,
    target_N: Tensor,
    z_weight: float,
    codes_N: Tensor | None,
    gate_N: Tensor | None,
    *,
    dtype: torch.dtype,
    wanted: tuple[bool, ...],
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """Nats (N,), the sum that is minimised, and the gradients of hidden, weight and gate that are `wanted`.

    Two passes over the tiles: the log-partition of each row, then softmax minus one-hot and what follows from it.
    The second makes each tile again, unless there is only one. So each row of the weight's gradient is written
    once, from all N positions; over tiles of rows it would be read and written as often as there are tiles.
    """
    half_ND, sums = hidden_ND.to(dtype), _sum_type(dtype)
    tiles = list(_tiles(len(target_N), len(weight_CD), hidden_ND.device))
    top_N = torch.full(target_N.shape, float("-inf"), dtype=sums, device=hidden_ND.device)
    sum_N, aim_N = torch.zeros_like(top_N), torch.zeros_like(top_N)
    room = _Room(len(target_N), max((t.last - t.first for t in tiles), default=0), dtype, hidden_ND.device)
    exp_Nc = room.logits_Nc
    for tile in tiles:
        exp_Nc = tile.logits(half_ND, weight_CD, codes_N, gate_N, room)
        at_N1, here_N1 = tile.place(target_N)
        aim_N += (exp_Nc.gather(1, at_N1) * here_N1).squeeze(1)
        before_N, top_N = top_N, torch.maximum(top_N, exp_Nc.amax(1))
        sum_N = sum_N * (before_N - top_N).exp() + exp_Nc.sub_(top_N[:, None]).exp_().sum(1)
    partition_N = top_N + sum_N.log()
    nats_N = partition_N - aim_N
    total = nats_N.sum() + z_weight * partition_N.square().sum()
    if not any(wanted):
        return nats_N, total, ()

    to_hidden_ND = torch.zeros_like(hidden_ND, dtype=sums)
    to_weight_CD = torch.empty_like(weight_CD)
    to_gate_N = torch.zeros_like(top_N)
    share_N1 = ((1 + 2 * z_weight * partition_N) / sum_N)[:, None]
    for tile in tiles:
        if len(tiles) > 1:
            exp_Nc = tile.logits(half_ND, weight_CD, codes_N, gate_N, room).sub_(top_N[:, None]).exp_()
        at_N1, here_N1 = tile.place(target_N)
        slope_Nc = exp_Nc.mul_(share_N1).scatter_add_(1, at_N1, -here_N1.to(sums))  # of the total by the logits
        if codes_N is not None:
            at_N1, here_N1 = tile.place(codes_N)
            to_gate_N += (slope_Nc.gather(1, at_N1) * here_N1).squeeze(1)
        if slope_Nc.dtype != dtype:
            slope_Nc = room.product_Nc[:, : tile.last - tile.first].copy_(slope_Nc)
        if wanted[0]:
            _add_product(to_hidden_ND, slope_Nc, tile.rows(weight_CD).to(dtype))
        if wanted[1]:
            tile.rows(to_weight_CD).copy_(slope_Nc.t() @ half_ND)
    found = (to_hidden_ND, to_weight_CD, to_gate_N)
    return nats_N, total, tuple(g if w else None for g, w in zip(found, wanted))


def _add_product(sum_ND: Tensor, a_Nc: Tensor, b_cD: Tensor) -> None:
    if sum_ND.dtype == a_Nc.dtype:
        sum_ND.addmm_(a_Nc, b_cD)
    else:  # products of halves are summed in fp32
        sum_ND += a_Nc @ b_cD
