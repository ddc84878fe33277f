"""Faults for tests: what can go wrong in a real process, made to happen at a chosen point."""

from __future__ import annotations

import os
import resource
import signal
import sys
from dataclasses import dataclass
from typing import Any, Protocol

WRITES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "os.replace")


class Fault(Protocol):
    """Installed in every rank before its command runs."""

    def install(self) -> None: ...


@dataclass
class KillAt:
    """Kill rank `rank` with SIGKILL at its `count`-th file operation below `folder` (Python's audit events)."""

    folder: str
    count: int
    rank: int = 0

    def install(self) -> None:
        if int(os.environ["RANK"]) != self.rank:
            return
        seen = 0

        def hook(event: str, args: tuple) -> None:
            nonlocal seen
            if event in WRITES and args and self.folder in str(args[0]):
                seen += 1
                if seen == self.count:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)


@dataclass
class SmallDisk:
    """No file can grow beyond `size` bytes, as on a disk that is full."""

    size: int

    def install(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


@dataclass
class NotFinite:
    """The loss, or only its gradient, is not finite at some passes of rank `rank`, counted from 0."""

    passes: tuple[int, ...]
    where: str = "loss"  # or gradient
    rank: int = 0

    def install(self) -> None:
        import torch

        from mmseq.training.engine import Objective

        forward, made = Objective.forward, 0

        def broken(objective: Any, batch: Any) -> Any:
            nonlocal made
            loss, sums = forward(objective, batch)
            if objective.training:
                if made in self.passes and int(os.environ["RANK"]) == self.rank:
                    if self.where == "loss":
                        loss, sums = loss * float("nan"), sums * torch.tensor([[float("nan")], [1.0]])
                    else:
                        loss = loss + (loss * torch.inf - (loss * torch.inf).detach())
                made += 1
            return loss, sums

        Objective.forward = broken  # type: ignore[method-assign]
