"""The same command under each launcher: two ranks lose the same whoever starts them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mmseq.errors import MMSeqError
from mmseq.training.local import train_here, what_failed

CPU = {"DS_ACCELERATOR": "cpu"}
MORE = ["steps=4", "deepspeed.dtype=fp32"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


@pytest.fixture
def run(trainer, tmp_path) -> list[str]:
    """The command, as it stands behind a launcher."""
    return ["mmseq", *trainer.command(tmp_path / "run", *MORE)]


@pytest.fixture(scope="module")
def two_ranks(trainer, losses, tmp_path_factory) -> dict[int, float]:
    """What two ranks of one torchrun lose."""
    out = tmp_path_factory.mktemp("torchrun") / "run"
    command = ["mmseq", *trainer.command(out, *MORE)]
    finish([start([*TORCHRUN, "--standalone", "--nproc-per-node=2", "-m", *command])])
    assert len(losses(out)) == 4
    return losses(out)


def environment(more: dict[str, str]) -> dict[str, str]:
    """This process's, on the CPU, without what a launcher around the tests may have set."""
    launchers = ("SLURM_", "TORCHELASTIC_", "OMPI_", "PMI_")
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "JOB_COMPLETION_INDEX")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(launchers) and k not in ranks}
    return kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more


def start(arguments: list[str], cwd: Path | None = None, **more: str) -> subprocess.Popen:
    pipe = subprocess.PIPE
    return subprocess.Popen(arguments, env=environment(more), cwd=cwd, stdout=pipe, stderr=pipe, text=True)


def finish(processes: list[subprocess.Popen]) -> list[str]:
    """What each said; fails when one failed."""
    said = [p.communicate(timeout=300) for p in processes]
    for process, (out, error) in zip(processes, said):
        assert process.returncode == 0, (out + error)[-4000:]
    return [out for out, _ in said]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_srun(run, losses, two_ranks, tmp_path):
    """Two processes with the variables that srun sets for two tasks on one node."""
    job = {"SLURM_JOB_ID": str(free_port() - 20_000 + 10_000), "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}
    step = job | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_NODELIST": "localhost"}
    tasks = [step | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)} for task in range(2)]
    finish([start([sys.executable, "-m", *run], **task) for task in tasks])
    assert losses(tmp_path / "run") == two_ranks


def test_two_nodes(run, losses, two_ranks, tmp_path):
    """Two torchrun agents that meet on loopback, each with a working directory of its own."""
    meet = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}"]
    agents = []
    for node in range(2):
        place = tmp_path / f"node{node}"
        place.mkdir()
        agents.append(start([*TORCHRUN, *meet, "--rdzv-id=two-nodes", "-m", *run], cwd=place))
    finish(agents)
    assert losses(tmp_path / "run") == two_ranks
    assert [list(p.iterdir()) for p in (tmp_path / "node0", tmp_path / "node1")] == [[], []]


def deepspeed(*options: str) -> list[str]:
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--no_local_rank", "--module"]
    return [*launcher, "--master_port", str(free_port()), *options]


@pytest.mark.slow
def test_deepspeed(run, losses, two_ranks, tmp_path):
    """The real launcher on one machine. Without --no_local_rank its argument would break the command line."""
    finish([start([*deepspeed("--num_accelerators", "2"), *run], **CPU)])
    assert losses(tmp_path / "run") == two_ranks


@pytest.mark.slow
def test_deepspeed_on_two_nodes(run, losses, two_ranks, tmp_path):
    """A hostfile of two nodes, and on each a launcher started by hand (--no_ssh) instead of over ssh."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node0 slots=1\nnode1 slots=1\n")
    common = deepspeed("--hostfile", str(hostfile), "--no_ssh", "--master_addr", "127.0.0.1")
    finish([start([*common, "--node_rank", str(node), *run], **CPU) for node in range(2)])
    assert losses(tmp_path / "run") == two_ranks


def test_the_last_thing_torchrun_says_is_our_message(run):
    """Its own table would say `To enable traceback see ...` and hide what went wrong far above."""
    agent = start([*TORCHRUN, "--standalone", "--nproc-per-node=2", "-m", *run, "data.rows_per_step=3"])
    said = agent.communicate(timeout=300)[1]
    assert agent.returncode != 0
    table = said[said.rindex("Root Cause") :]
    assert "data.rows_per_step 3 cannot be shared by 2 ranks" in table
    assert "To enable traceback" not in table


def test_a_step_of_slurm_that_says_too_little_is_refused(run):
    process = start([sys.executable, "-m", *run], SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="0")
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 2
    assert said.splitlines()[-1].startswith("mmseq: error: SLURM_STEP_ID is set without SLURM_LOCALID")
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("does", "says"),
    [
        ("if r == '1': raise RuntimeError('no such kernel')", r"\[rank1\]: RuntimeError: no such kernel$"),
        ("raise ValueError('two lines,\\nof which the first counts')", r"ValueError: two lines,$"),
        (
            "os.kill(os.getpid(), 9) if r == '0' else time.sleep(5)",
            "killed by SIGKILL, as the system does",
        ),
    ],
)
def test_a_rank_that_breaks_says_why_to_whoever_started_it_here(trainer, tmp_path, monkeypatch, does, says):
    """Not torchrun, whose table names files that are gone by then."""
    broken = f"import os, time\ndef build_engine(*_):\n    r = os.environ['RANK']\n    {does}\n    time.sleep(5)\n"
    (tmp_path / "sitecustomize.py").write_text(
        f"import os\nif 'RANK' in os.environ:\n    import mmseq.training.engine as e\n    exec({broken!r}, vars(e))\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    _, recipe, *settings = trainer.command(tmp_path / "run", "deepspeed.dtype=fp32")
    with pytest.raises(MMSeqError, match=says) as failed:
        train_here(Path(recipe), settings, ranks=2, log=tmp_path / "log")
    assert "\n" not in str(failed.value)


def test_of_what_was_said_the_cause_is_told():
    table = ["=" * 60, "mmseq FAILED", "  traceback : mmseq: error: hidden", "=" * 60]
    ours = ["mmseq: error (rank 1): no such file", "mmseq: error: rank 1 is gone", *table]
    assert what_failed(ours, 2) == "mmseq: error (rank 1): no such file"
    caught = ["OSError: libavutil.so.57: cannot open", "falling back"]  # what a library said and lived with
    ranks = [*caught, "[rank1]: torch.OutOfMemoryError: CUDA", "[rank0]: RuntimeError: Connection closed", *table]
    assert what_failed(ranks, 1) == "[rank1]: torch.OutOfMemoryError: CUDA"
    assert what_failed([*caught, "KeyError: 'x'", *table], 1) == "KeyError: 'x'"
    assert what_failed(["step 1", *table], 1) == "\n".join(["step 1", *table])
    assert what_failed(table, 128 + 11) == "a rank was killed by SIGSEGV"
