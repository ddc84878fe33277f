"""Rotary position embedding (Su et al. 2021) in the half-split layout that Hugging Face uses."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmseq.model.config import ModelConfig


def rope_frequencies(config: ModelConfig, device: torch.device | str = "cpu") -> Tensor:
    """Radians per position, fp32 (K / 2,), operation for operation as transformers computes them."""
    places = torch.arange(0, config.head_size, 2, device=device, dtype=torch.float32)
    frequencies = 1.0 / config.rope_theta ** (places / config.head_size)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # over the original context
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return (1 - keep) * frequencies / scaling.factor + keep * frequencies


def rope_table(positions: Tensor, config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (..., 1, K / 2) for positions (...), with a head axis to broadcast over."""
    angle = positions.float()[..., None, None] * rope_frequencies(config, positions.device)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
