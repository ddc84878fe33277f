"""A run that is told to end is started again by what train/launch/ ships, and goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What srun does, for two tasks of one node: its variables, its exit code, and SIGTERM when the time is nearly up.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
pids=()
for task in 0 1; do
    SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NODELIST=localhost SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
    pids+=($!)
done
if [ -n "$PREEMPT_WHEN" ]; then
    until [ -s "$PREEMPT_WHEN" ]; do sleep 0.1; done
    kill -TERM "${pids[@]}"
fi
worst=0
for pid in "${pids[@]}"; do wait "$pid"; code=$?; [ $code -gt $worst ] && worst=$code; done
exit $worst
"""


def programs(folder: Path, **scripts: str) -> None:
    folder.mkdir()
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths} | more


@pytest.mark.slow
def test_slurm_queues_a_preempted_run_again(trainer, losses, tmp_path):
    """slurm.sbatch itself, with real ranks; only SLURM's two programs are stood in for."""
    bin, out = tmp_path / "bin", tmp_path / "run"
    mmseq = f'#!/bin/sh\nexec "{sys.executable}" -m mmseq "$@"\n'
    programs(bin, srun=SRUN, scontrol=f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol\n', mmseq=mmseq)
    command = ["bash", str(ROOT / "train/launch/slurm.sbatch"), *trainer.command(out, "deepspeed.dtype=fp32")[1:]]
    variables = {"PATH": f"{bin}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": str(os.getpid())}
    for preempt, code in ((out / "metrics.jsonl", 85), ("", 0)):
        run = environment(**variables, PREEMPT_WHEN=str(preempt))
        steps = "steps=3000" if code else f"steps={1 + max(losses(out))}"
        done = subprocess.run([*command, steps], env=run, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stderr[-3000:]
    assert (tmp_path / "scontrol").read_text() == f"requeue {os.getpid()}\n"
    assert list(losses(out)) == list(range(1, len(losses(out)) + 1))


def test_our_torchrun_lets_ranks_save_and_says_what_they_said(trainer, tmp_path):
    out = tmp_path / "run"
    launcher = [sys.executable, "-m", "mmseq.training.torchrun", "--standalone", "--nproc-per-node=2", "-m", "mmseq"]
    command = [*launcher, *trainer.command(out, "steps=3000", "deepspeed.dtype=fp32")]
    with (tmp_path / "log").open("w") as log:
        agent = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while not ((out / "metrics.jsonl").is_file() and (out / "metrics.jsonl").read_text()):
            assert agent.poll() is None, (tmp_path / "log").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(120) == 85, (tmp_path / "log").read_text()[-3000:]
    (checkpoint,) = (out / "checkpoints").iterdir()
    table = (tmp_path / "log").read_text().rpartition("Root Cause")[2]
    assert f"saved {checkpoint}" in table


def test_our_torchrun_ends_well_and_badly_as_its_ranks_do(tmp_path):
    for code in (0, 2):
        script = tmp_path / "rank.py"
        script.write_text(f"raise SystemExit({code})")
        launcher = [sys.executable, "-m", "mmseq.training.torchrun", "--standalone", "--nproc-per-node=1"]
        assert subprocess.run([*launcher, str(script)], env=environment(), capture_output=True).returncode == code
