"""Train: one loop, read top to bottom.

    mmseq train train/demo.yaml                                       one process
    torchrun --nproc-per-node 2 -m mmseq train train/demo.yaml        two ranks
    mmseq train train/demo.yaml steps=20 out=runs/try                 a laptop try

The run's folder: `config.yaml` (resolved), `command.txt`, `metrics.jsonl`, `checkpoints/` to resume
from, and `checkpoint/`, the finished model. Running the same command again resumes.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmseq.config import to_yaml
from mmseq.data.mixture import Mixture, load_mix, save_mix, task_name
from mmseq.data.shards import replace_folder
from mmseq.errors import ConfigError, MMSeqError, require
from mmseq.model.attention import choose_backend
from mmseq.model.sequence_model import SequenceModel
from mmseq.packing import Batch, collate
from mmseq.tokenization.bundle import Tokenizers
from mmseq.training import checkpoint as checkpoints
from mmseq.training.config import TrainConfig
from mmseq.training.loader import steps as loader_steps
from mmseq.training.logging import RunLog
from mmseq.training.optimizer import build_optimizer

SPEED_STEPS = 40  # steps measured before max_minutes decides the length of the run


def train(config: TrainConfig) -> Path:
    """Run `config` to its end, resuming what is there; returns the folder of the finished model.

    Raises: MMSeqError before any training when something in the configuration or data is wrong.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    config.check(world)
    out = Path(config.out)
    tokenizers = Tokenizers.load(config.data.tokenizers)
    mix = load_mix(config.data.mix)
    make = lambda split: Mixture(
        mix, config.data.tokens, tokenizers, row_tokens=config.data.row_tokens, seed=config.seed, split=split
    )
    mixture = make("train")
    for stream in mixture.streams:
        longest = max(stream.longest(), key=lambda sample: sample.length)
        if longest.length > config.data.row_tokens:
            raise ConfigError(
                f"{mixture.provenance(longest)} has {longest.length} tokens, a row has {config.data.row_tokens}",
                fix="raise data.row_tokens or shorten the task",
            )
    unknown = set(config.range_weights) - set(tokenizers.vocabulary.ranges)
    if unknown:
        raise ConfigError(f"range_weights names unknown ranges: {', '.join(sorted(unknown))}")

    deepspeed = _start_deepspeed(world)
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu")
    barrier = torch.distributed.barrier
    model = SequenceModel.new(config.model, tokenizers, seed=config.seed)
    size = model.parameters_count  # ZeRO 3 leaves each rank a share
    backend, why = choose_backend(device, config.model.attention, half=config.deepspeed.dtype == "bf16")
    mixed = config.deepspeed.dtype == "bf16" and config.deepspeed.zero_stage == 0
    objective = Objective(model, len(mixture.task_names), dict(config.range_weights), autocast=mixed)
    engine = _engine(deepspeed, config, objective, world)
    identity = {
        "seed": config.seed,
        "mix": to_yaml(mix),
        "tokens": {name: shards.reader.manifest["index"]["sha256"] for name, shards in mixture.shards.items()},
        "tokenizers": tokenizers.fingerprints(),
        "model": model.config.to_dict(),
        "engine": [config.optimizer.kind, config.deepspeed.zero_stage, config.deepspeed.dtype],
        "ranks": world if config.deepspeed.zero_stage else None,  # DeepSpeed's shards are per rank
        "rows": [config.data.row_tokens, config.data.rows_per_step],
    }
    found = checkpoints.complete_checkpoints(out / "checkpoints")
    state = checkpoints.RunState(steps=config.steps)
    if found:
        settings = [{k: v for k, v in g.items() if k != "params"} for g in engine.optimizer.param_groups]
        state = checkpoints.load(engine, found[-1], identity)
        for group, current in zip(engine.optimizer.param_groups, settings):
            group.update(current)  # the recipe decides the rates and the decay, not what was saved
        if not state.fitted:
            state.steps = config.steps
        if state.step > state.steps:
            raise ConfigError(
                f"{found[-1]} is at step {state.step}, beyond steps={state.steps}",
                fix="raise steps, or use another out=",
            )
    if rank == 0:  # only now: a run that is refused must not touch what an earlier one wrote
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.yaml").write_text(to_yaml(config))
        (out / "command.txt").write_text(shlex.join(sys.argv) + "\n")
    barrier()
    log = RunLog(out, mixture.task_names, total=state.steps, enabled=rank == 0, after=state.step)
    log.say(
        f"{size / 1e6:.2f} M parameters, vocabulary {len(tokenizers.vocabulary)}, {world} rank(s), ZeRO "
        f"{config.deepspeed.zero_stage}, {config.deepspeed.dtype}, attention {backend} ({why})"
        + (f", resumed at step {state.step}" if found else "")
    )
    rows = config.data.rows_per_step
    rows_per_pass = min(config.data.rows_per_pass, rows // world)
    data = loader_steps(
        mixture,
        state.data,
        rows_per_step=rows,
        rows_per_pass=rows_per_pass,
        rank=rank,
        world=world,
        prefetch=config.data.prefetch,
    )
    validation = _validation_batches(config, make("holdout"), tokenizers) if config.validate_every else []
    started = time.perf_counter() - state.seconds
    timed: list[float] = []
    last = min(state.steps, config.stop_after or state.steps)
    while state.step < last:
        waited = time.perf_counter()
        step_data = next(data)
        began = time.perf_counter()
        share = config.rate_share(state.step, state.steps)
        for group in engine.optimizer.param_groups:
            group["lr"] = group["peak"] * share
        record = _step(engine, objective, step_data.passes, world, device)
        if not math.isfinite(record["loss"]):
            named = "; ".join(mixture.provenance(s) for s in step_data.samples[:5])
            raise MMSeqError(f"the loss of step {state.step} is {record['loss']}; its first samples: {named}")
        state.step += 1
        state.data = step_data.state
        state.tokens += int(record.pop("targets_all"))
        timed.append(time.perf_counter() - waited)
        state.seconds = time.perf_counter() - started
        if config.max_minutes and len(timed) == SPEED_STEPS and not state.fitted:
            state.fitted = True
            state.steps = _fit_to_time(config, timed, state, world)
            log.total = state.steps
            last = min(state.steps, config.stop_after or state.steps)
        record |= {
            "step": state.step,
            "learning_rate": config.optimizer.learning_rate * share,
            "fill": step_data.used_tokens / step_data.slot_tokens,
            "tokens_per_s": step_data.slot_tokens * world / timed[-1],
            "data_wait_s": began - waited,
            "seconds": state.seconds,
        }
        log.step(record, every=config.log_every)
        if config.validate_every and (state.step % config.validate_every == 0 or state.step == state.steps):
            log.validation(state.step, _validate(engine, validation, mixture.task_names))
        if state.step % config.save_every == 0 or state.step == last:
            checkpoints.save(
                engine,
                state,
                out / "checkpoints",
                rank=rank,
                barrier=barrier,
                keep=config.keep_checkpoints,
                identity=identity,
            )
    data.close()  # type: ignore[attr-defined]
    if state.step < state.steps:
        log.say(f"stopped after step {state.step} of {state.steps}; run the same command again to go on")
    else:
        _export(engine, model, config, mix, out / "checkpoint", rank)
    barrier()
    log.close()
    return out / "checkpoint"


def _start_deepspeed(world: int) -> Any:
    """Import DeepSpeed and join the process group; a single process makes one of its own."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    deepspeed = require("deepspeed", "train")
    import logging

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if world == 1 and "MASTER_ADDR" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
        }
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not torch.distributed.is_initialized():
        deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    return deepspeed


def _engine(deepspeed: Any, config: TrainConfig, objective: Objective, world: int) -> Any:
    optimizer = build_optimizer(config.optimizer, objective.model)
    rows = config.data.rows_per_step // world
    passes = max(1, rows // min(config.data.rows_per_pass, rows))
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": passes,
        "train_batch_size": passes * world,
        "gradient_clipping": config.optimizer.gradient_clip,
        "zero_optimization": {"stage": config.deepspeed.zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": config.deepspeed.dtype == "bf16" and config.deepspeed.zero_stage > 0},
        "steps_per_print": 1 << 40,
    }
    if config.deepspeed.settings:
        try:
            given = json.loads(Path(config.deepspeed.settings).read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"deepspeed.settings {config.deepspeed.settings}: {error}") from error
        if not isinstance(given, dict):
            raise ConfigError(f"deepspeed.settings {config.deepspeed.settings} holds no JSON object")
        _merge(settings, given, where=config.deepspeed.settings)
    try:
        engine, *_ = deepspeed.initialize(
            model=objective, optimizer=optimizer, config=settings, dist_init_required=False
        )
    except ValueError as error:  # pydantic's too
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
    autocast: compute in bf16; entered here because DeepSpeed leaves an outer one on a GPU.
    """

    def __init__(self, model: SequenceModel, tasks: int, range_weights: dict[str, float], *, autocast: bool):
        super().__init__()
        self.model, self.tasks, self.range_weights, self.autocast = model, tasks, range_weights, autocast

    def weight(self, range_name: str) -> float:
        return self.range_weights.get(range_name, 1.0)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        loss = torch.zeros((), device=batch.ids.device)
        sums = torch.zeros(2, self.tasks + 1, device=batch.ids.device, dtype=torch.float64)
        with torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=self.autocast):
            groups = self.model.losses(batch)
        for name, (nll, objective, task) in groups.items():
            loss = loss + self.weight(name) * objective.sum()
            detached = nll.detach().double()
            sums[0].index_add_(0, task, detached)
            sums[1].index_add_(0, task, torch.ones_like(detached))
            sums[0, -1] += self.weight(name) * detached.sum()
        return loss, sums


def _step(engine: Any, objective: Objective, passes: list[Batch], world: int, device: torch.device) -> dict[str, Any]:
    """One optimiser step over all ranks. The loss is the mean over the *global* batch's targets."""
    local = sum(objective.weight(name) * len(at) for b in passes for name, (at, _, _) in b.targets.items())
    total = torch.tensor([float(local)], device=device, dtype=torch.float64)
    torch.distributed.all_reduce(total)
    scale = world * len(passes) / float(total)  # DeepSpeed averages over ranks and passes
    sums = torch.zeros(2, objective.tasks + 1, device=device, dtype=torch.float64)
    for batch in passes:
        loss, part = engine(batch.to(device))
        sums += part
        engine.backward(loss * scale)
        engine.step()
    torch.distributed.all_reduce(sums)
    nats, counts = sums[0, :-1], sums[1, :-1]
    return {
        "loss": float(sums[0, -1] / total),
        "bits_per_token": (nats / counts.clamp_min(1) / math.log(2)).tolist(),
        "targets": counts.tolist(),
        "targets_all": float(counts.sum()),
        "gradient_norm": _number(engine.get_global_grad_norm()),
    }


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _fit_to_time(config: TrainConfig, timed: list[float], state: checkpoints.RunState, world: int) -> int:
    """How many steps fit into max_minutes at the speed of the first steps; rank 0 decides."""
    late = sorted(timed[len(timed) // 2 :])  # the first steps fill caches
    typical = late[len(late) // 2]
    left = config.max_minutes * 60 - state.seconds
    steps = torch.tensor([min(config.steps, state.step + max(1, int(left / typical)))], dtype=torch.int64)
    if torch.cuda.is_available():
        steps = steps.cuda()
    torch.distributed.broadcast(steps, 0)
    return int(steps)


def _validation_batches(config: TrainConfig, mixture: Mixture, tokenizers: Tokenizers) -> list[Batch]:
    """The same held-out samples each time, one batch per task."""
    out = []
    for stream in mixture.streams:
        count = min(config.validation_samples, len(stream))
        places = [round(i * (len(stream) - 1) / max(1, count - 1)) for i in range(count)]
        samples = [stream.moment(p) for p in places]
        sequences = [mixture.build(s) for s in samples]
        out.append(collate(sequences, tokenizers.vocabulary, tasks=[s.task for s in samples]))
    return out


@torch.no_grad()
def _validate(engine: Any, batches: list[Batch], names: list[str]) -> dict[str, float]:
    """Held-out bits per token by task."""
    engine.eval()
    total = torch.zeros(2, len(names) + 1, device=engine.device, dtype=torch.float64)
    for batch in batches:
        _, sums = engine(batch.to(engine.device))
        total += sums
    engine.train()
    nats, counts = total.tolist()
    return {n: nats[i] / counts[i] / math.log(2) for i, n in enumerate(names) if counts[i]}


def _export(engine: Any, model: SequenceModel, config: TrainConfig, mix: Any, directory: Path, rank: int) -> None:
    """Write the finished model from the fp32 master weights, complete or not at all."""
    from deepspeed.utils import safe_get_full_fp32_param

    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        full = safe_get_full_fp32_param(parameter)
        if rank == 0:
            weights[name] = (full if full is not None else parameter.data).detach().float().cpu().clone()
    if rank != 0:
        return
    assert model.tokenizers is not None
    copy = SequenceModel(model.config, model.vocabulary, model.tokenizers)
    if model.transformer.code_projection is not None:
        copy.learn_codes()
    copy.load_state_dict(weights)
    copy.tasks = {task_name(t): t.task for t in mix.tasks}
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    copy.save_pretrained(partial)
    save_mix(mix, partial / "mix.yaml")
    (partial / "train.yaml").write_text(to_yaml(config))
    replace_folder(partial, directory)


def leave(code: int = 0) -> None:
    """Leave the process at once: ZeRO-3's threads can abort a normal interpreter exit."""
    sys.stdout.flush()
    sys.stderr.flush()
    if torch.distributed.is_initialized():
        os._exit(code)
