"""A session: one robot's connection, and what the server remembers of it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Awaitable, Callable
from typing import Any

from mmseq.serving.chunking import Chunking, ChunkMemory
from mmseq.serving.history import History
from mmseq.serving.policy import Contract
from mmseq.serving.scheduler import Job

_numbers = itertools.count(1)


class Session:
    """job: the request that waits or is computed; a session has one at a time, since a connection is read one
    message after the other. hang_up: closes its connection with a code and a reason.
    """

    def __init__(self, chunking: Chunking, horizon: int, *, peer: str = ""):
        self.number, self.peer = next(_numbers), peer
        self.memory = ChunkMemory(chunking, horizon)
        self.opened_at = self.asked_at = time.monotonic()
        self.embodiment: str | None = None
        self.history = History(1)
        self.requests = 0
        self.standing = True  # as far as is known: it was sent nothing that it still executes
        self.job: Job | None = None
        self.hang_up: Callable[[int, str], Awaitable[None]] | None = None

    def forget(self) -> None:
        """What the robot was to execute."""
        self.memory.forget()
        self.standing = True

    def serves(self, embodiment: str, contract: Contract) -> None:
        """Another robot on the same connection begins from nothing."""
        if self.embodiment != embodiment:
            self.history = History(contract.history, contract.kept_keys.get(embodiment, ()))
            self.memory, self.standing = ChunkMemory(self.memory.chunking, self.memory.horizon), True
            self.embodiment = embodiment

    def status(self) -> dict[str, Any]:
        now = time.monotonic()
        return {
            "session": self.number,
            "peer": self.peer,
            "embodiment": self.embodiment,
            "requests": self.requests,
            "open_s": round(now - self.opened_at, 1),
            "quiet_s": round(now - self.asked_at, 1),
        }
