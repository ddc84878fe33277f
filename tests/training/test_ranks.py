"""Which rank a process is, from the variables that each launcher really sets."""

import pytest

from mmseq.errors import ConfigError
from mmseq.training.ranks import ALONE, Ranks, find_ranks, first_host

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2", "ROLE_RANK": "3", "MASTER_ADDR": "node01", "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0",
}  # fmt: skip
DEEPSPEED = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "CROSS_RANK": "1", "CROSS_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500",
}  # fmt: skip
ALLOCATION = {  # what `salloc` and the body of an sbatch script have: SLURM_PROCID too, and no step
    "SLURM_JOB_ID": "200505", "SLURM_JOBID": "200505", "SLURM_NTASKS": "4", "SLURM_NPROCS": "4", "SLURM_NNODES": "2",
    "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "gnode[10,20]",
    "SLURM_NODELIST": "gnode[10,20]", "SLURM_TASKS_PER_NODE": "2(x2)", "SLURM_JOB_NAME": "train",
}  # fmt: skip
SRUN = ALLOCATION | {
    "SLURM_STEP_ID": "0", "SLURM_STEPID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gnode[10,20]", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.9", "SLURM_SRUN_COMM_PORT": "41234",
}  # fmt: skip
POD = {"JOB_COMPLETION_INDEX": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "train-node-0-0.train", "MASTER_PORT": "29500"}


def ranks(launcher: str, address: str, port: int, local_rank: int = 1) -> Ranks:
    return Ranks(rank=3, world=4, local_rank=local_rank, address=address, port=port, launcher=launcher)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (TORCHRUN, ranks("torchrun", "node01", 29500)),
        (DEEPSPEED, ranks("deepspeed", "10.0.0.1", 29500)),
        (SRUN, ranks("srun", "gnode10", 20505)),
        (SRUN | {"SLURM_STEP_ID": "7"}, ranks("srun", "gnode10", 20512)),
        (SRUN | {"MASTER_ADDR": "head", "MASTER_PORT": "1234"}, ranks("srun", "head", 1234)),
        (POD, ranks("pod", "train-node-0-0.train", 29500, local_rank=0)),
        (SRUN | TORCHRUN, ranks("torchrun", "node01", 29500)),  # one torchrun per node, started by srun
        (POD | TORCHRUN, ranks("torchrun", "node01", 29500)),  # torchrun inside a pod
    ],
    ids=["torchrun", "deepspeed", "srun", "srun-step-7", "srun-port", "pod", "torchrun-in-srun", "torchrun-in-pod"],
)
def test_each_launcher(environment, expected):
    assert find_ranks(environment) == expected


def test_without_a_launcher_there_is_one_process():
    assert find_ranks({"PATH": "/bin", "MASTER_ADDR": "exported.by.somebody"}) == ALONE


@pytest.mark.parametrize(
    "environment",
    [
        ALLOCATION,
        ALLOCATION | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "4"},  # salloc's interactive step
        ALLOCATION | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1", "SLURM_PTY_PORT": "4"},
    ],
    ids=["sbatch-body-or-salloc", "interactive-step", "srun-pty"],
)
def test_a_shell_of_slurm_is_one_process_and_waits_for_nobody(environment):
    found = find_ranks(environment)
    assert (found.rank, found.world, found.address) == (0, 1, None)


def test_one_process_under_torchrun_uses_the_store_of_its_agent():
    found = find_ranks(TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    assert (found.world, found.address, found.port) == (1, "node01", 29500)


def without(environment: dict, *names: str) -> dict:
    return {k: v for k, v in environment.items() if k not in names}


@pytest.mark.parametrize(
    ("environment", "names"),
    [
        (without(TORCHRUN, "WORLD_SIZE"), ["RANK is set without WORLD_SIZE"]),
        (without(TORCHRUN, "RANK"), ["WORLD_SIZE is set without RANK"]),
        (without(TORCHRUN, "MASTER_ADDR", "MASTER_PORT"), ["without MASTER_ADDR and MASTER_PORT"]),
        (without(TORCHRUN, "LOCAL_RANK"), ["without LOCAL_RANK", "0 where there is one"]),
        (TORCHRUN | {"RANK": "4"}, ["RANK is 4", "WORLD_SIZE says 4", "0 to 3"]),
        (TORCHRUN | {"LOCAL_RANK": "-1"}, ["LOCAL_RANK is -1"]),
        (TORCHRUN | {"WORLD_SIZE": "four"}, ["WORLD_SIZE='four' is not a whole number"]),
        (without(SRUN, "SLURM_PROCID"), ["without SLURM_PROCID"]),
        (without(SRUN, "SLURM_JOB_ID", "SLURM_JOBID"), ["SLURM_JOB_ID", "MASTER_PORT"]),
        (without(SRUN, *(n for n in SRUN if "NODELIST" in n)), ["SLURM_JOB_NODELIST", "MASTER_ADDR"]),
        (SRUN | {"SLURM_PROCID": "9"}, ["SLURM_PROCID is 9", "SLURM_STEP_NUM_TASKS says 4"]),
        (SRUN | {"SLURM_PTY_PORT": "4"}, ["SLURM_PTY_PORT", "SLURM_STEP_NUM_TASKS"]),
        (SRUN | {"RANK": "0", "WORLD_SIZE": "4"}, ["RANK=0 contradicts SLURM_PROCID=3"]),
        (without(POD, "MASTER_ADDR"), ["without MASTER_ADDR"]),
        ({"JOB_COMPLETION_INDEX": "1"}, ["JOB_COMPLETION_INDEX=1", "WORLD_SIZE"]),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, ["OMPI_COMM_WORLD_SIZE=2", "Use torchrun"]),
    ],
)
def test_what_is_missing_or_contradicts_is_named(environment, names):
    with pytest.raises(ConfigError) as caught:
        find_ranks(environment)
    for name in names:
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gnode[10,20,25,37]", "gnode10"),
        ("gpu[003-007,9],login1", "gpu003"),
        ("rack[0-1]node[05-08]", "rack0node05"),
        ("alone", "alone"),
        ("a,b", "a"),
        ("cn-0[1-4].cluster", "cn-01.cluster"),
    ],
)
def test_the_first_host_of_a_node_list(nodes, host):
    assert first_host(nodes) == host


def test_an_empty_node_list_is_an_error():
    with pytest.raises(ConfigError, match="names no host"):
        first_host("")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"MASTER_PORT": "0"}, "MASTER_PORT is 0"),
        ({"MASTER_PORT": "70000"}, "65535"),
        ({"WORLD_SIZE": "0"}, "at least 1"),
    ],
)
def test_numbers_that_cannot_be(change, message):
    given = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    with pytest.raises(ConfigError, match=message):
        find_ranks(given | change)


def test_a_name_that_nobody_knows_is_waited_for_and_named(monkeypatch, capsys):
    from mmseq.training import distributed

    monkeypatch.setattr(distributed, "NAME_S", 0)
    with pytest.raises(ConfigError, match=r"MASTER_ADDR=rank0\.invalid"):
        distributed._await_name("rank0.invalid")
    distributed._await_name("127.0.0.1")
    assert "waiting" not in capsys.readouterr().err
