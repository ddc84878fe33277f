"""Train: one loop, read top to bottom.

    mmseq train train/demo.yaml                                       one process
    torchrun --nproc-per-node 2 -m mmseq train train/demo.yaml        two ranks
    mmseq train train/demo.yaml steps=20 out=runs/try                 a laptop try

The run's folder: `config.yaml` (resolved), `command.txt`, `metrics.jsonl`, `checkpoints/` to resume
from, and `checkpoint/`, the finished model. Running the same command again resumes.
"""

from __future__ import annotations

import math
import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmseq.config import to_yaml
from mmseq.data.mixture import Mixture, load_mix, save_mix, task_name
from mmseq.data.shards import replace_folder
from mmseq.errors import ConfigError, MMSeqError
from mmseq.model.attention import choose_backend
from mmseq.model.sequence_model import SequenceModel
from mmseq.packing import Batch
from mmseq.tokenization.bundle import Tokenizers
from mmseq.training import checkpoint as checkpoints
from mmseq.training.config import TrainConfig
from mmseq.training.distributed import start_deepspeed
from mmseq.training.engine import Objective, build_engine
from mmseq.training.loader import steps as loader_steps
from mmseq.training.logging import RunLog
from mmseq.training.validation import validate, validation_batches

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

    deepspeed = start_deepspeed(world)
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu")
    barrier = torch.distributed.barrier
    model = SequenceModel.new(config.model, tokenizers, seed=config.seed)
    size = model.parameters_count  # ZeRO 3 leaves each rank a share
    backend, why = choose_backend(device, config.model.attention, half=config.deepspeed.dtype == "bf16")
    mixed = config.deepspeed.dtype == "bf16" and config.deepspeed.zero_stage == 0
    objective = Objective(model, len(mixture.task_names), dict(config.range_weights), autocast=mixed)
    engine = build_engine(deepspeed, config, objective, world)
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
    validation = validation_batches(config, make("holdout"), tokenizers) if config.validate_every else []
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
            log.validation(state.step, validate(engine, validation, mixture.task_names))
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
