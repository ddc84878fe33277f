"""The transformer: decoder-only, RMSNorm, RoPE, SwiGLU, grouped-query attention, QK-norm.

Two ways through the same weights: `forward` over a packed line of tokens (training, T axis) and
`extend` over a static key/value cache (decoding, B x S axes). Block for block it is Qwen3's layout,
so weights map to and from Hugging Face checkpoints (`families.py`).

Axes: T packed tokens, B sequences, S new tokens of each, D width, H query heads, G key/value
heads, K head size, C cache length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmseq.inputs import ModelInput
from mmseq.model.attention import Documents, repeat_heads
from mmseq.model.config import ModelConfig
from mmseq.model.rope import rope_table, rotate
from mmseq.model.sequence_parallel import attend

EMBED_STD = 0.02 * math.sqrt(2)
SLOT_STD = 0.02
# of a code's vector: mostly shared, a little of its own; 0.9^2 + 0.4^2 is about 1, so that it keeps its length
SHARED, OWN = 0.9, 0.4


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019), computed in fp32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


@dataclass
class Cache:
    """Static key/value cache of B sequences, C positions each. A token's place is its position."""

    keys: list[Tensor]  # per layer (B, G, C, K)
    values: list[Tensor]

    @property
    def batch(self) -> int:
        return self.keys[0].shape[0]

    @property
    def length(self) -> int:
        return self.keys[0].shape[2]

    @classmethod
    def empty(
        cls, config: ModelConfig, batch: int, length: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> Cache:
        make = lambda: torch.zeros(batch, config.kv_heads, length, config.head_size, dtype=dtype, device=device)
        return cls([make() for _ in range(config.layers)], [make() for _ in range(config.layers)])


class Attention(nn.Module):
    """The weights of attention; `Layer` attends. rope: whether queries and keys are rotated."""

    def __init__(self, config: ModelConfig, *, rope: bool):
        super().__init__()
        self.config, self.rope = config, rope
        H, G, K = config.heads, config.kv_heads, config.head_size
        self.qkv = nn.Linear(config.width, (H + 2 * G) * K, bias=config.qkv_bias)
        self.out = nn.Linear(H * K, config.width, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(K, config.norm_eps)
            self.k_norm = RMSNorm(K, config.norm_eps)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., D) -> q (..., H, K), k and v (..., G, K), normed and rotated."""
        c = self.config
        q, k, v = self.qkv(x).unflatten(-1, (-1, c.head_size)).split([c.heads, c.kv_heads, c.kv_heads], dim=-2)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if not self.rope:
            return q, k, v
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def extend(
        self, x_BSD: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, at: Tensor, mask: Tensor
    ) -> Tensor:
        q_BSHK, k_BSGK, v_BSGK = self.project(x_BSD, cos, sin)
        rows = torch.arange(len(at), device=at.device)[:, None]
        keys[rows, :, at] = k_BSGK
        values[rows, :, at] = v_BSGK
        C = mask.shape[-1]
        heads = self.config.heads
        k, v = repeat_heads(keys[:, :, :C], heads), repeat_heads(values[:, :, :C], heads)
        out = F.scaled_dot_product_attention(q_BSHK.transpose(1, 2), k, v, attn_mask=mask[:, None])
        return self.out(out.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020); gate and up are one matrix."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.mlp, bias=False)
        self.down = nn.Linear(config.mlp, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config, rope=config.has_rope(index))
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, documents: Documents, backend: str) -> Tensor:
        q, k, v = self.before(x, cos, sin)
        return self.after(x, attend(q, k, v, documents, backend))

    def before(self, x_TD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys, values. Neither this nor `after` depends on where documents end, so both can be compiled."""
        return self.attention.project(self.attention_norm(x_TD), cos, sin)

    def after(self, x_TD: Tensor, attended_THK: Tensor) -> Tensor:
        x_TD = x_TD + self.attention.out(attended_THK.flatten(-2))
        return x_TD + self.mlp(self.mlp_norm(x_TD))

    def extend(
        self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, at: Tensor, mask: Tensor
    ) -> Tensor:
        x = x + self.attention.extend(self.attention_norm(x), cos, sin, keys, values, at, mask)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Token ids to hidden states; `output_rows` is the part of the output matrix that belongs to some ids.

    While it trains, the vector of a code is a row of its own plus a learned projection of the code's
    features (`learn_codes`): what is learned of one code serves the codes that mean nearly the same.
    Saved weights hold the sum.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        config.check()
        self.config = config
        self.embed = nn.Embedding(config.vocabulary, config.width)
        if config.slot_embeddings:
            self.slots = nn.Embedding(config.slots, config.width)
        if config.merge > 1:
            self.merge = nn.Linear(config.merge**2 * config.width, config.width, bias=False)
        if config.soft:
            self.soft = nn.Linear(config.soft, config.width, bias=False)
        if config.copying:
            self.copied = nn.Linear(config.width, config.width, bias=False)
            self.copy_gate = nn.Linear(config.width, 1, bias=False)
        self.code_projection: nn.Linear | None = None
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        if not config.tie_embeddings:
            self.head = nn.Linear(config.width, config.vocabulary, bias=False)

    def learn_codes(self, features: Float[Tensor, "C F"], *, seed: int | None = None) -> None:
        """Share what is learned between codes, in a model that does not yet.

        features: for each of the last C ids of the vocabulary a row of unit length, or zeros. seed: of the
        projection; None begins with zeros, which changes no vector.
        """
        assert self.code_projection is None
        projection = nn.Linear(features.shape[1], self.config.width, bias=False)
        with torch.no_grad():
            if seed is None:
                projection.weight.zero_()
            else:
                generator = torch.Generator().manual_seed(seed)
                projection.weight.copy_(torch.randn(projection.weight.shape, generator=generator) * SHARED * EMBED_STD)
                self.embed.weight[-len(features) :][features.any(1)] *= OWN
        self.code_projection = projection.to(self.embed.weight)
        rows = F.pad(features, (0, 0, 1, 0)).to(self.embed.weight)  # row 0 is for ids that are no codes
        self.register_buffer("code_features", rows, persistent=False)

    def code_vectors(self) -> Tensor | None:
        """What codes have from their features (1 + C, D), row 0 being zeros; None when they have nothing from them.

        Made once per pass and handed to `forward` and `output_rows`: ranks must use the projection equally often.
        """
        if self.code_projection is None:
            return None
        # DeepSpeed makes weights bf16 and leaves buffers as they are
        return self.code_projection(self.code_features.to(self.code_projection.weight.dtype))

    def plain_state(self) -> dict[str, Tensor]:
        """The weights as they are saved: without the projection, which the rows of codes take up."""
        state = {k: v.detach().cpu() for k, v in self.state_dict().items() if not k.startswith("code_projection")}
        if self.code_projection is not None:
            with torch.no_grad():
                codes = self.code_vectors()[1:].cpu()  # type: ignore[index]
            for name in ("embed.weight", "head.weight"):
                if name in state:
                    state[name] = torch.cat([state[name][: -len(codes)], state[name][-len(codes) :] + codes])
        return {k: v.contiguous() for k, v in state.items()}

    def embed_tokens(self, ids: Tensor, codes: Tensor | None) -> Tensor:
        x = self.embed(ids)
        if codes is None:
            return x
        return x + F.embedding((ids - self._before_codes(codes)).clamp_min(0), codes)

    def output_rows(self, start: int, stop: int, codes: Tensor | None) -> Tensor:
        """Rows start .. stop - 1 of the output matrix: those of one range. codes: `code_vectors`."""
        weight = self.embed.weight if self.config.tie_embeddings else self.head.weight
        if codes is None or stop <= self._before_codes(codes) + 1:
            return weight[start:stop]
        before = self._before_codes(codes)
        assert start > before
        return weight[start:stop] + codes[start - before : stop - before]

    def _before_codes(self, codes: Tensor) -> int:
        """The id before the first code."""
        return self.config.vocabulary - len(codes)

    def initialise(self, seed: int) -> None:
        """Normal weights, zero biases; residual outputs are scaled down by depth (GPT-2)."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in self.named_parameters():
                if name.endswith(".bias"):
                    p.zero_()
                if p.dim() < 2:
                    continue
                p.copy_(torch.randn(p.shape, generator=generator) * self.initial_std(name, p))

    def initial_std(self, name: str, matrix: Tensor) -> float:
        if name.startswith("slots"):
            return SLOT_STD
        if name.startswith("copy_gate"):
            return 0.0
        if name.startswith("embed"):
            return EMBED_STD
        std = 1 / math.sqrt(matrix.shape[1])
        return std / math.sqrt(2 * self.config.layers) if name.endswith(("out.weight", "down.weight")) else std

    def inputs(self, line: ModelInput, codes: Tensor | None) -> Tensor:
        """Input vectors (T, D): embeddings, merged vision and features in their places, slots, what may be copied.

        Every layer runs for every batch, on nothing where a batch has nothing for it: ranks must gather and
        reduce the same weights.
        """
        x = self.embed_tokens(line.ids, codes)
        if self.config.merge > 1:
            merged = self.merge(self.embed_tokens(line.patch_ids, codes).flatten(1))
            x = x.index_copy(0, line.patch_at, merged.to(x.dtype))
        if self.config.soft:
            x = x.index_copy(0, line.soft_at, self.soft(line.soft.to(self.soft.weight.dtype)).to(x.dtype))
        if self.config.slot_embeddings:
            x = x + self.slots(line.slots).sum(1)
        if self.config.copying:
            copied = self.copied(self.embed_tokens(line.copy_ids, codes))
            x = x.index_add(0, line.copy_at, copied.to(x.dtype))
        return x

    def forward(
        self,
        line: ModelInput,
        codes: Float[Tensor, "C D"] | None,
        documents: Documents,
        backend: str = "document",
    ) -> Float[Tensor, "T D"]:
        """Hidden states after the last norm, attention within each document. codes: `code_vectors`."""
        x = self.inputs(line, codes)
        cos, sin = rope_table(line.positions, self.config, x.dtype)
        for layer in self.layers:
            if self.config.activation_checkpointing and self.training:
                x = checkpoint(layer, x, cos, sin, documents, backend, use_reentrant=False)
            else:
                x = layer(x, cos, sin, documents, backend)
        return self.norm(x)

    def extend(self, x_BSD: Tensor, positions_BS: Tensor, cache: Cache, longest: int) -> Float[Tensor, "B S D"]:
        """Hidden states of new tokens given the cache, which they are added to.

        Each token sees the cache up to its own position, so sequences of different lengths can
        share a batch: what lies beyond is padding that later tokens overwrite.
        longest: one more than the largest position.
        """
        cos, sin = rope_table(positions_BS, self.config, x_BSD.dtype)
        mask = torch.arange(longest, device=x_BSD.device)[None, None] <= positions_BS[:, :, None]
        for layer, keys, values in zip(self.layers, cache.keys, cache.values):
            x_BSD = layer.extend(x_BSD, cos, sin, keys, values, positions_BS, mask)  # type: ignore[operator]
        return self.norm(x_BSD)
