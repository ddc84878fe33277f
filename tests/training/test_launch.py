"""The same command under each launcher: two ranks lose the same whoever starts them."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mmseq.testing import tiny_run

CPU = {"DS_ACCELERATOR": "cpu"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny_run.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def two_ranks(data, tmp_path_factory) -> list[float]:
    """What two ranks of one torchrun lose."""
    out = tmp_path_factory.mktemp("torchrun") / "run"
    tiny_run.train(data, out, 2)
    losses = tiny_run.losses(out)
    assert len(losses) == 4
    return losses


def finish(processes: list[subprocess.Popen]) -> list[str]:
    """What each said; fails when one failed."""
    said = [p.communicate(timeout=300) for p in processes]
    for process, (out, error) in zip(processes, said):
        assert process.returncode == 0, (out + error)[-4000:]
    return [out for out, _ in said]


def start(arguments: list[str], cwd: Path | None = None, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        arguments,
        env=tiny_run.environment(**environment),
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_srun(data, two_ranks, tmp_path):
    """Two processes with the variables that srun sets for two tasks on one node."""
    job = {"SLURM_JOB_ID": str(free_port() - 20_000 + 10_000), "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_NODELIST": "localhost"}
    finish(
        [
            start(
                [sys.executable, "-m", *tiny_run.command(data, tmp_path / "run")],
                SLURM_PROCID=str(task),
                SLURM_LOCALID=str(task),
                **job,
                **step,
            )
            for task in range(2)
        ]
    )
    assert tiny_run.losses(tmp_path / "run") == two_ranks


def test_two_nodes(data, two_ranks, tmp_path):
    """Two torchrun agents that meet on loopback, each with a working directory of its own."""
    port = free_port()
    meet = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=two-nodes"]
    agents = []
    for node in range(2):
        place = tmp_path / f"node{node}"
        place.mkdir()
        agents.append(start([*tiny_run.torchrun(1, *meet), *tiny_run.command(data, tmp_path / "run")], cwd=place))
    finish(agents)
    assert tiny_run.losses(tmp_path / "run") == two_ranks
    assert [list(p.iterdir()) for p in (tmp_path / "node0", tmp_path / "node1")] == [[], []]


def deepspeed(*options: str) -> list[str]:
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--no_local_rank", "--module"]
    return [*launcher, "--master_port", str(free_port()), *options]


@pytest.mark.slow
def test_deepspeed(data, two_ranks, tmp_path):
    """The real launcher on one machine. Without --no_local_rank its argument would break the command line."""
    finish([start([*deepspeed("--num_accelerators", "2"), *tiny_run.command(data, tmp_path / "run")], **CPU)])
    assert tiny_run.losses(tmp_path / "run") == two_ranks


@pytest.mark.slow
def test_deepspeed_on_two_nodes(data, two_ranks, tmp_path):
    """A hostfile of two nodes, and on each a launcher started by hand (--no_ssh) instead of over ssh."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node0 slots=1\nnode1 slots=1\n")
    common = deepspeed("--hostfile", str(hostfile), "--no_ssh", "--master_addr", "127.0.0.1")
    run = tiny_run.command(data, tmp_path / "run")
    finish([start([*common, "--node_rank", str(node), *run], **CPU) for node in range(2)])
    assert tiny_run.losses(tmp_path / "run") == two_ranks


def test_the_last_thing_torchrun_says_is_our_message(data, tmp_path):
    """Its own table would say `To enable traceback see ...` and hide what went wrong far above."""
    done = tiny_run.run([*tiny_run.torchrun(2), *tiny_run.command(data, tmp_path / "run", "data.rows_per_step=3")])
    assert done.returncode != 0
    table = done.stderr[done.stderr.rindex("Root Cause") :]
    assert "data.rows_per_step 3 cannot be shared by 2 ranks" in table
    assert "To enable traceback" not in table


def test_a_step_of_slurm_that_says_too_little_is_refused(data, tmp_path):
    arguments = [sys.executable, "-m", *tiny_run.command(data, tmp_path / "run")]
    done = tiny_run.run(arguments, SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="0")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("mmseq: error: SLURM_STEP_ID is set without SLURM_LOCALID")
    assert "Traceback" not in done.stderr
