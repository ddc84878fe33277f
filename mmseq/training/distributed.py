"""Joining and leaving the ranks of a run."""

from __future__ import annotations

import os
import secrets
import socket
import sys
from pathlib import Path
from typing import Any

import torch

from mmseq.errors import ConfigError, require

EXIT_PREEMPTED = 85  # asked to stop, saved, to be started again


class Preempted(Exception):
    """The run was asked to stop and has saved; the same command goes on from there."""


def start_deepspeed(world: int) -> Any:
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


def agree(flag: bool) -> bool:
    """Whether `flag` is true on any rank; the same answer on all."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seen = torch.tensor([int(flag)], device=device)
    torch.distributed.all_reduce(seen, op=torch.distributed.ReduceOp.MAX)
    return bool(seen.item())


def require_shared(folder: Path) -> None:
    """Raises: ConfigError on every rank when `folder` is not the same place for all of them."""
    mark = folder / ".shared"
    number = [secrets.token_hex(8)]
    torch.distributed.broadcast_object_list(number, 0)
    if torch.distributed.get_rank() == 0:
        mark.write_text(number[0])
    torch.distributed.barrier()
    missing = not (mark.is_file() and mark.read_text() == number[0])
    if agree(missing):
        raise ConfigError(
            f"{folder.absolute()} is not the same folder on every rank, so no rank could read a checkpoint of all",
            fix="give out= as an absolute path on a file system that all nodes share",
        )
    if torch.distributed.get_rank() == 0:
        mark.unlink()


def leave(code: int = 0) -> None:
    """Leave the process at once: ZeRO-3's threads can abort a normal interpreter exit."""
    sys.stdout.flush()
    sys.stderr.flush()
    if torch.distributed.is_initialized():
        os._exit(code)
