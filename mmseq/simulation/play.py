"""Undirected play: the robot moves about a scene, near its things and away from them, with no task in mind.

    for episode in record_play(DEMO_TASKS, 20, seed=0):
        episode.images, episode.proprio, episode.action

What a lab records in minutes, of any scene, without a plan: it covers the workspace evenly, so a model of what actions
do learned from it does not read the action off the scene, as one does that has seen demonstrations alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from mmseq.episode import IMAGE_PREFIX
from mmseq.simulation.metaworld import MetaWorldEnv
from mmseq.simulation.record import RecordedEpisode, in_workers

WORKSPACE_M = ((-0.45, 0.35, 0.04), (0.45, 0.95, 0.36))  # where the hand is sent
NEAR_M = 0.12  # half of the waypoints lie about this close to the scene's object
WAYPOINT_STEPS = (4, 14)
TEXT = "play"


def record_play(
    tasks: Sequence[str],
    episodes_per_task: int,
    *,
    steps: int = 60,
    seed: int = 0,
    spread: float = 1.0,
    workers: int = 2,
    camera: str = "front",
    body: str = "robot",
    size: int = 64,
    rate_hz: float = 20,
    shift: str = "plain",
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[RecordedEpisode]:
    """Yield `episodes_per_task` episodes of `steps` control steps in the scene of each task.

    Each is a function of (seed, task, its number) alone. Its success is None, its text `TEXT`. The other arguments are
    those of `record_episodes`.
    """
    scene = {"spread": spread, "camera": camera, "body": body, "size": size, "rate_hz": rate_hz, "shift": shift}
    settings = {"seed": seed, "steps": steps}
    yield from in_workers(_play, tasks, episodes_per_task, scene, settings, workers, on_progress)


def _play(env: MetaWorldEnv, number: int, *, seed: int, steps: int) -> RecordedEpisode:
    rng = np.random.default_rng([seed, zlib.crc32(env.task.encode()), number, zlib.crc32(TEXT.encode())])
    layout_seed = int(rng.integers(2**31))
    env.begin(layout_seed)
    images, proprio, actions = [], [], []
    left, target, gain, effort = 0, np.zeros(3), 1.0, -1.0
    for _ in range(steps):
        if left == 0:
            left = int(rng.integers(*WAYPOINT_STEPS))
            target = rng.uniform(*WORKSPACE_M)
            if rng.random() < 0.5:
                target = env.privileged_state()[4:7] + rng.normal(0, NEAR_M, 3)
            gain = rng.uniform(2.0, 15.0)  # slow for exact hands, and fast enough to be at every limit
            effort = rng.choice([-1.0, 1.0]) if rng.random() < 0.5 else effort
        left -= 1
        observation = env.observe()
        motion = gain * (target - env.proprio()[:3]) + rng.normal(0, 0.15, 3)
        action = np.clip(np.append(motion, effort), -1, 1).astype(np.float32)
        images.append(observation[f"{IMAGE_PREFIX}{env.camera}"])
        proprio.append(observation["proprio"])
        actions.append(action)
        env.act(action)
    return RecordedEpisode(
        task=env.task,
        texts=(TEXT,),
        plan=None,
        images=np.stack(images),
        proprio=np.stack(proprio),
        action=np.stack(actions),
        success=None,
        seed=layout_seed,
        spread=env.spread,
        camera=env.camera,
        rate_hz=env.rate_hz,
    )
