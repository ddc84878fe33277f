"""Recorded demonstrations as a LeRobot v3 dataset.

    write_lerobot(record_episodes(DEMO_TASKS, 50), "dataset")

`meta/mmseq.json` also names the layout seed of each episode (`data/lerobot_writer.py` says what else there is).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from mmseq.errors import DataError
from mmseq.simulation.metaworld import robot
from mmseq.simulation.record import RecordedEpisode, embodiment


def write_lerobot(episodes: Iterable[RecordedEpisode], path: str | Path, *, repo_id: str = "mmseq/metaworld") -> Path:
    """Write `episodes`, which may be an iterator still recording, as a LeRobot v3 dataset at `path`.

    Frames hold `observation.images.<camera>` (H.264 4:4:4, read back at 49 dB), `observation.state` (x, y, z in
    metres, gripper opening 0 to 1), `action` (dx, dy, dz, gripper, each in [-1, 1]) and the instruction as task.

    Raises: DataError when `path` exists or there are no episodes; DependencyError without LeRobot.
    """
    from mmseq.data.lerobot_writer import LeRobotWriter

    path, writer, lightweight = Path(path), None, []
    if path.exists():
        raise DataError(f"{path} already exists", fix="choose another folder or remove it")
    for episode in episodes:
        if writer is None:
            contract = robot(episode.camera, episode.images.shape[1], episode.rate_hz)
            writer = LeRobotWriter(path, contract, repo_id=repo_id)
        writer.add(episode.to_episode(), task=episode.task)
        lightweight.append(replace(episode, images=episode.images[:1].copy()))
    if writer is None:
        raise DataError("there are no episodes to write")
    seeds = [
        {"task": e.task, "seed": e.seed, "spread": e.spread, "steps": len(e), "success": e.success} for e in lightweight
    ]
    writer.close(embodiment(lightweight), episodes=seeds)
    return path
