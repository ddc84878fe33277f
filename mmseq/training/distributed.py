"""Joining and leaving the ranks of a run."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import secrets
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import torch

from mmseq.errors import ConfigError, require
from mmseq.model.device import default_device
from mmseq.training.ranks import Ranks

LOCK_FILE = ".lock"
PATIENCE = timedelta(hours=2)  # of ranks for each other: rank 0 alone writes the finished model
NAME_S = 600  # that the name of rank 0's machine may take to be known
EXIT_PREEMPTED = 85  # asked to end, saved, wants to be started again: what train/launch/ requeues on


class Preempted(Exception):
    """The run was asked to stop and has saved; the same command goes on from there."""


def device_of(ranks: Ranks) -> torch.device:
    """The GPU of this rank, else the CPU. Raises: ConfigError when the machine has fewer GPUs than processes."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 1 and ranks.launcher == "srun":  # `srun --gpus-per-task 1` shows each process its own
        return torch.device("cuda", 0)
    if ranks.local_rank >= count:
        raise ConfigError(
            f"this is process {ranks.local_rank} (from 0) of a machine that shows {count} GPUs",
            fix="start one process per GPU",
        )
    return torch.device("cuda", ranks.local_rank)


def start_deepspeed(ranks: Ranks) -> Any:
    """Import DeepSpeed and join the process group; a single process makes one of its own.

    DeepSpeed and libraries below it read the variables of torchrun, so these are set for every launcher.
    """
    os.environ.setdefault("DS_ACCELERATOR", default_device())
    deepspeed = require("deepspeed", "train")
    import logging

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    device = device_of(ranks)
    os.environ |= {
        "RANK": str(ranks.rank),
        "WORLD_SIZE": str(ranks.world),
        "LOCAL_RANK": str(device.index or 0) if device.type == "cuda" else str(ranks.local_rank),
        "MASTER_ADDR": ranks.address or "127.0.0.1",
        "MASTER_PORT": str(ranks.port or 0),
    }
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        # Else DeepSpeed compiles an all-reduce for inference, a minute at the first start; whoever is killed during
        # that leaves a lock for which every later start waits for ever.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not torch.distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if ranks.world == 1:  # nobody to meet, so no port that another program could take meanwhile
            alone = torch.distributed.HashStore()
            torch.distributed.init_process_group(backend, store=alone, rank=0, world_size=1, timeout=PATIENCE)
        else:
            _await_name(os.environ["MASTER_ADDR"])
        deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=PATIENCE)
    return deepspeed


def most(number: int) -> int:
    """The largest `number` of all ranks."""
    found = torch.tensor([number], device=default_device())
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return int(found.item())


def _await_name(host: str) -> None:
    """Until the name of rank 0's machine can be resolved: in a cluster that starts, names come late.

    Raises: ConfigError after NAME_S seconds; torch would try for as long as a collective may take.
    """
    deadline, said = time.monotonic() + NAME_S, False
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"MASTER_ADDR={host} is the name of no machine: {error.strerror or error}",
                    fix="set it to the name or address of rank 0's machine",
                ) from error
            if not said:
                print(f"mmseq: waiting for the name {host} (MASTER_ADDR)", file=sys.stderr, flush=True)
                said = True
            time.sleep(1.0)


def agree(flag: bool) -> bool:
    """Whether `flag` is true on any rank; the same answer on all."""
    return bool(most(int(flag)))


def require_shared(folder: Path) -> None:
    """Make `folder`. Raises: on every rank, OSError or ConfigError when it cannot be written, ConfigError when it is
    not the same place for all of them."""
    mark = folder / ".shared"
    number, problem = [secrets.token_hex(8)], None
    torch.distributed.broadcast_object_list(number, 0)
    if torch.distributed.get_rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mark.write_text(number[0])
        except OSError as error:
            problem = error
    if agree(problem is not None):
        raise problem or ConfigError(f"rank 0 cannot write to {folder.absolute()}")
    missing = not (mark.is_file() and mark.read_text() == number[0])
    if agree(missing):
        raise ConfigError(
            f"{folder.absolute()} is not the same folder on every rank, so no rank could read a checkpoint of all",
            fix="give out= as an absolute path on a file system that all nodes share",
        )
    if torch.distributed.get_rank() == 0:
        mark.unlink()


def hold_folder(folder: Path) -> IO[str] | None:
    """Keep other runs out of `folder` while the file that rank 0 gets is open.

    Raises: ConfigError on all ranks when another run, perhaps a rank that outlived its launcher, has it.
    """
    file, taken = None, None
    if torch.distributed.get_rank() == 0:
        file = (folder / LOCK_FILE).open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        except BlockingIOError:
            file.seek(0)
            taken = file.read() or "another process"
        except OSError:  # a file system without locks
            pass
    if agree(taken is not None):
        raise ConfigError(f"{folder} is in use by {taken or 'another run'}", fix="end that run, or use another out=")
    return file


def sequence_group(size: int) -> Any:
    """The process group of the `size` consecutive ranks that share lines of tokens with this one; None for 1."""
    return None if size == 1 else torch.distributed.new_subgroups(group_size=size)[0]


def leave(code: int = 0, message: str | None = None) -> None:
    """Leave the process at once: ZeRO-3's threads can abort a normal interpreter exit.

    message: why, for the table that torchrun prints last, which would hide what was printed before it.
    """
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if message and report:
        Path(report).parent.mkdir(parents=True, exist_ok=True)
        Path(report).write_text(json.dumps({"message": message, "timestamp": int(time.time())}))
    for child in multiprocessing.active_children():  # processes of the loader would hold our output open
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    if torch.distributed.is_initialized():
        os._exit(code)
