"""What a run survives: being killed, asked to stop, a full disk, losses that are not finite, unreadable samples."""

import json
import os
import random
import shutil
import signal
import time
from itertools import product

import psutil
import pytest
import torch

from mmseq.training.checkpoint import RunState, complete_checkpoints
from mmseq.training.distributed import EXIT_PREEMPTED
from mmseq.training.stability import WINDOW, clip_gradients, record, why_skip
from support.faults import KillAt, NotFinite, SmallDisk
from support.ranks import run_ranks, wait_for

FP32 = ["deepspeed.dtype=fp32", "deepspeed.zero_stage=1", "save_every=2"]


@pytest.fixture(scope="module")
def whole(trainer, tmp_path_factory):
    return trainer.done(tmp_path_factory.mktemp("whole") / "run", 1, *FP32)


NOT_FINITE = [
    ("loss", "fp32", 3),
    ("gradient", "fp32", 0),
    ("gradient", "fp32", 2),
    ("gradient", "bf16", 1),
]  # not slow


def same_as(whole, out, losses) -> None:
    assert losses(out) == losses(whole)
    assert (out / "checkpoint/model.safetensors").read_bytes() == (whole / "checkpoint/model.safetensors").read_bytes()


def test_a_spike_is_six_deviations_above_the_last_losses():
    state = RunState()
    for step in range(WINDOW):
        assert why_skip(99.0, state) is None  # of too few
        record(1.0 if step % 2 else 3.0, state, applied=True)
    assert [why_skip(loss, state) for loss in (2.0, 7.99, 8.0, 8.01)] == [None, None, None, "spike"]
    assert [why_skip(loss, state) for loss in (float("nan"), float("inf"))] == ["loss", "loss"]
    record(float("nan"), state, applied=False)
    record(50.0, state, applied=False)
    assert (state.updates, state.skipped, state.skipped_in_a_row) == (WINDOW, 2, 2)
    assert state.recent_losses[-2:] == [3.0 if WINDOW % 2 else 1.0, 50.0]  # what is no number says nothing
    record(2.0, state, applied=True)
    assert (state.skipped_in_a_row, len(state.recent_losses)) == (0, WINDOW)
    same = RunState(recent_losses=[2.0] * WINDOW)
    assert [why_skip(loss, same) for loss in (2.0, 2.01)] == [None, "spike"]


def test_gradients_are_scaled_to_the_limit_and_no_further():
    def clipped(values, limit):
        gradients = [torch.tensor(values[:1]), torch.tensor(values[1:])]
        norm = clip_gradients(gradients, limit)
        return norm, torch.cat(gradients).tolist()

    assert clipped([3.0, 4.0], 1.0) == (5.0, pytest.approx([0.6, 0.8], rel=1e-5))
    for limit in (0.0, 5.1):  # 0: any norm
        assert clipped([3.0, 4.0], limit) == (5.0, [3.0, 4.0])
    norm, tiny = clipped([3e-8, 4e-8], 1.0)
    assert (norm, tiny) == (pytest.approx(5e-8), pytest.approx([3e-8, 4e-8]))
    norm, left = clipped([float("inf"), 4.0], 1.0)
    assert (norm, left) == (float("inf"), [float("inf"), 4.0])  # such a step is skipped
    assert clip_gradients([], 1.0) == 0.0


@pytest.mark.parametrize("count", [2, 12, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4, 7, 20))])
def test_killed_inside_a_checkpoint_write(trainer, losses, whole, tmp_path, count):
    out = tmp_path / "run"
    killed = trainer.run(out, 1, *FP32, fault=KillAt(str(out / "checkpoints"), count))
    assert killed.codes == [-signal.SIGKILL]
    trainer.done(out, 1, *FP32)
    same_as(whole, out, losses)


@pytest.mark.slow
def test_killed_at_two_hundred_points(trainer, losses, metrics, whole, tmp_path):
    """At least a hundred of them inside checkpoint writes. No sample is lost or read twice."""
    inside, killed, count = 0, 0, 0
    generator = random.Random(0)
    while killed < 200:
        out = tmp_path / f"run{killed}"
        for _ in range(3):  # a run is killed up to three times before it may end
            count = count % 24 + 1
            if killed % 3:
                done = trainer.run(out, 1, *FP32, fault=KillAt(str(out / "checkpoints"), count))
                inside += done.codes == [-signal.SIGKILL]
            else:
                processes, output = trainer.start(out, 1, *FP32)
                time.sleep(generator.uniform(0.2, 4.0))
                for p in processes:
                    p.kill()
                done = wait_for(processes, output)
            assert done.codes in ([0], [-signal.SIGKILL]), done.output[-2000:]
            killed += done.codes == [-signal.SIGKILL]
        trainer.done(out, 1, *FP32)
        same_as(whole, out, losses)
        assert [r["samples_crc"] for r in metrics(out)] == [r["samples_crc"] for r in metrics(whole)]
        shutil.rmtree(out)
    assert inside >= 100


def test_one_rank_of_two_is_killed(trainer, losses, whole, tmp_path):
    out = tmp_path / "run"
    killed = trainer.run(out, 2, *FP32, fault=KillAt(str(out / "checkpoints"), 3, rank=1))
    assert killed.codes[1] == -signal.SIGKILL
    trainer.done(out, 2, *FP32)
    assert list(losses(out).values()) == pytest.approx(list(losses(whole).values()), rel=1e-6)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_asked_to_stop_it_saves_and_goes_on(trainer, losses, tmp_path, number):
    more = ["deepspeed.dtype=fp32", "deepspeed.zero_stage=1", "steps=400", "optimizer.warmup_steps=1"]
    out = tmp_path / "run"
    processes, output = trainer.start(out, 2, *more)
    deadline = time.monotonic() + 60
    while not (out / "metrics.jsonl").is_file() or not losses(out):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(processes[1].pid, number)  # one is enough
    done = wait_for(processes, output)
    assert done.codes == [EXIT_PREEMPTED] * 2, done.output[-2000:]
    step = max(losses(out))
    assert step < 400
    assert complete_checkpoints(out / "checkpoints")[-1].name == f"step_{step:08d}"
    assert f"saved {out}/checkpoints/step_{step:08d}; run the same command again" in done.output
    finished = trainer.run(out, 1, *more, f"stop_after={step + 2}")
    assert f"resumed at step {step}" in finished.output
    assert max(losses(out)) == step + 2


@pytest.mark.parametrize("how", ["killed", "asked, with all its processes"])
def test_loader_processes_end_with_their_rank(trainer, losses, tmp_path, how):
    """They would hold memory, and the output that a launcher waits for to end."""
    out = tmp_path / "run"
    processes, output = trainer.start(out, 1, *FP32, "steps=4000", "data.workers=2")
    deadline = time.monotonic() + 60
    while not (out / "metrics.jsonl").is_file() or not losses(out):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    others = psutil.Process(processes[0].pid).children(recursive=True)
    assert len(others) >= 2
    if how == "killed":
        processes[0].kill()
    else:
        for p in [*others, processes[0]]:
            os.kill(p.pid, signal.SIGTERM)
    done = wait_for(processes, output)
    assert done.codes == [-signal.SIGKILL if how == "killed" else EXIT_PREEMPTED], done.output[-2000:]
    assert not psutil.wait_procs(others, timeout=10)[1]


def test_asked_to_stop_before_it_has_begun_it_saves_its_first_step(trainer, losses, tmp_path):
    out = tmp_path / "run"
    processes, output = trainer.start(out, 1, *FP32, "steps=4000")
    deadline = time.monotonic() + 60
    while not out.is_dir():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(processes[0].pid, signal.SIGTERM)
    done = wait_for(processes, output)
    assert done.codes == [EXIT_PREEMPTED], done.output[-2000:]
    assert complete_checkpoints(out / "checkpoints")


def test_a_stop_between_two_lines_loses_nothing_of_the_log(trainer, metrics, tmp_path):
    """Lines are means over steps; a checkpoint has a line of its own, so that going on from it knows all."""
    lines = [*FP32, "log_every=3", "save_every=5"]
    whole, out = trainer.done(tmp_path / "whole", 1, *lines), tmp_path / "run"
    for stop in (5, 0):
        trainer.done(out, 1, *lines, f"stop_after={stop}")
    assert [(r["step"], r["loss"], r["bits_per_token"]) for r in metrics(out)] == [
        (r["step"], r["loss"], r["bits_per_token"]) for r in metrics(whole)
    ]


def test_a_full_disk_damages_nothing(trainer, losses, whole, tmp_path):
    out = tmp_path / "run"
    trainer.done(out, 2, *FP32, "stop_after=4")
    kept = {p: p.read_bytes() for p in (out / "checkpoints").rglob("*") if p.is_file()}
    done = trainer.run(out, 2, *FP32, fault=SmallDisk(200_000))
    assert done.codes == [2, 2]
    assert "step_00000006 could not be written" in done.output
    assert f"it goes on from {out}/checkpoints/step_00000004" in done.output
    assert "Traceback" not in done.output
    assert {p: p.read_bytes() for p in (out / "checkpoints").rglob("*") if p.is_file()} == kept
    trainer.done(out, 1, *FP32)
    assert list(losses(out).values()) == pytest.approx(list(losses(whole).values()), rel=1e-6)


def test_a_folder_that_cannot_be_written_is_refused_at_once(trainer, tmp_path):
    (tmp_path / "file").write_text("")
    done = trainer.run(tmp_path / "run", 1, *FP32, f"out={tmp_path}/file/run")
    assert done.codes == [2]
    assert f"mmseq: error: {tmp_path}/file/run: Not a directory" in done.output
    assert "Traceback" not in done.output


def test_old_checkpoints_go_and_milestones_stay(trainer, tmp_path):
    out = trainer.done(tmp_path / "run", 1, *FP32, "keep_checkpoints=1", "milestone_every=4")
    assert [p.name for p in complete_checkpoints(out / "checkpoints")] == [f"step_{n:08d}" for n in (4, 8, 10)]


@pytest.mark.parametrize(
    ("where", "dtype", "stage"),
    [
        pytest.param(where, dtype, stage, marks=[] if (where, dtype, stage) in NOT_FINITE else pytest.mark.slow)
        for where, dtype, stage in product(("loss", "gradient"), ("fp32", "bf16"), range(4))
    ],
)
def test_a_step_that_is_not_finite_changes_nothing(trainer, metrics, tmp_path, stage, dtype, where):
    if (stage in (1, 2) or dtype == "bf16") and where == "loss":
        pytest.skip("the same as its gradient")
    out = tmp_path / "run"
    more = [f"deepspeed.dtype={dtype}", f"deepspeed.zero_stage={stage}", "data.rows_per_pass=4", "steps=6"]
    done = trainer.run(out, 1, *more, fault=NotFinite((2, 3), where))
    assert done.codes == [0], done.output[-2000:]
    skipped = metrics(out, "skipped")
    assert [s["step"] for s in skipped] == [3, 4]
    assert all(s["samples"][0].startswith(("policy", "forward_dynamics", "value", "caption")) for s in skipped)
    state = json.loads((complete_checkpoints(out / "checkpoints")[-1] / "state.json").read_text())["run"]
    assert (state["updates"], state["skipped"], state["step"]) == (4, 2, 6)
    assert all(abs(r["loss"]) < 10 for r in metrics(out) if r["step"] in (1, 2, 5, 6))
    assert "NaN" not in (out / "metrics.jsonl").read_text()
    mean = trainer.run(tmp_path / "mean", 1, *more, "log_every=6", fault=NotFinite((2, 3), where))
    assert mean.codes == [0]
    assert abs(metrics(tmp_path / "mean")[0]["loss"]) < 10


def test_too_many_bad_steps_stop_the_run(trainer, tmp_path):
    out = tmp_path / "run"
    passes = tuple(range(12, 100))
    done = trainer.run(out, 2, *FP32, "max_skipped_in_a_row=2", fault=NotFinite(passes, rank=1))
    assert done.codes == [2, 2]
    assert "3 steps in a row were skipped, the last for its loss (nan)" in done.output
    assert f"the last good checkpoint is {out}/checkpoints/step_" in done.output


def test_unreadable_samples_have_a_budget(trainer, losses, metrics, tmp_path):
    tokens = tmp_path / "tokens"
    shutil.copytree(trainer.root / "tokens", tokens)
    (shard,) = (tokens / "human").glob("*.tar")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 4000] = bytes(4000)
    shard.write_bytes(bytes(content))
    more = [f"data.tokens={tokens}", "deepspeed.dtype=fp32"]
    refused = trainer.run(tmp_path / "refused", 2, *more)
    assert 2 in refused.codes
    assert "data.max_bad_samples is 0" in refused.output
    assert "warning: left out " in refused.output
    assert "Traceback" not in refused.output
    trainer.done(tmp_path / "run", 2, *more, "data.max_bad_samples=1000")
    assert len(losses(tmp_path / "run")) == 10
    for shard in tokens.glob("*/*.tar"):
        shard.write_bytes(bytes(shard.stat().st_size))
    nothing = trainer.run(tmp_path / "nothing", 1, *more, "data.max_bad_samples=100000")
    assert nothing.codes == [2]
    assert "no sample of step 1 could be read" in nothing.output


def test_two_runs_do_not_share_a_folder(trainer, losses, tmp_path):
    out = tmp_path / "run"
    processes, output = trainer.start(out, 1, *FP32, "steps=4000")
    deadline = time.monotonic() + 60
    while not (out / "metrics.jsonl").is_file() or not losses(out):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    second = run_ranks(trainer.command(out, *FP32, "steps=4000"), 1, tmp_path / "second.log")
    assert second.codes == [2]
    assert f"{out} is in use by process {processes[0].pid} on " in second.output
    processes[0].kill()
    wait_for(processes, output)
    trainer.done(out, 1, *FP32, f"steps={max(losses(out)) + 2}")


def test_a_file_of_another_checkpoint_is_noticed(trainer, tmp_path):
    out = trainer.done(tmp_path / "run", 1, *FP32, "stop_after=4", "keep_checkpoints=5")
    old, new = complete_checkpoints(out / "checkpoints")
    shutil.copy(old / "rank_00000.safetensors", new / "rank_00000.safetensors")
    done = trainer.run(out, 2, *FP32)
    assert 2 in done.codes
    assert "rank_00000.safetensors is not what was written" in done.output
    flipped = bytearray((old / "rank_00000.safetensors").read_bytes())
    flipped[-9] ^= 1
    (old / "rank_00000.safetensors").write_bytes(flipped)
    shutil.rmtree(new)
    done = trainer.run(out, 1, *FP32)
    assert done.codes == [2]
    assert "rank_00000.safetensors is not what was written" in done.output
    state = json.loads((old / "state.json").read_text())
    state["run"]["step"] = 3
    (old / "state.json").write_text(json.dumps(state))
    done = trainer.run(out, 1, *FP32)
    assert done.codes == [2]
    assert "is damaged: state.json: it says step 3" in done.output


def test_a_run_of_limited_time_goes_on_when_it_gets_more(trainer, losses, tmp_path):
    out = tmp_path / "run"
    trainer.done(out, 1, *FP32, "steps=100000", "max_minutes=0.01")
    ended = max(losses(out))
    trainer.done(out, 1, *FP32, "steps=100000", "max_minutes=0.01")
    assert max(losses(out)) == ended
    trainer.done(out, 1, *FP32, f"steps={ended + 3}", "max_minutes=0.01")
    assert max(losses(out)) == ended + 3
