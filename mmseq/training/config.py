"""What a training run is: the recipe's schema. Defaults <- YAML <- `key=value`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from mmseq import plugins
from mmseq.errors import ConfigError, did_you_mean, raise_all
from mmseq.model.transformer import ModelConfig


@dataclass(kw_only=True)
class DataConfig:
    """What a run trains on, and in which portions."""

    mix: str = "???"  # a mix file
    tokens: str = "???"  # the folder that `mmseq data tokenize` wrote from it
    tokenizers: str = "???"  # the folder of the tokenizers that wrote them
    row_tokens: int = 2048  # length of a packed row
    # rows of one optimiser step over all ranks; the global batch does not depend on the number of ranks
    rows_per_step: int = 8
    rows_per_pass: int = 4  # rows that one rank puts through the model at once
    prefetch: int = 2  # steps built ahead
    workers: int = 0  # processes of each rank that build sequences; 0 builds them on a thread
    # so many samples of the whole run may be unreadable, each logged and left out, before the run stops
    max_bad_samples: int = 0


@dataclass(kw_only=True)
class OptimizerConfig:
    """Linear warm-up, then a cosine to `final_share` of the peak learning rates."""

    kind: str = "adamw"  # `adamw`, or `muon` for the matrices inside the layers (with AdamW for the rest)
    learning_rate: float = 1e-3  # peak of AdamW
    muon_learning_rate: float = 0.02  # peak of Muon
    beta1: float = 0.9  # AdamW's mean of gradients keeps this share of itself at a step
    beta2: float = 0.95  # and its mean of squared gradients this
    eps: float = 1e-8  # AdamW's, beside the root of the mean square
    weight_decay: float = 0.05  # of matrices: of every one with `adamw`, of those inside the layers with `muon`
    warmup_steps: int = 50  # steps of the linear warm-up; at most a tenth of the run
    final_share: float = 0.05  # of the peak learning rate, at the last step
    gradient_clip: float = 1.0  # largest norm of the whole gradient; 0 does not clip
    # decay of a moving average of the weights, which the finished model then has; 0 keeps none
    average_decay: float = 0.0


@dataclass(kw_only=True)
class DeepSpeedConfig:
    """What DeepSpeed does."""

    zero_stage: int = 1  # 0 to 3: what is split over the ranks
    # `fp32`, or `bf16` with fp32 master weights (autocast at stage 0, DeepSpeed's bf16 optimizer above)
    dtype: str = "bf16"
    settings: str | None = None  # a DeepSpeed JSON that is merged over what the recipe gives
    sequence_parallel: int = 1  # so many consecutive ranks share each line of tokens (Ulysses), for long video


@dataclass(kw_only=True)
class LoraConfig:
    """Adapters beside the matrices of the layers."""

    rank: int = 0  # of the adapters; 0 trains every weight
    alpha: float = 0.0  # what they learn is scaled by alpha / rank; 0 is the rank


@dataclass(kw_only=True)
class TrainConfig:
    """A training run. A step whose loss or gradient is not finite changes nothing."""

    name: str = "run"  # how loggers call the run
    out: str = "???"  # the run's folder
    seed: int = 0  # of the data order and of fresh weights
    steps: int = 1000  # optimiser steps
    # after the first steps the run measures its speed and shortens `steps` to fit; 0 is no limit
    max_minutes: float = 0.0
    stop_after: int = 0  # save and end after this step, to go on later with the same settings; 0 is never
    # a local directory to start from, a language model of Hugging Face or a checkpoint of ours, which decides the shape
    # of the model
    init_from: str | None = None
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    # loss weight of tokens by range (`vision: 0.3`), 1 where absent
    range_weights: dict[str, float] = field(default_factory=dict)
    log_every: int = 10  # steps between lines of the log
    save_every: int = 500  # steps between checkpoints to go on from
    keep_checkpoints: int = 2  # the newest that stay
    milestone_every: int = 0  # those at multiples of so many steps stay besides; 0: none
    # a step whose loss lies 6 standard deviations above the mean of the last 128 changes nothing either
    skip_spikes: bool = False
    compile: bool = False  # torch.compile what lies between attentions; may change when a run goes on
    max_skipped_in_a_row: int = 10  # more steps than these that changed nothing stop the run
    loggers: list[str] = field(default_factory=list)  # besides metrics.jsonl: `tensorboard`, `wandb`, `trackio`
    peak_tflops: float = 0.0  # of one rank, for MFU; 0 looks it up
    validate_every: int = 0  # steps between validations on held-out episodes; 0 is never
    validation_samples: int = 32  # held-out samples of each task

    def check(self, world_size: int) -> None:
        """Raises: ConfigError naming every field that cannot work."""
        raise_all(self.problems(world_size))

    def groups(self, world_size: int) -> int:
        """How many groups of ranks take rows of their own; the ranks of a group share each line of tokens."""
        return max(1, world_size // max(1, self.deepspeed.sequence_parallel))

    def problems(self, world_size: int) -> Iterator[ConfigError]:
        """Everything in the settings that cannot work on so many ranks."""
        at_least_one = ("steps", "log_every", "save_every", "keep_checkpoints", "validation_samples")
        yield from _below(self, 1, *at_least_one)
        yield from _below(self, 0, "seed", "max_minutes", "stop_after", "validate_every", "milestone_every")
        yield from _below(self, 0, "max_skipped_in_a_row", "peak_tflops")
        yield from _below(self.data, 1, "row_tokens", "rows_per_step", "rows_per_pass", "prefetch", prefix="data.")
        yield from _below(self.data, 0, "workers", "max_bad_samples", prefix="data.")
        # the tokenizers will decide what is 0
        model = replace(self.model, vocabulary=self.model.vocabulary or 1, merge=self.model.merge or 1)
        yield from model.problems()
        yield from _below(self.lora, 0, "rank", "alpha", prefix="lora.")
        if self.lora.rank and self.init_from is None:
            yield ConfigError("lora.rank needs init_from: adapters to fresh weights learn nothing", fix="set init_from")
        yield from self._engine_problems(world_size)
        yield from self._sharing_problems(world_size)
        o = self.optimizer
        for name in ("learning_rate", "muon_learning_rate", "eps"):
            if not (math.isfinite(getattr(o, name)) and getattr(o, name) > 0):
                yield ConfigError(f"optimizer.{name} must be positive, got {getattr(o, name)}")
        for name in ("weight_decay", "warmup_steps", "final_share", "gradient_clip"):
            if not (math.isfinite(getattr(o, name)) and getattr(o, name) >= 0):
                yield ConfigError(f"optimizer.{name} must not be negative, got {getattr(o, name)}")
        for name in ("beta1", "beta2", "average_decay"):
            if not 0 <= getattr(o, name) < 1:
                yield ConfigError(f"optimizer.{name} must be in [0, 1), got {getattr(o, name)}")
        for name in self.loggers:
            if name not in plugins.names("loggers"):
                yield ConfigError(f"loggers names {name!r}: {did_you_mean(name, plugins.names('loggers'))}")
        if not math.isfinite(self.max_minutes):
            yield ConfigError(f"max_minutes must be a number, got {self.max_minutes}", fix="0 is no limit")
        if not math.isfinite(self.lora.alpha):
            yield ConfigError(f"lora.alpha must be finite, got {self.lora.alpha}")
        if not 0 <= self.seed < 1 << 62:
            yield ConfigError(f"seed must be in [0, 2^62), got {self.seed}")
        for name, most in (("row_tokens", 1 << 24), ("prefetch", 1024), ("workers", 1024)):
            if getattr(self.data, name) > most:
                yield ConfigError(f"data.{name} is {getattr(self.data, name)}", fix=f"use at most {most}")
        for name, weight in self.range_weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                yield ConfigError(f"range_weights.{name} must not be negative, got {weight}")

    def _engine_problems(self, world_size: int) -> Iterator[ConfigError]:
        d, ranks = self.deepspeed, self.deepspeed.sequence_parallel
        if d.zero_stage not in (0, 1, 2, 3):
            yield ConfigError(f"deepspeed.zero_stage must be 0, 1, 2 or 3, got {d.zero_stage}")
        if d.dtype not in ("bf16", "fp32"):
            yield ConfigError(f"deepspeed.dtype must be bf16 or fp32, got {d.dtype!r}")
        if self.compile and d.zero_stage == 3:
            yield ConfigError(
                "compile=true needs the weights of a whole layer at once, ZeRO 3 gathers them part by part",
                fix="set compile=false or deepspeed.zero_stage=2",
            )
        if self.optimizer.kind not in ("adamw", "muon"):
            yield ConfigError(f"optimizer.kind must be adamw or muon, got {self.optimizer.kind!r}")
        if self.optimizer.kind == "muon" and self.lora.rank:
            yield ConfigError("optimizer.kind=muon does not train adapters", fix="set optimizer.kind=adamw with lora")
        if self.optimizer.kind == "muon" and d.zero_stage:
            yield ConfigError(
                f"optimizer.kind=muon needs whole matrices, ZeRO {d.zero_stage} splits them",
                fix="set deepspeed.zero_stage=0 or optimizer.kind=adamw",
            )
        if ranks < 1:
            yield ConfigError(f"deepspeed.sequence_parallel must be at least 1, got {ranks}")
            return
        if world_size % ranks:
            yield ConfigError(
                f"deepspeed.sequence_parallel {ranks} does not divide {world_size} ranks", fix="use a divisor"
            )
        if self.init_from is None:
            yield from self.sharing_of_heads()

    def sharing_of_heads(self) -> Iterator[ConfigError]:
        """Whether the ranks that share a line can share its heads; of a run with init_from once the model is known."""
        if self.model.heads % self.deepspeed.sequence_parallel:
            yield ConfigError(
                f"deepspeed.sequence_parallel {self.deepspeed.sequence_parallel} does not divide model.heads "
                f"{self.model.heads}",
                fix="ranks that share a line share its heads, so use a divisor of model.heads",
            )

    def _sharing_problems(self, world_size: int) -> Iterator[ConfigError]:
        d, groups = self.data, self.groups(world_size)
        if d.rows_per_step < 1 or d.rows_per_pass < 1:
            return
        if d.rows_per_step % groups:
            takers = f"{groups} ranks" if groups == world_size else f"{groups} groups of ranks"
            yield ConfigError(
                f"data.rows_per_step {d.rows_per_step} cannot be shared by {takers}", fix=f"use a multiple of {groups}"
            )
            return
        each = d.rows_per_step // groups
        if each % min(d.rows_per_pass, each):
            yield ConfigError(
                f"data.rows_per_pass {d.rows_per_pass} does not divide the {each} rows of each rank",
                fix="use a divisor",
            )

    def rate_share(self, step: int, steps: int) -> float:
        """The share of the peak rate at step 0 .. steps - 1: a pure function, so nothing of it is saved."""
        o = self.optimizer
        warmup = min(o.warmup_steps, max(1, steps // 10))
        if step < warmup:
            return (step + 1) / warmup
        share = (step - warmup) / max(1, steps - warmup)
        return o.final_share + (1 - o.final_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def _below(settings: Any, least: int, *names: str, prefix: str = "") -> Iterator[ConfigError]:
    for name in names:
        if not getattr(settings, name) >= least:
            rule = f"be at least {least}" if least else "not be negative"
            yield ConfigError(f"{prefix}{name} must {rule}, got {getattr(settings, name)}")
