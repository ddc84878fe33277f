"""Ranks for tests: real processes that train, forked from one that has imported everything already.

A process started from nothing spends most of a tiny run on importing torch and DeepSpeed; forked from a server
that has them, a run takes about a second, so that hundreds can be killed and resumed in a test.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from torch.distributed import TCPStore

from support.faults import Fault

_PRELOAD = ["mmseq.training.train", "mmseq.cli", "deepspeed", "deepspeed.runtime.zero.stage3"]


@dataclass
class Finished:
    """codes: exit code by rank, negative for the signal that killed it. output: of all ranks."""

    codes: list[int]
    output: str


def start_ranks(
    command: Sequence[str],
    ranks: int,
    output: Path,
    *,
    fault: Fault | None = None,
    environment: dict[str, str] | None = None,
) -> list[BaseProcess]:
    """Start `mmseq COMMAND` on each of `ranks` processes on this machine, as torchrun would."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    # Ranks meet at a store of this process, as they do at torchrun's: a port chosen for them could be taken meanwhile.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    started = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        own |= {**meet, "OMP_NUM_THREADS": "1", **(environment or {})}
        process = context.Process(target=_run, args=(list(command), own, str(output), fault))
        process.start()
        process.store = store  # type: ignore[attr-defined]  # it lives as long as the ranks are of interest
        started.append(process)
    return started


def wait_for(processes: Sequence[BaseProcess], output: Path, *, timeout_s: float = 120) -> Finished:
    """Wait; when one ends with an error the others are ended, as a launcher does."""
    deadline = time.monotonic() + timeout_s
    while any(p.is_alive() for p in processes):
        failed = any(p.exitcode not in (None, 0) for p in processes)
        if failed or time.monotonic() > deadline:
            time.sleep(0.2)
            for p in processes:
                if p.is_alive():
                    p.kill()
        for p in processes:
            p.join(0.02)
    return Finished([p.exitcode or 0 for p in processes], output.read_text(errors="replace"))


def run_ranks(command: Sequence[str], ranks: int, output: Path, **options) -> Finished:
    return wait_for(start_ranks(command, ranks, output, **options), output)


def _run(command: list[str], environment: dict[str, str], output: str, fault: Fault | None) -> None:
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(environment)
    import torch

    from mmseq.cli import main

    torch.set_num_threads(1)
    if fault is not None:
        fault.install()
    code = main(command)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
