"""One episode of the simulator, driven by the control loop of robots in simulated time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmseq.errors import ServeError
from mmseq.evaluation.controllers import OTHER_LAYOUT, expert_episode
from mmseq.evaluation.splices import SpliceMeter
from mmseq.grammar import parse_offset
from mmseq.simulation.base import Simulator, to_wire
from mmseq.tasks import Task


class Driver:
    """One episode of the robots' control loop, in simulated time. Is the `mmseq_client.Robot` of the simulator too."""

    def __init__(self, env: Simulator, client: Any, settings: Mapping[str, Any], rng: np.random.Generator, seed: int):
        """`env` stands at the start of the episode of `seed`. What the policy is shown besides what the robot sees, the
        expert makes: a demonstration in another layout, goals in this one."""
        from mmseq_client import Chunking, ControlLoop, SimulatedClock, SimulatedExecutor
        from mmseq_client.rules import resting_action

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
            shown=self._shown(seed, settings["max_steps"]),
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
        at = self.env.steps
        reached = lambda steps: self._goals[min(max(at + steps, 1), len(self._goals)) - 1]
        before = range(1 - self._clip, 1)  # a clip ends there
        goals = {k: np.stack([reached(n + i)[seen] for i in before]) for k, (seen, n) in self._wanted.items()}
        goals = {key: goal[0] if self._clip == 1 else goal for key, goal in goals.items()}
        return self._wire(self.env.observe()) | goals

    def _wire(self, seen: dict[str, np.ndarray]) -> dict[str, Any]:
        return to_wire(seen, [camera["name"] for camera in self.contract()["cameras"]])

    def _shown(self, seed: int, max_steps: int) -> dict[str, Any]:
        """What is sent once: the frames of a demonstration, and how it looks at the end. Goals on the way are kept."""
        name, metadata = self.contract()["name"], self.client.metadata
        required, kept = metadata["required_keys"][name], metadata.get("kept_keys", {}).get(name, ())
        # by the key that the server asks for, in which the offset may be in seconds: one camera may show several goals
        self._wanted: dict[str, tuple[str, int]] = {}
        for key in (key for key in required if "@+" in key):
            camera, _, at = key.partition("@")
            self._wanted[key] = camera, parse_offset(at).steps(self.contract()["rate_hz"])  # type: ignore[union-attr]
        given = [p for p in Task.parse(metadata["policy"]).place(self.contract()["rate_hz"]) if not p.predicted]
        self._clip = max((p.steps for p in given if p.segment.at.startswith("@+")), default=1)
        ends = [key for key in kept if key.endswith("@end")]
        self._goals = self._expert(seed, seed, max_steps) if self._wanted or ends else []
        shown: dict[str, Any] = {key: self._goals[-1][key.removesuffix("@end")] for key in ends}
        demos = [key for key in kept if key not in ends]
        clip = self._expert(seed, seed + OTHER_LAYOUT, max_steps) if demos else []
        return shown | {
            key: np.stack([seen[f"observation.images.{key.rpartition('.')[2]}"] for seen in clip]) for key in demos
        }

    def _expert(self, seed: int, layout: int, max_steps: int) -> list[dict[str, Any]]:
        return [self._wire(seen) for _, seen in expert_episode(self.env, seed, layout, max_steps)]

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
