"""Who this process is in a run: one function from a launcher's environment variables to its rank.

| launcher            | what it sets                                                                     |
| ------------------- | -------------------------------------------------------------------------------- |
| none                | nothing: one process                                                              |
| torchrun, deepspeed | RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT                                |
| srun                | SLURM_STEP_ID SLURM_PROCID SLURM_STEP_NUM_TASKS SLURM_LOCALID SLURM_STEP_NODELIST |
| Kubernetes, a pod   | JOB_COMPLETION_INDEX, and from the manifest WORLD_SIZE MASTER_ADDR MASTER_PORT    |

Nothing here touches torch or the network, so the command line may ask before it loads anything.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mmseq.errors import ConfigError

SLURM_PORTS = range(20_000, 30_000)  # below the range that Linux hands out by itself
SLURM_SPECIAL_STEPS = 0xFFFF_FFF0  # step ids from here on are no steps of srun: batch, extern, interactive


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Rank of `world` processes, the `local_rank`-th of its machine. address, port: where rank 0 listens
    (None: a process that is alone chooses). launcher: whose variables said so."""

    rank: int
    world: int
    local_rank: int
    address: str | None
    port: int | None
    launcher: str


_TORCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
_NAMES = {  # the variables of each launcher: of the rank, of the rank on the machine, of their number
    "none": _TORCH,
    "torchrun": _TORCH,
    "deepspeed": _TORCH,
    "environment": _TORCH,
    "srun": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"),
    "pod": ("JOB_COMPLETION_INDEX", "LOCAL_RANK", "WORLD_SIZE"),
}
ALONE = Ranks(rank=0, world=1, local_rank=0, address=None, port=None, launcher="none")


def find_ranks(environment: Mapping[str, str]) -> Ranks:
    """The rank that the launcher gave this process.

    Variables of torchrun and deepspeed come first: they may run inside a SLURM step.
    Raises: ConfigError naming variables that are missing, are no numbers, or contradict each other.
    """
    env = {name: value for name, value in environment.items() if value != ""}
    if "RANK" in env or ("WORLD_SIZE" in env and "JOB_COMPLETION_INDEX" not in env and not _srun_tasks(env)):
        found = _from_torch(env)
    elif tasks := _srun_tasks(env):
        found = _from_srun(env, tasks)
    elif "WORLD_SIZE" in env:
        found = _from_pod(env)
    else:
        found = _alone(env)
    rank, local, world = _NAMES[found.launcher]
    if found.world < 1:
        raise ConfigError(f"{world} is {found.world}", fix="it is the number of processes, at least 1")
    if found.port is not None and found.world > 1 and not 0 < found.port < 1 << 16:
        raise ConfigError(f"MASTER_PORT is {found.port}", fix="use one from 1024 to 65535, the same for all ranks")
    for name, value in ((rank, found.rank), (local, found.local_rank)):
        if not 0 <= value < found.world:
            raise ConfigError(f"{name} is {value} where {world} says {found.world}", fix=f"use 0 to {found.world - 1}")
    return found


def _from_torch(env: Mapping[str, str]) -> Ranks:
    _demand(env, "RANK", "WORLD_SIZE")
    rank, world = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    tasks = _srun_tasks(env)
    agents = any(name in env for name in ("TORCHELASTIC_RUN_ID", "CROSS_RANK"))  # torchrun's, deepspeed's
    if tasks == world > 1 and not agents and rank != _number(env, "SLURM_PROCID"):
        raise ConfigError(
            f"RANK={rank} contradicts SLURM_PROCID={env['SLURM_PROCID']} of {tasks} tasks",
            fix="unset RANK and WORLD_SIZE, srun says it all",
        )
    if world > 1:
        _demand(env, "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", given="WORLD_SIZE")
    return Ranks(
        rank=rank,
        world=world,
        local_rank=_number(env, "LOCAL_RANK") if "LOCAL_RANK" in env else 0,
        address=env.get("MASTER_ADDR"),
        port=_number(env, "MASTER_PORT") if "MASTER_PORT" in env else None,
        launcher="torchrun" if "TORCHELASTIC_RUN_ID" in env else "deepspeed" if "CROSS_RANK" in env else "environment",
    )


def _srun_tasks(env: Mapping[str, str]) -> int:
    """Tasks of the step that srun started this process in, 0 when srun did not start it.

    An allocation alone (`salloc`, the body of an sbatch script) sets SLURM_NTASKS, and even SLURM_PROCID,
    without there being other processes; a step has an id of its own.
    """
    if "SLURM_STEP_ID" not in env or _number(env, "SLURM_STEP_ID") >= SLURM_SPECIAL_STEPS:
        return 0
    name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    return _number(env, name) if name in env else 1


def _from_srun(env: Mapping[str, str], tasks: int) -> Ranks:
    _demand(env, "SLURM_PROCID", "SLURM_LOCALID", given="SLURM_STEP_ID")
    if "SLURM_PTY_PORT" in env and tasks > 1:  # `srun --pty -n 4 bash`: only task 0 has a shell
        raise ConfigError(
            f"SLURM_PTY_PORT says that this is an interactive shell, SLURM_STEP_NUM_TASKS that it has {tasks} tasks: "
            "one process here would wait for the others for ever",
            fix="use `srun --pty --ntasks 1 bash`, or start every task with `env -u SLURM_PTY_PORT srun mmseq ...`",
        )
    if tasks == 1:
        return Ranks(rank=_number(env, "SLURM_PROCID"), world=1, local_rank=0, address=None, port=None, launcher="srun")
    nodes = next((env[n] for n in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST") if n in env), None)
    job = next((n for n in ("SLURM_JOB_ID", "SLURM_JOBID") if n in env), None)
    if "MASTER_ADDR" not in env and nodes is None:
        raise ConfigError(
            f"srun started {tasks} tasks, but neither SLURM_JOB_NODELIST nor MASTER_ADDR is set",
            fix="set MASTER_ADDR to the host of task 0",
        )
    if "MASTER_PORT" not in env and job is None:
        raise ConfigError(
            f"srun started {tasks} tasks, but neither SLURM_JOB_ID nor MASTER_PORT is set", fix="set MASTER_PORT"
        )
    if "MASTER_PORT" in env:
        port = _number(env, "MASTER_PORT")
    else:  # two steps of a job may run beside each other
        port = SLURM_PORTS[(_number(env, job or "") + _number(env, "SLURM_STEP_ID")) % len(SLURM_PORTS)]
    return Ranks(
        rank=_number(env, "SLURM_PROCID"),
        world=tasks,
        local_rank=_number(env, "SLURM_LOCALID"),
        address=env.get("MASTER_ADDR") or first_host(nodes or ""),
        port=port,
        launcher="srun",
    )


def _from_pod(env: Mapping[str, str]) -> Ranks:
    """One process per pod of an indexed Job; with torchrun in the pod, torchrun's variables come first."""
    world = _number(env, "WORLD_SIZE")
    if world > 1:
        _demand(env, "MASTER_ADDR", "MASTER_PORT", given="JOB_COMPLETION_INDEX")
    return Ranks(
        rank=_number(env, "JOB_COMPLETION_INDEX"),
        world=world,
        local_rank=0,
        address=env["MASTER_ADDR"] if world > 1 else None,
        port=_number(env, "MASTER_PORT") if world > 1 else None,
        launcher="pod",
    )


def _alone(env: Mapping[str, str]) -> Ranks:
    """One process, unless a launcher that says less than it must has started several."""
    if env.get("JOB_COMPLETION_INDEX", "0") != "0":
        raise ConfigError(
            f"JOB_COMPLETION_INDEX={env['JOB_COMPLETION_INDEX']} is one of several pods, and WORLD_SIZE is not set",
            fix="start torchrun in each pod, or set WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the manifest",
        )
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if env.get(name, "1") != "1" and "SLURM_STEP_ID" not in env:
            raise ConfigError(
                f"{name}={env[name]} says that mpirun started several processes, which mmseq does not read",
                fix="use torchrun, deepspeed or srun",
            )
    return ALONE


def first_host(nodes: str) -> str:
    """The first name of a SLURM node list: `gpu[003-007,9],login1` is `gpu003`."""
    first = re.match(r"(?:[^,\[\]]|\[[^\]]*\])+", nodes)
    host = re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0]) if first else ""
    if not host:
        raise ConfigError(f"SLURM_JOB_NODELIST={nodes!r} names no host", fix="set MASTER_ADDR to the host of task 0")
    return host


def _demand(env: Mapping[str, str], *names: str, given: str | None = None) -> None:
    missing = [name for name in names if name not in env]
    if missing:
        there = [given] if given else [name for name in names if name in env]
        hint = (
            "LOCAL_RANK is the number of the process on its machine, 0 where there is one"
            if missing == ["LOCAL_RANK"]
            else f"set {' and '.join(missing)}, or unset {' and '.join(there)} to run as one process"
        )
        raise ConfigError(f"{' and '.join(there)} is set without {' and '.join(missing)}", fix=hint)


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        raise ConfigError(f"{name}={env[name]!r} is not a whole number") from None
