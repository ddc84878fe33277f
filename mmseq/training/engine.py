"""The engine: the objective that DeepSpeed runs, and the settings it gets from a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmseq.errors import ConfigError, did_you_mean
from mmseq.model.sequence_model import SequenceModel
from mmseq.packing import Batch
from mmseq.training.config import TrainConfig
from mmseq.training.optimizer import build_optimizer

RECIPES_OWN = ("optimizer", "scheduler", "fp16", "amp", "elasticity", "curriculum_learning", "tensor_parallel")
SECTIONS = (
    *("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping"),
    *("zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "bf16", "steps_per_print"),
    *("communication_data_type", "prescale_gradients", "gradient_predivide_factor", "sparse_gradients", "aio"),
    *("comms_logger", "flops_profiler", "wall_clock_breakdown", "memory_breakdown", "dump_state", "timers"),
    *("activation_checkpointing", "data_types", "torch_autocast", "compile", "use_data_before_expert_parallelism"),
)


def deepspeed_settings(config: TrainConfig, world: int) -> dict[str, Any]:
    """What DeepSpeed is told: what the recipe says, with its file of settings laid over it.

    Raises: ConfigError when the file is no JSON object, or contradicts the recipe.
    """
    rows = max(1, config.data.rows_per_step // config.groups(world))
    portions = max(1, rows // min(config.data.rows_per_pass, rows))
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": portions,
        "train_batch_size": portions * world,
        # at stage 0 the loop clips, after it has seen that the gradients are finite
        "gradient_clipping": config.optimizer.gradient_clip if config.deepspeed.zero_stage else 0.0,
        "zero_optimization": {"stage": config.deepspeed.zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {
            "enabled": config.deepspeed.dtype == "bf16" and config.deepspeed.zero_stage > 0,
            "check_grad_overflow": True,
        },
        "steps_per_print": 1 << 40,
    }
    if config.deepspeed.settings:
        try:
            given = json.loads(Path(config.deepspeed.settings).read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"deepspeed.settings {config.deepspeed.settings}: {error}") from error
        if not isinstance(given, dict):
            raise ConfigError(f"deepspeed.settings {config.deepspeed.settings} holds no JSON object")
        for key in given:
            if key not in SECTIONS:
                hint = "the recipe decides it" if key in RECIPES_OWN else did_you_mean(key, SECTIONS)
                raise ConfigError(f"{config.deepspeed.settings} sets {key!r}: {hint}", fix="take it out")
        _merge(settings, given, where=config.deepspeed.settings)
    return settings


def build_engine(deepspeed: Any, config: TrainConfig, objective: Objective, world: int) -> Any:
    settings = deepspeed_settings(config, world)
    optimizer = build_optimizer(config.optimizer, objective.model)
    try:
        engine, *_ = deepspeed.initialize(
            model=objective, optimizer=optimizer, config=settings, dist_init_required=False
        )
    except (ValueError, AssertionError, TypeError, KeyError, deepspeed.DeepSpeedConfigError) as error:  # pydantic's too
        raise ConfigError(f"DeepSpeed refuses its settings: {error}") from error
    if config.deepspeed.zero_stage == 3:
        # the loss reads slices of the output matrix outside the module that owns it
        transformer = objective.model.transformer
        owner = transformer.embed if config.model.tie_embeddings else transformer.head
        deepspeed.zero.register_external_parameter(objective, owner.weight)
    return engine


def _merge(settings: dict[str, Any], given: dict[str, Any], *, where: str, prefix: str = "") -> None:
    """Lay a user's DeepSpeed settings over the recipe's; what the recipe decides may not contradict it."""
    for key, value in given.items():
        mine = settings.get(key)
        if isinstance(mine, dict) and isinstance(value, dict):
            _merge(mine, value, where=where, prefix=f"{prefix}{key}.")
        elif mine is not None and mine != value:
            raise ConfigError(f"{where} sets {prefix}{key}={value!r}, the recipe {mine!r}", fix="set it in the recipe")
        else:
            settings[key] = value


class Objective(nn.Module):
    """What DeepSpeed runs: a packed batch to the loss and its statistics.

    Returns (the sum of weighted losses (), nats and counts (2, tasks + 1)); the last column holds the
    weighted nats. Always these two tensors, whatever ranges a batch predicts: with ZeRO 3 each output
    that carries a gradient gathers weights on its way back, so ranks must have equally many.
    teacher_forced: a third value, for validation: per range the nats (N,) and the codes (N,) of
    `SequenceModel.teacher_forced`, without gradient. autocast: compute in bf16; entered here because
    DeepSpeed leaves an outer one on a GPU.
    """

    def __init__(self, model: SequenceModel, tasks: int, range_weights: dict[str, float], *, autocast: bool):
        super().__init__()
        self.model, self.tasks, self.range_weights, self.autocast = model, tasks, range_weights, autocast

    def weight(self, range_name: str) -> float:
        return self.range_weights.get(range_name, 1.0)

    def targets(self, batches: list[Batch]) -> float:
        """How many tokens batches predict, weighted by range."""
        return sum(self.weight(name) * len(at) for b in batches for name, (at, _, _) in b.targets.items())

    def forward(self, batch: Batch, *, teacher_forced: bool = False) -> tuple[Any, ...]:
        if teacher_forced:
            return self._teacher_forced(batch)
        loss = torch.zeros((), device=batch.input.ids.device)
        sums = self._sums(batch)
        with self._precision(batch):
            groups = self.model.losses(batch)
        for name, (nats, total, task) in groups.items():
            loss = loss + self.weight(name) * total
            self._add(sums, name, nats, task)
        return loss, sums

    def _teacher_forced(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, tuple[Tensor, Tensor]]]:
        sums = self._sums(batch)
        with self._precision(batch):
            groups = self.model.teacher_forced(batch)
        for name, (nats, _, task) in groups.items():
            self._add(sums, name, nats, task)
        return sums[0, -1], sums, {name: (nats, codes) for name, (nats, codes, _) in groups.items()}

    def _precision(self, batch: Batch) -> Any:
        return torch.autocast(batch.input.ids.device.type, torch.bfloat16, enabled=self.autocast)

    def _sums(self, batch: Batch) -> Tensor:
        return torch.zeros(2, self.tasks + 1, device=batch.input.ids.device, dtype=torch.float64)

    def _add(self, sums: Tensor, name: str, nats: Tensor, task: Tensor) -> None:
        nats = nats.double()
        sums[0].index_add_(0, task, nats)
        sums[1].index_add_(0, task, torch.ones_like(nats))
        sums[0, -1] += self.weight(name) * nats.sum()
