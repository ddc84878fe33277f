"""Joining and leaving the ranks of a run."""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

import torch

from mmseq.errors import require


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


def leave(code: int = 0) -> None:
    """Leave the process at once: ZeRO-3's threads can abort a normal interpreter exit."""
    sys.stdout.flush()
    sys.stderr.flush()
    if torch.distributed.is_initialized():
        os._exit(code)
