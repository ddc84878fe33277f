"""LoRA (Hu et al. 2021) with peft: small matrices beside those of the layers are trained, the rest stays.

The finished model has them merged, so that it is an ordinary checkpoint.
"""

from __future__ import annotations

from typing import Any

import torch

from mmseq.errors import require
from mmseq.model.sequence_model import SequenceModel
from mmseq.training.config import LoraConfig

TARGETS = ["qkv", "out", "gate_up", "down"]


def add_adapters(model: SequenceModel, config: LoraConfig, *, seed: int = 0) -> None:
    """Freeze `model` and give the matrices of its layers adapters. Raises: DependencyError without peft."""
    peft = require("peft", "lora")
    settings = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha or config.rank, target_modules=TARGETS)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):  # peft draws from the global generator
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(settings, model.transformer)


def merge_adapters(model: SequenceModel) -> None:
    """Add what the adapters learned to the matrices beside them, and remove them."""
    layers = require("peft.tuners.lora", "lora").LoraLayer
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, layers):
                adapted: Any = child
                adapted.merge()
                setattr(parent, name, adapted.get_base_layer())
    for parameter in model.parameters():
        parameter.requires_grad_(True)
