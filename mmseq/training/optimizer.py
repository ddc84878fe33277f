"""Optimizers: AdamW, or Muon for the matrices inside the layers with AdamW for everything else.

Muon (Jordan et al. 2024) orthogonalises the momentum of each matrix. On the demo's mix 100 steps of
it reach what AdamW reaches after about 200 (docs/log.md).

Both can skip an update and keep an average of the weights. They do so inside `step`, because ZeRO calls it
on its own flat shards: what happens here happens to every shard alike, whatever the stage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmseq.training.config import OptimizerConfig

AVERAGE = "average"  # the key of the averaged weights in an optimizer's state


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> AdamW | MuonWithAdamW:
    """The optimizer of a recipe. Every group has `peak`, its highest learning rate."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [p for n, p in named if p.dim() == 2 and config.kind == "muon" and is_hidden_matrix(n)]
    hidden = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in hidden]
    decay = config.weight_decay
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": decay if config.kind == "adamw" else 0.0},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    adamw = AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.eps)
    if config.kind == "adamw":
        made = adamw
    else:
        muon = torch.optim.Muon(matrices, lr=config.muon_learning_rate, weight_decay=decay, momentum=0.95)
        made = MuonWithAdamW(muon, adamw)
    for group in made.param_groups:
        group["peak"] = group["lr"]
    made.average_decay = config.average_decay
    return made


def is_hidden_matrix(name: str) -> bool:
    """Matrices inside the layers, and those that vision enters by; embeddings and the head are not."""
    return any(part in name for part in (".layers.", ".merge.", ".copied."))


class _Averaging:
    """What the training loop sets before a step. skip: leave everything as it is.

    updates: how many were made before. average_decay: of an exponential moving average of the weights, 0
    keeps none. It begins fast, at (1 + updates) / (10 + updates), so that the first weights are soon forgotten.
    """

    skip: bool = False
    updates: int = 0
    average_decay: float = 0.0

    @torch.no_grad()
    def _average(self, parameters: list[Tensor], state: Any) -> None:
        if not self.average_decay:
            return
        share = 1 - min(self.average_decay, (1 + self.updates) / (10 + self.updates))
        for p in parameters:
            if p.grad is None:
                continue
            if AVERAGE not in state[p]:
                state[p][AVERAGE] = p.detach().clone()
            state[p][AVERAGE].lerp_(p, share)


class AdamW(_Averaging, torch.optim.AdamW):
    """torch's AdamW (Loshchilov & Hutter 2019) that can skip a step and average the weights."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if self.skip:
            return
        super().step(closure)
        self._average([p for group in self.param_groups for p in group["params"]], self.state)

    def state_of(self, parameter: Tensor) -> dict[str, Any]:
        return self.state[parameter]


class MuonWithAdamW(_Averaging, torch.optim.Optimizer):
    """Two optimizers behind the interface of one; their groups and states are shared with it."""

    def __init__(self, muon: torch.optim.Optimizer, adamw: torch.optim.Optimizer):
        self.parts = (muon, adamw)
        super().__init__([{"params": [p for part in self.parts for g in part.param_groups for p in g["params"]]}], {})
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self._part_of = {p: part for part in self.parts for g in part.param_groups for p in g["params"]}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "a closure is not supported"
        if self.skip:
            return
        for part in self.parts:
            part.step()
            self._average([p for group in part.param_groups for p in group["params"]], part.state)

    def state_of(self, parameter: Tensor) -> dict[str, Any]:
        return self._part_of[parameter].state[parameter]
