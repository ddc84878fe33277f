"""Demonstrations of the scripted experts, recorded from seeds.

    for episode in record_episodes(DEMO_TASKS, 50, seed=0):
        episode.images, episode.proprio, episode.action

An episode is a function of (seed, task, its number) alone: any number of workers yields the same episodes in the
same order. The expert is disturbed in short bursts; what is recorded is what was executed.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mmseq.embodiment import Axes, Embodiment
from mmseq.episode import IMAGE_PREFIX, Episode
from mmseq.errors import DataError, EpisodeError
from mmseq.simulation.experts import MAX_STEPS, TASKS, task_language
from mmseq.simulation.metaworld import PROPRIO_NAMES, ROBOT, MetaWorldEnv, robot
from mmseq.simulation.workers import environment, run_jobs

STEPS_AFTER_SUCCESS = 4  # a chunk of H actions needs H, or no sample of it comes from just before the success
ATTEMPTS = 12  # seeds tried for one episode before giving up; the hardest task of `TASKS` fails on a quarter

BURST_PROBABILITY = 0.06  # per step, so about two bursts in an episode
BURST_STEPS = (2, 4)


@dataclass(frozen=True, kw_only=True)
class RecordedEpisode:
    """One episode: a demonstration that succeeded, or play. Step t: observed at t, executed from t to t + 1.

    texts: the instruction this episode was given, then its other phrasings. images: uint8 (steps, size, size, 3).
    proprio: float32 (steps, 4), x y z in metres and the gripper's opening. action: float32 (steps, 4) in [-1, 1].
    success: None where nothing was to be reached. seed, spread: of the layout, for `MetaWorldEnv`.
    """

    task: str
    texts: tuple[str, ...]
    plan: str | None
    images: np.ndarray
    proprio: np.ndarray
    action: np.ndarray
    success: bool | None
    seed: int
    spread: float = 1.0
    camera: str = "front"
    rate_hz: float = 20.0

    def __len__(self) -> int:
        return len(self.action)

    def to_episode(self) -> Episode:
        return Episode.from_arrays(
            id=f"{self.task}-{self.seed}",
            rate_hz=self.rate_hz,
            arrays={f"{IMAGE_PREFIX}{self.camera}": self.images, "proprio": self.proprio, "action": self.action},
            texts=list(self.texts),
            plans=[self.plan] if self.plan else [],
            embodiment=ROBOT,
            success=self.success,
            source="metaworld",
            metadata={"task": self.task, "seed": self.seed, "spread": self.spread},
        )


def record_episodes(
    tasks: Sequence[str],
    episodes_per_task: int,
    *,
    seed: int = 0,
    noise: float = 0.7,
    gain: float = 1.0,
    after_success: int = STEPS_AFTER_SUCCESS,
    spread: float = 1.0,
    workers: int = 2,
    camera: str = "front",
    body: str = "robot",
    size: int = 64,
    rate_hz: float = 20,
    shift: str = "plain",
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[RecordedEpisode]:
    """Yield `episodes_per_task` successful episodes of each task, task by task.

    noise: length of the burst offset added to dx, dy, dz, in action units; 0 records the undisturbed expert.
    gain: of the expert, see `Expert`. after_success: steps that it goes on for after that.
    spread, shift: as in `MetaWorldEnv`.
    workers: processes, which are spawned, so that a script needs the usual `if __name__ == "__main__"`; with 0 or 1
    everything runs in this one. on_progress: called with (episodes done, episodes in all).

    Raises: DataError when an episode does not succeed within `ATTEMPTS` seeds.
    """
    for task in tasks:
        task_language(task)
    settings = {"seed": seed, "noise": noise, "gain": gain, "after_success": after_success}
    scene = {"spread": spread, "camera": camera, "body": body, "size": size, "rate_hz": rate_hz, "shift": shift}
    yield from in_workers(_record, tasks, episodes_per_task, scene, settings, workers, on_progress)


def in_workers(
    record: Callable[..., RecordedEpisode],
    tasks: Sequence[str],
    episodes_per_task: int,
    scene: dict[str, Any],
    settings: dict[str, Any],
    workers: int,
    on_progress: Callable[[int, int], None] | None,
) -> Iterator[RecordedEpisode]:
    """`record(env, number, **settings)` for every task and number, in order, in `workers` processes.

    record: a function of a module, since the processes import it. scene: how each `MetaWorldEnv` is made.
    """
    jobs = [
        (record, task, range(first, min(first + 5, episodes_per_task)), scene, settings)
        for task in tasks
        for first in range(0, episodes_per_task, 5)
    ]
    apart = workers if workers > 1 and len(jobs) > 1 else 0
    yield from run_jobs(_record_job, jobs, apart, len(tasks) * episodes_per_task, on_progress)


def _record_job(job: tuple[Callable, str, range, dict, dict]) -> list[RecordedEpisode]:
    record, task, numbers, scene, settings = job
    env = environment((task, *scene.values()), lambda: MetaWorldEnv(task, **scene))
    return [record(env, number, **settings) for number in numbers]


def _record(env: MetaWorldEnv, number: int, *, seed: int, **settings: Any) -> RecordedEpisode:
    for attempt in range(ATTEMPTS):
        rng = np.random.default_rng([seed, zlib.crc32(env.task.encode()), number, attempt])
        episode = _attempt(env, rng, **settings)
        if episode is not None:
            return episode
    raise DataError(f"the expert of {env.task!r} failed {ATTEMPTS} times in a row", fix="lower noise")


def _attempt(
    env: MetaWorldEnv, rng: np.random.Generator, *, noise: float, gain: float, after_success: int
) -> RecordedEpisode | None:
    """One episode, or None when the expert did not succeed within `MAX_STEPS`."""
    layout_seed = int(rng.integers(2**31))
    language = TASKS[env.task]
    first = int(rng.integers(len(language.instructions)))
    texts = (language.instructions[first], *language.instructions[:first], *language.instructions[first + 1 :])
    expert = env.expert(gain)
    env.begin(layout_seed)
    limit = round(MAX_STEPS * env.rate_hz / 20)
    images, proprio, actions = [], [], []
    burst_left, offset, succeeded = 0, np.zeros(3), 0
    while succeeded <= after_success:
        if env.steps >= limit and not env.succeeded:
            return None
        action = expert()
        if burst_left == 0 and rng.random() < BURST_PROBABILITY:
            burst_left = int(rng.integers(BURST_STEPS[0], BURST_STEPS[1] + 1))
            direction = rng.normal(size=3)
            offset = noise * direction / np.linalg.norm(direction)
        if burst_left > 0 and not env.succeeded:
            action[:3] = np.clip(action[:3] + offset, -1, 1)
        burst_left = max(0, burst_left - 1)
        observation = env.observe()
        images.append(observation[f"{IMAGE_PREFIX}{env.camera}"])
        proprio.append(observation["proprio"])
        actions.append(action)
        env.act(action)
        succeeded += env.succeeded
    return RecordedEpisode(
        task=env.task,
        texts=texts,
        plan=language.plan,
        images=np.stack(images),
        proprio=np.stack(proprio),
        action=np.stack(actions).astype(np.float32),
        success=True,
        seed=layout_seed,
        spread=env.spread,
        camera=env.camera,
        rate_hz=env.rate_hz,
    )


def embodiment(episodes: Sequence[RecordedEpisode]) -> Embodiment:
    """The contract of the simulated Sawyer, with the statistics of `episodes`.

    Raises: EpisodeError when there are no episodes.
    """
    if not episodes:
        raise EpisodeError("an embodiment needs recorded episodes for its statistics")
    contract = robot(episodes[0].camera, episodes[0].images.shape[1], episodes[0].rate_hz)
    assert contract.proprio is not None
    # the statistics are of the data, the limits of the simulator
    seen = np.concatenate([episode.proprio for episode in episodes])
    found = Axes.from_values(seen, PROPRIO_NAMES)
    return replace(contract, proprio=replace(contract.proprio, low=found.low, high=found.high))
