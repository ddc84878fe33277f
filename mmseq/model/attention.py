"""Causal attention inside each document of a packed line of tokens, by several backends that agree.

- `document`  the reference and the CPU path: documents of similar length are gathered into one
              padded block and multiplied there. Padding comes last, so the causal mask hides it.
- `sdpa`      the same blocks through torch's scaled_dot_product_attention.
- `flex`      torch FlexAttention with a document mask (GPU, compiled).
- `flash`     flash-attn's variable-length kernel (GPU, bf16 or fp16, when the package imports).
- `varlen`    the same kernel as torch 2.10 and later bring it (GPU from sm_80 on, bf16 or fp16).

Axes: T tokens, H query heads, G key/value heads, K head size, N documents in a block, L its length.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mmseq.errors import ConfigError, DependencyError

BACKENDS = ("document", "sdpa", "flex", "flash", "varlen")
HALF_ONLY = ("flash", "varlen")
FLEX_BLOCK = 128  # tokens that FlexAttention masks as one
_BUCKET = 16  # documents whose lengths agree up to this many tokens share a block


@dataclass
class Block:
    """Documents of similar length: where their tokens are in the line, and back."""

    gather: Int[Tensor, "N L"]
    keep: Int[Tensor, " kept"]  # flat N * L indices of real tokens
    put: Int[Tensor, " kept"]  # where those belong in the line


@dataclass
class Documents:
    """The document structure of one batch, prepared once for all layers."""

    lengths: list[int]
    device: torch.device

    @functools.cached_property
    def blocks(self) -> list[Block]:
        groups: dict[int, list[tuple[int, int]]] = {}
        start = 0
        for length in self.lengths:
            groups.setdefault(-(-length // _BUCKET), []).append((start, length))
            start += length
        blocks = []
        for members in groups.values():
            starts = torch.tensor([s for s, _ in members])
            lengths = torch.tensor([n for _, n in members])
            place = torch.arange(int(lengths.max()))
            gather = starts[:, None] + torch.minimum(place[None], lengths[:, None] - 1)
            keep = (place[None] < lengths[:, None]).flatten().nonzero().flatten()
            put = gather.flatten()[keep]
            blocks.append(Block(gather.to(self.device), keep.to(self.device), put.to(self.device)))
        return blocks

    @functools.cached_property
    def order(self) -> Int[Tensor, " T"]:
        """For each token of the line, its place in the blocks' real tokens laid end to end."""
        put = torch.cat([b.put for b in self.blocks])
        order = torch.empty_like(put)
        order[put] = torch.arange(len(put), device=self.device)
        return order

    @functools.cached_property
    def boundaries(self) -> Int[Tensor, " N1"]:
        """cu_seqlens: int32, 0 and the running sum of lengths."""
        total = torch.tensor([0, *self.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return total.to(self.device)

    @functools.cached_property
    def document_of_token(self) -> Int[Tensor, " T"]:
        lengths = torch.tensor(self.lengths, device=self.device)
        return torch.repeat_interleave(torch.arange(len(lengths), device=self.device), lengths)

    @functools.cached_property
    def flex_mask(self):
        """Which blocks of keys each block of queries sees, from the lengths alone: `create_block_mask` would build
        the mask of every query and key, 180 GB for a line of 131,072 tokens."""
        from torch.nn.attention.flex_attention import BlockMask

        document = self.document_of_token

        def mask(b, h, q, k):
            return (q >= k) & (document[q] == document[k])

        size, block = len(document), FLEX_BLOCK
        count = -(-size // block)
        starts = np.repeat(np.cumsum([0, *self.lengths[:-1]]), self.lengths)  # of the document of each token
        index = np.arange(count)
        first = starts[index * block] // block  # the first block that any query of a block sees
        whole = -(-starts[np.minimum(index * block + block, size) - 1] // block)  # the first that all see all of
        whole = np.clip(whole, first, index)
        partly = (whole - first + 1).astype(np.int32)  # blocks first .. whole - 1, and that of the queries
        order = np.arange(count)[None] + first[:, None]
        order = np.where(order < whole[:, None], order, index[:, None]).astype(np.int32)
        full = (whole[:, None] + np.arange(count)[None]).clip(max=count - 1).astype(np.int32)
        move = lambda a: torch.from_numpy(np.ascontiguousarray(a)).to(self.device)[None, None]
        return BlockMask.from_kv_blocks(
            move(partly),
            move(order),
            move((index - whole).astype(np.int32)),
            move(full),
            BLOCK_SIZE=block,
            mask_mod=mask,
            seq_lengths=(size, size),
        )


def choose_backend(device: torch.device | str, requested: str = "auto", *, half: bool = True) -> tuple[str, str]:
    """The backend that will run and why. half: whether it computes in bf16 or fp16, without which two cannot.

    Raises: ConfigError for an unknown name or one that has no fp32, DependencyError when the requested one cannot run.
    """
    kind = torch.device(device).type
    if requested == "auto":
        if kind == "cpu":
            return "document", "CPU: batched matrix products beat scaled_dot_product_attention in bf16"
        if _flash_attention() is not None:
            return ("flash", "flash-attn imports") if half else ("flex", "flash-attn has no fp32")
        return "flex", "flash-attn is not installed; FlexAttention is part of torch"
    if requested not in BACKENDS:
        raise ConfigError(
            f"attention backend {requested!r} is unknown", fix=f"use auto or one of {', '.join(BACKENDS)}"
        )
    missing = why_not(requested, device)
    if missing:
        fix = "set model.attention=auto"
        raise DependencyError(
            f"the {requested} attention backend needs {missing}",
            fix=f"install it with: pip install 'mmseq[flash]', or {fix}" if requested == "flash" else fix,
        )
    if requested in HALF_ONLY and not half:
        raise ConfigError(f"the {requested} attention backend has no fp32", fix="use bf16, or model.attention=flex")
    return requested, "requested"


def why_not(backend: str, device: torch.device | str) -> str | None:
    """What a backend lacks on a device; None when it can run there."""
    on_gpu = torch.device(device).type == "cuda"
    if backend == "flash" and not (on_gpu and _flash_attention() is not None):
        return "a GPU and the flash-attn package"
    if backend == "varlen" and _varlen_attention() is None:
        return "torch 2.10 or later"
    if backend == "varlen" and not (on_gpu and torch.cuda.get_device_capability(device) >= (8, 0)):
        return "a GPU of compute capability 8.0 or later"
    return None


@functools.cache
def _flash_attention():
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

        return flash_attn_varlen_func
    except ImportError:
        return None


@functools.cache
def _varlen_attention() -> Callable[..., Any] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    since_2_11 = "window_size" in inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if since_2_11 else {"is_causal": True}
    return functools.partial(varlen_attn, **causal)


@functools.cache
def _flex_attention(compiled: bool):
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention


def attend(
    q_THK: Float[Tensor, "T H K"],
    k_TGK: Float[Tensor, "T G K"],
    v_TGK: Float[Tensor, "T G K"],
    documents: Documents,
    backend: str = "document",
) -> Float[Tensor, "T H K"]:
    """Causal attention within each document."""
    q_THK, k_TGK = q_THK.to(v_TGK.dtype), k_TGK.to(v_TGK.dtype)  # under autocast norms and RoPE leave them in fp32
    if backend in HALF_ONLY:
        longest = max(documents.lengths)
        bounds = documents.boundaries
        if backend == "flash":
            function = _flash_attention()
            assert function is not None
            return function(q_THK, k_TGK, v_TGK, bounds, bounds, longest, longest, causal=True)
        function = _varlen_attention()
        assert function is not None
        k_THK, v_THK = (
            repeat_heads(x.transpose(0, 1)[None], q_THK.shape[1])[0].transpose(0, 1) for x in (k_TGK, v_TGK)
        )
        return function(q_THK, k_THK, v_THK, bounds, bounds, longest, longest)
    if backend == "flex":
        if not q_THK.is_cuda and torch.is_grad_enabled() and q_THK.requires_grad:
            raise ConfigError("the flex attention backend cannot train on a CPU", fix="set model.attention=auto")
        run = _flex_attention(q_THK.is_cuda)
        q, k, v = (x.transpose(0, 1)[None] for x in (q_THK, k_TGK, v_TGK))
        out = run(q, k, v, block_mask=documents.flex_mask, enable_gqa=q.shape[1] != k.shape[1])
        return out[0].transpose(0, 1)
    inner = _matmul_attention if backend == "document" else _sdpa_attention
    parts = []
    _T, H, K = q_THK.shape
    for block in documents.blocks:
        N, L = block.gather.shape
        index = block.gather.flatten()
        q, k, v = (x.index_select(0, index).view(N, L, -1, K).transpose(1, 2) for x in (q_THK, k_TGK, v_TGK))
        out = inner(q, k, v).transpose(1, 2).reshape(N * L, H, K)
        parts.append(out if len(block.keep) == N * L else out.index_select(0, block.keep))
    return torch.cat(parts).index_select(0, documents.order)


def _matmul_attention(q_NHLK: Tensor, k_NGLK: Tensor, v_NGLK: Tensor) -> Tensor:
    k_NHLK, v_NHLK = (repeat_heads(x, q_NHLK.shape[1]) for x in (k_NGLK, v_NGLK))
    L = q_NHLK.shape[2]
    scores = (q_NHLK * (1 / math.sqrt(q_NHLK.shape[3]))) @ k_NHLK.transpose(-1, -2)
    scores = scores + _causal_bias(L, scores.dtype, scores.device)
    return scores.softmax(-1) @ v_NHLK


def _sdpa_attention(q_NHLK: Tensor, k_NGLK: Tensor, v_NGLK: Tensor) -> Tensor:
    grouped = q_NHLK.shape[1] != k_NGLK.shape[1]
    return F.scaled_dot_product_attention(q_NHLK, k_NGLK, v_NGLK, is_causal=True, enable_gqa=grouped)


def _causal_bias(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # a slice of one triangle: as many triangles as there are lengths would fill the memory
    return _triangle(1 << max(6, (length - 1).bit_length()), dtype, device)[:length, :length]


@functools.lru_cache(maxsize=8)
def _triangle(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((size, size), float("-inf"), dtype=dtype, device=device).triu(1)


def repeat_heads(x_NGLK: Tensor, heads: int) -> Tensor:
    """Repeat key/value heads so that each query head has its own."""
    groups = x_NGLK.shape[1]
    return x_NGLK if groups == heads else x_NGLK.repeat_interleave(heads // groups, dim=1)


def documents_of(lengths: Sequence[int], device: torch.device | str) -> Documents:
    return Documents(list(lengths), torch.device(device))
