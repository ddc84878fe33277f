"""Recorded demonstrations as a LeRobot v3 dataset, written by LeRobot itself.

    write_lerobot(record_episodes(DEMO_TASKS, 50), "dataset")

Besides LeRobot's own files: `meta/embodiment.json`, the contract of the robot, and `meta/mmseq.json`, which maps
each task string to its plan and its other phrasings, and names the layout seed of each episode.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from mmseq.errors import DataError, require
from mmseq.simulation.metaworld import ACTION_NAMES, PROPRIO_NAMES, ROBOT
from mmseq.simulation.record import RecordedEpisode, embodiment

# yuv444p, since at 64 pixels a quarter of the colour is what 4:2:0 loses first (34 dB against 49)
CRF, PIXEL_FORMAT, PRESET, KEYFRAME_EVERY = 4, "yuv444p", "ultrafast", 2
MAX_EPISODE_STEPS = 4096  # LeRobot drops frames when its encoder's queue is full, so the queue holds an episode


def write_lerobot(episodes: Iterable[RecordedEpisode], path: str | Path, *, repo_id: str = "mmseq/metaworld") -> Path:
    """Write `episodes`, which may be an iterator still recording, as a LeRobot v3 dataset at `path`.

    Frames hold `observation.images.<camera>` (H.264 4:4:4, read back at 49 dB), `observation.state` (x, y, z in
    metres, gripper opening 0 to 1), `action` (dx, dy, dz, gripper, each in [-1, 1]) and the instruction as task.

    Raises: DataError when `path` exists or there are no episodes; DependencyError without LeRobot.
    """
    path = Path(path)
    if path.exists():
        raise DataError(f"{path} already exists", fix="choose another folder or remove it")
    dataset, camera, lightweight, tasks = None, "", [], {}
    with _quiet():
        for episode in episodes:
            if dataset is None:
                dataset = _create(path, repo_id, episode)
                camera = f"observation.images.{episode.camera}"
            text = episode.texts[0]
            reached = np.array([episode.success])
            for image, state, action in zip(episode.images, episode.proprio, episode.action, strict=True):
                seen = {camera: image, "observation.state": state, "action": action}
                dataset.add_frame({**seen, "next.success": reached, "task": text})
            dataset.save_episode()
            tasks[text] = {"task": episode.task, "paraphrases": list(episode.texts), "plan": episode.plan}
            lightweight.append(replace(episode, images=episode.images[:1].copy()))
        if dataset is None:
            raise DataError("there are no episodes to write")
        dataset.finalize()
    embodiment(lightweight).save(path / "meta" / "embodiment.json")
    seeds = [
        {"task": e.task, "seed": e.seed, "spread": e.spread, "steps": len(e), "success": e.success} for e in lightweight
    ]
    (path / "meta" / "mmseq.json").write_text(json.dumps({"tasks": tasks, "episodes": seeds}, indent=2) + "\n")
    return path


def _create(path: Path, repo_id: str, episode: RecordedEpisode):
    require("lerobot", "lerobot")
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    features = {
        f"observation.images.{episode.camera}": {
            "dtype": "video",
            "shape": episode.images.shape[1:],
            "names": ["height", "width", "channels"],
        },
        "observation.state": {"dtype": "float32", "shape": (4,), "names": list(PROPRIO_NAMES)},
        "action": {"dtype": "float32", "shape": (4,), "names": list(ACTION_NAMES)},
        "next.success": {"dtype": "bool", "shape": (1,), "names": None},  # of the episode
    }
    return LeRobotDataset.create(
        repo_id,
        fps=round(episode.rate_hz),
        features=features,
        root=path,
        robot_type=ROBOT,
        video_backend="pyav",
        rgb_encoder=RGBEncoderConfig(vcodec="h264", pix_fmt=PIXEL_FORMAT, g=KEYFRAME_EVERY, crf=CRF, preset=PRESET),
        streaming_encoding=True,
        encoder_queue_maxsize=MAX_EPISODE_STEPS,
        encoder_threads=1,
        video_files_size_in_mb=2,  # LeRobot rewrites the last file for every episode
    )


@contextmanager
def _quiet():
    """Without LeRobot's page of torchcodec warnings, a progress bar per episode and x264's own statistics."""
    require("lerobot", "lerobot")
    import av
    import datasets

    logger = logging.getLogger("lerobot")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    av.logging.set_libav_level(av.logging.ERROR)
    try:
        yield
    finally:
        av.logging.set_libav_level(av.logging.INFO)  # FFmpeg's default
        av.logging.set_level(av.logging.get_level())  # LeRobot's encoder leaves FFmpeg writing to the terminal
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
