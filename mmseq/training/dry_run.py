"""Dry run: what a recipe will cost, and everything that is wrong with it, before it costs GPU hours.

    mmseq train train/7b.yaml --dry-run --gpus 64 --gpu h100 --mfu 0.4

Builds the model without memory (on the meta device), reads tokenizers and the mix where they exist, and no data.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mmseq.errors import ConfigError, MMSeqError, did_you_mean, raise_all
from mmseq.layout import Layout
from mmseq.model.attention import BACKENDS
from mmseq.model.config import ModelConfig
from mmseq.model.transformer import Transformer
from mmseq.training.checkpoint import complete_checkpoints, require_same
from mmseq.training.config import TrainConfig
from mmseq.training.engine import deepspeed_settings
from mmseq.training.flops import find_gpu
from mmseq.training.memory import MemoryPart, rank_memory
from mmseq.training.start import identity_of, model_shape, open_mixture, require_start


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will be. days: None without a GPU. notes: what could not be looked at."""

    model: ModelConfig | None
    parameters: int
    parameters_without_embeddings: int
    tokens_per_step: int
    steps: int
    flops_per_token: float
    attention_flops: float
    memory: list[MemoryPart]
    world: int
    gpu: str | None
    peak_tflops: float | None
    mfu: float
    problems: list[MMSeqError]
    notes: list[str]

    @property
    def tokens(self) -> int:
        return self.tokens_per_step * self.steps

    @property
    def days(self) -> float | None:
        if self.peak_tflops is None:
            return None
        return self.tokens * self.flops_per_token / (self.world * self.peak_tflops * 1e12 * self.mfu) / 86400


def dry_run(config: TrainConfig, *, gpus: int, gpu: str | None = None, mfu: float = 0.4) -> Plan:
    """Plan a run on `gpus` ranks. gpu: a name of `GPUS`, in any case; None: CPUs.

    Raises: ConfigError for a GPU that is unknown, or a share or number that cannot be.
    """
    found = None if gpu is None else find_gpu(gpu)
    if gpus < 1 or not 0 < mfu <= 1:
        raise ConfigError(f"--gpus {gpus} --mfu {mfu} is no plan", fix="give at least 1 GPU, and a share up to 1")
    notes: list[str] = []
    problems = [*config.problems(gpus), *_other_problems(config, gpus, notes)]
    model = None
    try:
        model = recipe_model(config)
    except MMSeqError as error:
        if str(error) not in [str(p) for p in problems]:
            problems.append(error)
    parameters, inner = sizes(model) if model else (0, 0)
    memory = []
    if model and config.deepspeed.sequence_parallel > 0 and config.data.rows_per_pass > 0:
        try:
            settings = deepspeed_settings(config, gpus)
        except MMSeqError:  # it is among the problems
            settings = {}
        memory = rank_memory(config, model, parameters, gpus, settings, cpu=gpu is None)
    needed = sum(part.size for part in memory if not part.on_host) / 2**30
    room = found.gib if found else None
    if room and needed > room:
        problems.append(
            ConfigError(
                f"a rank needs {needed:.0f} GiB of its {gpu}, which has {room}",
                fix="set model.activation_checkpointing=true, raise deepspeed.zero_stage or lower data.rows_per_pass",
            )
        )
    elif room and needed > 0.85 * room:
        notes.append(f"{needed:.0f} of the {room} GiB of each {gpu} leave little for what is not counted")
    attention = attention_flops(model, config.data.row_tokens) if model else 0.0
    return Plan(
        model=model,
        parameters=parameters,
        parameters_without_embeddings=inner,
        tokens_per_step=config.data.row_tokens * config.data.rows_per_step,
        steps=config.steps,
        flops_per_token=6 * inner + attention,
        attention_flops=attention,
        memory=memory,
        world=gpus,
        gpu=gpu,
        peak_tflops=found.tflops if found else None,
        mfu=mfu,
        problems=problems,
        notes=notes,
    )


def recipe_model(config: TrainConfig) -> ModelConfig:
    """The recipe's model with its vocabulary: of the tokenizers where they exist, else `model.vocabulary`.

    Raises: ConfigError when neither says it.
    """
    from mmseq.tokenization.bundle import FILE, Tokenizers

    shape = model_shape(config)
    if (Path(config.data.tokenizers) / FILE).is_file():
        tokenizers = Tokenizers.load(config.data.tokenizers)
        model = shape.for_tokenizers(tokenizers)
    elif not shape.vocabulary:
        raise ConfigError(
            f"there are no tokenizers at data.tokenizers={config.data.tokenizers}, so the vocabulary is unknown",
            fix="train them, or pass model.vocabulary=65536",
        )
    else:
        model = replace(shape, merge=shape.merge or 2, slots=shape.slots or Layout((8, 8)).slot_rows)
    model.check()
    if config.init_from is not None:
        raise_all(replace(config, model=model).sharing_of_heads())
    return model


def sizes(model: ModelConfig | torch.nn.Module) -> tuple[int, int]:
    """Parameters, and those outside the tables of embeddings and the output matrix."""
    if isinstance(model, ModelConfig):
        with torch.device("meta"):
            model = Transformer(model)
    tables = ("embed.weight", "slots.weight", "head.weight")
    total = sum(p.numel() for p in model.parameters())
    return total, total - sum(p.numel() for n, p in model.named_parameters() if n.endswith(tables))


def attention_flops(model: ModelConfig, document_tokens: float) -> float:
    """FLOPs of attention for each token, forward and backward, in documents of so many tokens: scores and
    values are 2 FLOPs each per head, channel and token looked at, half the document on average, three times."""
    return 6 * model.layers * model.heads * model.head_size * document_tokens


def _other_problems(config: TrainConfig, world: int, notes: list[str]) -> Iterator[MMSeqError]:
    """What only the files that a recipe names can show, and what starts only later."""
    if config.model.attention not in ("auto", *BACKENDS):
        yield ConfigError(f"model.attention: {did_you_mean(config.model.attention, ['auto', *BACKENDS])}")
    if config.data.rows_per_step > 0 and config.data.rows_per_pass > 0:
        try:
            deepspeed_settings(config, world)
        except MMSeqError as error:
            yield error
    yield from _data_problems(config, notes)
    folder = _existing(Path(config.out))
    if folder is None or not os.access(folder, os.W_OK | os.X_OK):
        yield ConfigError(f"out={config.out} cannot be written here", fix="name a folder that can")
    warmup = config.optimizer.warmup_steps
    if warmup > max(1, config.steps // 10):
        notes.append(f"optimizer.warmup_steps={warmup} is shortened to a tenth of {config.steps} steps")


def _existing(folder: Path) -> Path | None:
    """The folder, or the closest above it that is there; None where a file is in the way."""
    found = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    return found if found.is_dir() else None


def _data_problems(config: TrainConfig, notes: list[str]) -> Iterator[MMSeqError]:
    """What tokenizers, mix, token shards and `init_from` say of each other, of those that are there."""
    from mmseq.data.mixture import load_mix
    from mmseq.tokenization.bundle import FILE, Tokenizers

    tokenizers = mix = None
    try:
        if (Path(config.data.tokenizers) / FILE).is_file():
            tokenizers = Tokenizers.load(config.data.tokenizers)
            require_start(config, tokenizers)
        else:
            notes.append(f"no tokenizers at data.tokenizers={config.data.tokenizers}")
    except MMSeqError as error:
        yield error
    try:
        if Path(config.data.mix).is_file():
            mix = load_mix(config.data.mix)
        else:
            notes.append(f"no mix at data.mix={config.data.mix}")
    except MMSeqError as error:
        yield error
    if mix is None:
        return
    missing = [name for name in mix.sources if not (Path(config.data.tokens) / name).is_dir()]
    if missing:
        notes.append(f"no token shards of {', '.join(missing)} at data.tokens={config.data.tokens}")
    elif tokenizers is not None:
        try:
            mixture = open_mixture(config, mix, tokenizers)
            if config.validate_every and not mixture.held_out().moments:
                notes.append("validate_every does nothing: the mix holds no episode out (holdout)")
            if found := complete_checkpoints(Path(config.out) / "checkpoints"):
                state = require_same(found[-1], identity_of(config, recipe_model(config), mixture))
                notes.append(f"goes on from {found[-1]}, step {state.step} of {config.steps}")
        except MMSeqError as error:
            yield error


def print_plan(plan: Plan) -> None:
    if plan.model is not None:
        m = plan.model
        print(
            f"parameters        {plan.parameters / 1e6:,.2f} M, "
            f"{plan.parameters_without_embeddings / 1e6:,.2f} M without embeddings (width {m.width}, "
            f"{m.layers} layers, vocabulary {m.vocabulary})"
        )
        print(f"tokens            {plan.tokens_per_step:,} a step, {plan.tokens:,} in {plan.steps:,} steps")
        print(
            f"GFLOP a token     {plan.flops_per_token / 1e9:.3g} = 6 x parameters without embeddings + "
            f"{plan.attention_flops / 1e9:.3g} of attention (6 layers H K L, at most: L is a whole row); the output "
            "matrix, which runs on predicted tokens alone, and recomputation are not in it"
        )
        kinds = (("of each GPU" if plan.gpu else "of each rank", False), ("of the host, each rank", True))
        for where, on_host in kinds:
            parts = [p for p in plan.memory if p.on_host == on_host]
            if parts:
                total = sum(p.size for p in parts)
                print(f"memory            {total / 2**30:.2f} GiB {where}; P parameters, W = {plan.world} ranks")
                for p in parts:
                    print(f"  {p.name:<18}{p.size / 2**30:9.2f} GiB = {p.formula}")
        if plan.days is not None:
            print(
                f"time              {plan.days:,.1f} days ({plan.days * 24:,.1f} hours) on {plan.world} {plan.gpu}, "
                f"assuming {plan.mfu:.0%} of {plan.peak_tflops:g} TFLOP/s (dense bf16, data sheet)"
            )
        else:
            print("time              name a GPU for an estimate: --gpu h100")
    for note in plan.notes:
        print(f"note: {note}")
