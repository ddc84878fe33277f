"""Plays action chunks step by step: plain, or prefix-forced so that no chunk contradicts what is committed."""

from __future__ import annotations

from typing import Any

import numpy as np

from mmseq_client.client import Client, ClientError


class ActionQueue:
    """The actions that are still to be executed, float32 (n, axes), oldest first."""

    def __init__(self) -> None:
        self._actions: np.ndarray | None = None

    def __len__(self) -> int:
        return 0 if self._actions is None else len(self._actions)

    def replace(self, chunk: np.ndarray) -> None:
        """Put `chunk` (n, axes) in place of everything that is waiting."""
        chunk = np.asarray(chunk, dtype=np.float32)
        if chunk.ndim != 2 or not len(chunk) or not np.isfinite(chunk).all():
            raise ClientError(f"a chunk is a finite array (steps, axes), got {chunk.shape}")
        self._actions = chunk

    def peek(self, count: int) -> np.ndarray:
        """The next `count` actions, or as many as there are, without taking them."""
        return np.zeros((0, 0), np.float32) if self._actions is None else self._actions[:count].copy()

    def pop(self) -> np.ndarray:
        """Take the next action, (axes,)."""
        if not len(self):
            raise ClientError("there is no action left to execute")
        assert self._actions is not None
        action, self._actions = self._actions[0], self._actions[1:]
        return action

    def clear(self) -> None:
        self._actions = None


class ChunkPlayer:
    """One action per control step, asking the server after every `execute` of them.

    commit: 0 replaces the rest of the old chunk (plain). n > 0 is prefix-forced: the next n actions of the old
    chunk are committed, because a real robot goes on executing them while the model thinks; the new chunk is
    told to begin with them, so it continues them instead of jumping. Take n = latency x control rate.

        player = ChunkPlayer(client, execute=8, commit=4)
        while not done:
            done = robot.step(player.step(robot.observe()))
    """

    def __init__(self, client: Client, execute: int, commit: int = 0):
        horizon = client.horizon
        if not 1 <= execute <= horizon:
            raise ClientError(f"execute is {execute}, expected 1..{horizon} (the horizon)")
        if not 0 <= commit <= horizon - execute:
            raise ClientError(f"commit is {commit}, expected 0..{horizon - execute} (horizon - execute)")
        if commit and not client.metadata.get("prefix"):
            raise ClientError("the server's policy does not understand a prefix; use commit=0")
        self.client, self.execute, self.commit = client, execute, commit
        self.queue = ActionQueue()
        self.requests = 0
        self.last_reply: dict[str, Any] = {}
        self._until_request = 0

    @property
    def asks_next(self) -> bool:
        """Whether the next `step` asks the server, and so needs a whole observation."""
        return self._until_request == 0

    def step(self, observation: dict[str, Any]) -> np.ndarray:
        """The action of this control step, float32 (axes,). Raises: RefusedError, ClientError."""
        if self.asks_next:
            self._request(observation)
        self._until_request -= 1
        return self.queue.pop()

    def _request(self, observation: dict[str, Any]) -> None:
        prefix = self.queue.peek(self.commit)
        if len(prefix):
            observation = dict(observation, action_prefix=prefix)
        reply = self.client.infer(observation)
        chunk = np.asarray(reply["actions"])
        if len(prefix) and not np.allclose(chunk[: len(prefix)], prefix, atol=1e-5):
            raise ClientError("the new chunk does not begin with the committed actions")
        self.queue.replace(chunk)
        if len(chunk) < self.execute:
            raise ClientError(f"the chunk has {len(chunk)} steps, fewer than execute={self.execute}")
        self._until_request = self.execute
        self.last_reply = reply
        self.requests += 1

    def reset(self) -> None:
        """Forget the chunk under way, at the start of an episode."""
        self.queue.clear()
        self._until_request = 0
