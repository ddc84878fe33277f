"""FLOPs of training, and the peak that model FLOPs utilisation (MFU, PaLM, Chowdhery et al. 2022) is taken of."""

from __future__ import annotations

import torch

from mmseq.model.transformer import ModelConfig
from mmseq.packing import Batch
from mmseq.vocabulary import Vocabulary

# Dense bf16 TFLOP/s from the vendors' data sheets, by what torch calls the GPU.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.0,
}


GPU_GIB = {  # memory that a process can have; of an A100 the larger of the two that are sold
    "B200": 178,
    "H200": 140,
    "H100 PCIe": 79,
    "H100 NVL": 93,
    "H100": 79,
    "A100": 79,
    "L40S": 44,
    "RTX 4090": 23,
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
    merged = 2 * batch.patch_ids.numel() * config.width**2 if config.merge > 1 else 0
    outputs = sum(2 * len(at) * vocabulary.ranges[r].size * config.width for r, (at, _, _) in batch.targets.items())
    return 3.0 * (layers + merged + outputs)


def peak_tflops(device: torch.device) -> tuple[float | None, str]:
    """The peak of this device in TFLOP/s, and what it is called; None where the data sheets say nothing."""
    if device.type != "cuda":
        return None, "CPU"
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None), name
