"""One episode of the simulator, driven by the control loop of robots in simulated time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmseq.errors import ServeError
from mmseq.evaluation.controllers import resting_action
from mmseq.evaluation.splices import SpliceMeter
from mmseq.simulation.base import Simulator, to_wire


class Driver:
    """One episode of the robots' control loop, in simulated time. Is the `mmseq_client.Robot` of the simulator too."""

    def __init__(self, env: Simulator, client: Any, settings: Mapping[str, Any], rng: np.random.Generator):
        from mmseq_client import Chunking, ControlLoop, SimulatedClock, SimulatedExecutor

        self.env, self.client = env, RecordingClient(client)
        self.clock, delay, jitter = SimulatedClock(), 1e-3 * settings["delay_ms"], 1e-3 * settings["jitter_ms"]
        latency = lambda: max(0.0, rng.uniform(delay - jitter, delay + jitter))
        timeout_s = max(1.0, 2 * (delay + jitter))
        self.executor = SimulatedExecutor(self.clock, latency, timeout_s)
        self.loop = ControlLoop(
            self.client,  # type: ignore[arg-type]
            self,
            Chunking(settings["chunking"], settings["execute"]),
            prompt=env.instructions[0],
            timeout_s=timeout_s,
            on_event=_fail,
            clock=self.clock,
            executor=self.executor,
        )
        self.splices = SpliceMeter(self.contract())
        self.command = resting_action(self.contract(), env.observe().get("proprio"))

    def next_action(self) -> np.ndarray:
        """What the robot does in the control step that begins now, (axes,)."""
        self.splices.add(self.loop.tick(), self.client.chunk, self.client.committed)
        self.clock.sleep(1 / self.loop.rate_hz)
        return self.command

    def contract(self) -> dict[str, Any]:
        """The served robot of the simulator's name, or the first."""
        served = self.client.metadata["embodiments"]
        return served.get(self.env.contract().name) or next(iter(served.values()))

    def observe(self) -> dict[str, Any]:
        return to_wire(self.env.observe(), [camera["name"] for camera in self.contract()["cameras"]])

    def act(self, action: np.ndarray) -> None:
        self.command = action

    def stop(self) -> None:
        pass


def _fail(kind: str, detail: str) -> None:
    """A policy that cannot answer is no policy that fails the task: the evaluation ends."""
    if kind in ("refused", "withheld", "broke", "contract"):
        raise ServeError(f"the server did not answer with a chunk: {kind}: {detail}")


class RecordingClient:
    """A client for simulated time: it keeps the last chunk that came back, and neither sends a deadline nor keeps
    the loop's timeout, which would be in real time."""

    def __init__(self, client: Any):
        self._client = client
        self.chunk: np.ndarray | None = None
        self.committed = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def infer(self, observation: dict[str, Any], *_: Any) -> dict[str, Any]:
        reply = self._client.infer({k: v for k, v in observation.items() if k != "deadline_ms"})
        self.chunk, self.committed = np.array(reply["actions"]), len(observation.get("action_prefix", ()))
        return reply
