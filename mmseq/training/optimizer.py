"""Optimizers: AdamW, or Muon for the matrices inside the layers with AdamW for everything else.

Muon (Jordan et al. 2024) orthogonalises the momentum of each matrix. On the demo's mix 100 steps of
it reach what AdamW reaches after about 200 (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mmseq.training.config import OptimizerConfig


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a recipe. Every group has `peak`, its highest learning rate."""
    named = list(model.named_parameters())
    matrices = [p for n, p in named if p.dim() == 2 and config.kind == "muon" and is_hidden_matrix(n)]
    hidden = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in hidden]
    decay = config.weight_decay
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": decay if config.kind == "adamw" else 0.0},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.eps)
    if config.kind == "adamw":
        return _with_peaks(adamw)
    muon = torch.optim.Muon(matrices, lr=config.muon_learning_rate, weight_decay=decay, momentum=0.95)
    return _with_peaks(MuonWithAdamW(muon, adamw))


def is_hidden_matrix(name: str) -> bool:
    """Matrices inside the layers, and those that vision enters by; embeddings and the head are not."""
    return any(part in name for part in (".layers.", ".merge.", ".copied."))


def _with_peaks(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for group in optimizer.param_groups:
        group["peak"] = group["lr"]
    return optimizer


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimizers behind the interface of one; their groups and states are shared with it."""

    def __init__(self, muon: torch.optim.Optimizer, adamw: torch.optim.Optimizer):
        self.parts = (muon, adamw)
        super().__init__([{"params": [p for part in self.parts for g in part.param_groups for p in g["params"]]}], {})
        self._share()

    def _share(self) -> None:
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "a closure is not supported"
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share()
