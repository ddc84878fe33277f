"""Train: one loop, read top to bottom.

    mmseq train train/demo.yaml                                       one process
    torchrun --nproc-per-node 2 -m mmseq train train/demo.yaml        two ranks
    mmseq train train/demo.yaml steps=20 out=runs/try                 a laptop try

The run's folder: `config.yaml` (resolved), `command.txt`, `code.json`, `metrics.jsonl`, `checkpoints/` to resume
from, and `checkpoint/`, the finished model. Running the same command again resumes.
"""

from __future__ import annotations

import math
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch

from mmseq.config import changes, to_yaml
from mmseq.data.mixture import Mixture, load_mix
from mmseq.errors import ConfigError, DataError, MMSeqError, raise_all
from mmseq.files import record_revision
from mmseq.model.attention import choose_backend
from mmseq.model.device import default_device
from mmseq.model.sequence_model import SequenceModel
from mmseq.packing import Batch
from mmseq.tokenization.bundle import Tokenizers
from mmseq.training import checkpoint as checkpoints
from mmseq.training import stability
from mmseq.training.compiling import compile_layers
from mmseq.training.config import TrainConfig
from mmseq.training.distributed import (
    Preempted,
    device_of,
    hold_folder,
    require_shared,
    sequence_group,
    start_deepspeed,
)
from mmseq.training.engine import Objective, build_engine
from mmseq.training.finish import write_model
from mmseq.training.flops import peak_tflops, training_flops
from mmseq.training.fragments import base_optimizer
from mmseq.training.loader import StepData
from mmseq.training.loader import steps as loader_steps
from mmseq.training.logging import RunLog, memory_gib, require_loggers
from mmseq.training.ranks import find_ranks
from mmseq.training.signals import StopRequest
from mmseq.training.start import identity_of, model_of_rank, open_mixture
from mmseq.training.validation import Validation

SPEED_STEPS = 40  # steps measured before max_minutes decides the length of the run


def train(config: TrainConfig) -> Path | None:
    """Run `config` to its end, resuming what is there; returns, on rank 0, the folder of the finished model.

    Raises: MMSeqError before any training when something in the configuration or data is wrong; Preempted
    when the process was asked to stop, after saving.
    """
    with StopRequest() as stop:  # from the start on: whoever is asked while it loads saves after its first step
        return _train(config, stop)


def _train(config: TrainConfig, stop: StopRequest) -> Path | None:
    ranks = find_ranks(os.environ)
    world, rank = ranks.world, ranks.rank
    config.check(world)
    require_loggers(config.loggers)
    out = Path(config.out)
    tokenizers = Tokenizers.load(config.data.tokenizers)
    mix = load_mix(config.data.mix)
    mixture = open_mixture(config, mix, tokenizers)

    deepspeed = start_deepspeed(ranks)
    device = device_of(ranks)
    barrier = torch.distributed.barrier
    model = model_of_rank(config, tokenizers, rank)
    config.model = model.config  # what it starts from decides the shape
    raise_all(config.sharing_of_heads())
    model.sequence_group = sequence_group(config.deepspeed.sequence_parallel)
    if config.compile:
        compile_layers(model.transformer, device)
    groups = config.groups(world)  # ranks that share lines of tokens take the same rows
    size = model.parameters_count  # ZeRO 3 leaves each rank a share
    backend, why = choose_backend(device, config.model.attention, half=config.deepspeed.dtype == "bf16")
    mixed = config.deepspeed.dtype == "bf16" and config.deepspeed.zero_stage == 0
    objective = Objective(model, len(mixture.task_names), dict(config.range_weights), autocast=mixed)
    engine = build_engine(deepspeed, config, objective, world)
    identity = identity_of(config, model.config, mixture)
    require_shared(out)
    hold = hold_folder(out)  # as long as this process lives
    found = checkpoints.newest(out / "checkpoints")
    state = checkpoints.RunState(steps=config.steps)
    if found:
        state = checkpoints.load(engine, model, found, identity)
        if not state.fitted or state.asked != (config.steps, config.max_minutes):
            state.steps, state.fitted = config.steps, False
        if state.step > state.steps:
            raise ConfigError(
                f"{found} is at step {state.step}, beyond steps={state.steps}",
                fix="raise steps, or use another out=",
            )
    changed = changes(out / "config.yaml", config) if found else []
    if rank == 0:  # only now: a run that is refused must not touch what an earlier one wrote
        (out / "config.yaml").write_text(to_yaml(config))
        (out / "command.txt").write_text(shlex.join(sys.argv) + "\n")
        changed += record_revision(out / "code.json")
    log = RunLog(out, config, mixture.task_names, total=state.steps, enabled=rank == 0, after=state.step)
    peak, machine = (config.peak_tflops or None, "peak_tflops") if config.peak_tflops else peak_tflops(device)
    log.say(
        f"{size / 1e6:.2f} M parameters{_trained(model)}, vocabulary {len(tokenizers.vocabulary)}, "
        f"{world} rank(s), ZeRO {config.deepspeed.zero_stage}, {config.deepspeed.dtype}, attention {backend} ({why})"
        + (", compiled" if config.compile else "")
        + (f", MFU of {peak:g} TFLOP/s ({machine})" if peak else "")
        + (f", resumed at step {state.step}" if found else "")
    )
    if changed:
        log.say(f"changed since the run was started last: {', '.join(changed)}")
    rows = config.data.rows_per_step
    data = loader_steps(
        mixture,
        state.data,
        rows_per_step=rows,
        rows_per_pass=min(config.data.rows_per_pass, rows // groups),
        rank=rank * groups // world,
        world=groups,
        prefetch=config.data.prefetch,
        workers=config.data.workers,
    )
    validation = None
    if config.validate_every:
        validation = Validation(config, mixture.held_out(), group=rank * groups // world, groups=groups)
        if not validation:
            log.say("nothing is validated: the mix holds no episode out; raise its holdout")
            validation = None
        elif state.step == 0:
            log.validation(0, validation.measure(engine))
    started = time.perf_counter() - state.seconds
    timed: list[float] = []
    last = min(state.steps, config.stop_after or state.steps)
    saved = found
    while state.step < last:
        waited = time.perf_counter()
        step_data = next(data)
        began = time.perf_counter()
        batches = [model.share(b) for b in step_data.batches]
        unread = len(step_data.bad) * groups / world
        targets, stopping, bad = _over_ranks(objective.targets(batches), stop.asked, unread)
        _count_bad_samples(step_data, round(bad), state, mixture, config)
        if bad and not targets:
            raise DataError(f"no sample of step {state.step + 1} could be read", fix="see the warnings above")
        share = config.rate_share(state.step, state.steps)
        for group in engine.optimizer.param_groups:
            group["lr"] = group["peak"] * share
        record = _step(engine, objective, batches, targets, state, config)
        state.step += 1
        state.data = step_data.state
        timed.append(time.perf_counter() - waited)
        state.seconds = time.perf_counter() - started
        if record["skipped"] or record["spike"]:
            log.unusual(state.step, record, [mixture.provenance(s) for s in step_data.samples])
        if state.skipped_in_a_row > config.max_skipped_in_a_row:
            raise MMSeqError(
                f"{state.skipped_in_a_row} steps in a row were skipped, the last for its {record['skipped']} "
                f"({record['loss']}); {out / 'metrics.jsonl'} names their samples",
                fix=f"lower optimizer.learning_rate or look at the samples; "
                f"{f'the last good checkpoint is {saved}' if saved else 'no checkpoint was written yet'}",
            )
        if config.max_minutes and len(timed) == SPEED_STEPS and not state.fitted:
            state.fitted, state.asked = True, (config.steps, config.max_minutes)
            state.steps = _fit_to_time(config, timed, state)
            log.total = state.steps
            last = min(state.steps, config.stop_after or state.steps)
        flops = sum(training_flops(b, model.config, tokenizers.vocabulary) for b in step_data.batches)
        flops *= groups / world
        record |= {
            "step": state.step,
            "learning_rate": config.optimizer.learning_rate * share,
            "fill": step_data.used_tokens / step_data.slot_tokens,
            "tokens_per_s": step_data.slot_tokens * groups / timed[-1],
            "tflops": flops / timed[-1] / 1e12,
            "mfu": flops / timed[-1] / 1e12 / peak if peak else None,
            "memory_gib": memory_gib(device),
            "data_wait_s": began - waited,
            "seconds": state.seconds,
        }
        saving = state.step % config.save_every == 0 or state.step == last or stopping
        # a line at every checkpoint: whoever goes on from it knows nothing of the steps since the last line
        log.step(record, step_data.samples, every=1 if saving else config.log_every)
        if validation is not None and (state.step % config.validate_every == 0 or state.step == state.steps):
            log.validation(state.step, validation.measure(engine))
        if saving:
            saved = checkpoints.save(
                engine,
                model,
                state,
                out / "checkpoints",
                identity=identity,
                keep=config.keep_checkpoints,
                milestone_every=config.milestone_every,
            )
        if stopping:
            log.close()
            barrier()  # a launcher ends all ranks soon after the first has left
            raise Preempted(f"asked to stop: saved {saved}; run the same command again to go on")
    data.close()  # type: ignore[attr-defined]
    if state.step < state.steps:
        log.say(f"stopped after step {state.step} of {state.steps}; run the same command again to go on")
    elif rank == 0:
        assert saved is not None
        for name, averaged in (("checkpoint", True), ("checkpoint_last", False)):
            if averaged or config.optimizer.average_decay:
                write_model(saved, out / name, model, config, mix, averaged=averaged)
    log.close()
    barrier()
    del hold
    return out / "checkpoint" if rank == 0 and state.step == state.steps else None


def _trained(model: SequenceModel) -> str:
    """In words, when not every weight is trained."""
    if all(p.requires_grad for p in model.parameters()):
        return ""
    learning = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    return f", of which {learning / 1e6:.2f} M in adapters learn"


def _over_ranks(*numbers: float) -> list[float]:
    """The sums of numbers over all ranks."""
    sums = torch.tensor([float(n) for n in numbers], device=default_device(), dtype=torch.float64)
    torch.distributed.all_reduce(sums)
    return sums.tolist()


def _count_bad_samples(
    step_data: StepData, bad: int, state: checkpoints.RunState, mixture: Mixture, config: TrainConfig
) -> None:
    """Say which samples of this step could not be read. Raises: DataError on all ranks beyond the budget."""
    for sample, reason in step_data.bad:
        print(f"mmseq: warning: left out {mixture.provenance(sample)}: {reason}", file=sys.stderr, flush=True)
    state.bad_samples += bad
    if bad and state.bad_samples > config.data.max_bad_samples:
        named = step_data.bad[0][1] if step_data.bad else "another rank says which"
        raise DataError(
            f"{state.bad_samples} samples could not be read, data.max_bad_samples is {config.data.max_bad_samples} "
            f"({named})",
            fix="repair the shards with `mmseq data tokenize --overwrite`, or allow more",
        )


def _step(
    engine: Any,
    objective: Objective,
    batches: list[Batch],
    targets: float,
    state: checkpoints.RunState,
    config: TrainConfig,
) -> dict[str, Any]:
    """One optimiser step over all ranks. The loss is the mean over the *global* batch's targets.

    targets: their weighted number over all ranks. Leaves the weights alone when the loss or its gradient is
    not finite, or the loss is a spike and the recipe says to skip those.
    """
    optimizer = base_optimizer(engine)
    optimizer.updates, optimizer.skip = state.updates, False
    scale = torch.distributed.get_world_size() * len(batches) / max(targets, 1.0)  # DeepSpeed averages over both
    sums = torch.zeros(2, objective.tasks + 1, device=engine.device, dtype=torch.float64)
    for i, batch in enumerate(batches):
        loss, part = engine(batch.to(engine.device))
        sums += part
        engine.backward(loss * scale)
        if i < len(batches) - 1:
            engine.step()
    torch.distributed.all_reduce(sums)
    mean = float(sums[0, -1]) / max(targets, 1.0)
    wrong = stability.why_skip(mean, state)
    skipped = wrong if wrong == "loss" or config.skip_spikes else None
    norm = None
    if (
        engine.zero_optimization_stage() == 0
    ):  # its gradients are whole, and DeepSpeed would apply them whatever they are
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        norm = stability.clip_gradients(gradients, config.optimizer.gradient_clip)
        skipped = skipped or (None if math.isfinite(norm) else "gradient")
    optimizer.skip = skipped is not None
    engine.step()
    if norm is None:
        found = engine.get_global_grad_norm()
        norm = None if found is None else float(found)
        skipped = skipped or (None if engine.was_step_applied() else "gradient")
    stability.record(mean, state, applied=skipped is None)
    nats, counts = sums[0, :-1], sums[1, :-1]
    return {
        "loss": mean,
        "bits_per_token": (nats / counts.clamp_min(1) / math.log(2)).tolist(),
        "targets": counts.tolist(),
        "gradient_norm": norm,
        "skipped": skipped,
        "spike": wrong == "spike",
    }


def _fit_to_time(config: TrainConfig, timed: list[float], state: checkpoints.RunState) -> int:
    """How many steps fit into max_minutes at the speed of the first steps; rank 0 decides."""
    late = sorted(timed[len(timed) // 2 :])  # the first steps fill caches
    typical = late[len(late) // 2]
    left = config.max_minutes * 60 - state.seconds
    steps = torch.tensor([min(config.steps, state.step + max(1, int(left / typical)))], dtype=torch.int64)
    if torch.cuda.is_available():
        steps = steps.cuda()
    torch.distributed.broadcast(steps, 0)
    return int(steps)
