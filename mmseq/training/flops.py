"""FLOPs of training, and the peak that model FLOPs utilisation (MFU, PaLM, Chowdhery et al. 2022) is taken of."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mmseq.errors import ConfigError, did_you_mean
from mmseq.model.transformer import ModelConfig
from mmseq.packing import Batch
from mmseq.vocabulary import Vocabulary


class Gpu(NamedTuple):
    """tflops: dense bf16, and gb_per_s: of the memory, of the data sheet. gib: memory that a process can have."""

    tflops: float
    gib: int
    gb_per_s: int


# By what torch calls the GPU; the first name that fits counts. Of an A100 the larger of the two that are sold.
GPUS = {
    "GB200": Gpu(2500.0, 184, 8000),
    "B200": Gpu(2250.0, 178, 8000),
    "GH200": Gpu(989.0, 94, 4000),
    "H200": Gpu(989.0, 140, 4800),
    "H100 PCIe": Gpu(756.0, 79, 2000),
    "H100 NVL": Gpu(835.0, 93, 3900),
    "H100": Gpu(989.0, 79, 3350),
    "A100": Gpu(312.0, 79, 2039),
    "L40S": Gpu(362.0, 44, 864),
    "RTX 4090": Gpu(165.0, 23, 1008),
}


def layer_parameters(config: ModelConfig) -> int:
    """Parameters of the matrices of one layer."""
    attention = config.width * (2 * config.heads + 2 * config.kv_heads) * config.head_size
    return attention + 3 * config.width * config.mlp


def training_flops(batch: Batch, config: ModelConfig, vocabulary: Vocabulary) -> float:
    """Forward and backward of one batch: 6 per weight and token, causal attention within each document, and
    the output matrix only where and over what the tasks predict. Padding and recomputation do not count."""
    lengths = batch.lengths[:-1] if batch.used_tokens < batch.tokens else batch.lengths
    layers = config.layers * (
        2 * layer_parameters(config) * batch.used_tokens
        + 2 * config.heads * config.head_size * sum(n * n for n in lengths)
    )
    merged = 2 * batch.input.patch_ids.numel() * config.width**2 if config.merge > 1 else 0
    outputs = sum(2 * len(at) * vocabulary.ranges[r].size * config.width for r, (at, _, _) in batch.targets.items())
    return 3.0 * (layers + merged + outputs)


def peak_tflops(device: torch.device) -> tuple[float | None, str]:
    """The peak of this device in TFLOP/s, and what it is called; None where the data sheets say nothing."""
    if device.type != "cuda":
        return None, "CPU"
    name = torch.cuda.get_device_name(device)
    gpu = gpu_called(name)
    return gpu.tflops if gpu else None, name


def gpu_called(name: str) -> Gpu | None:
    """By what torch calls it; None where the data sheets say nothing."""
    return next((gpu for part, gpu in GPUS.items() if part in name), None)


def find_gpu(name: str) -> Gpu:
    """By its name in any case, with dashes for spaces. Raises: ConfigError for a GPU that the table lacks."""
    known = {key.lower().replace(" ", "-"): gpu for key, gpu in GPUS.items()}
    if name.lower() not in known:
        raise ConfigError(f"--gpu {name!r} is unknown: {did_you_mean(name.lower(), known)}")
    return known[name.lower()]
