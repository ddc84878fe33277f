"""Action-free video of a "person" doing the tasks: the same physics, an arm and a hand instead of the robot.

    write_human_videos("videos", [*DEMO_TASKS, *VIDEO_TASKS], videos_per_task=20)

What stands in for human video in tests and in the demo: another body, another viewpoint, no actions, captions.
"""

# mujoco and gymnasium bring no types for what is used here
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmseq.errors import DataError
from mmseq.mp4 import write_video
from mmseq.simulation.record import record_episodes

SKIN_RGBA = np.array([0.86, 0.64, 0.5, 1.0], dtype=np.float32)
SLEEVE_RGBA = np.array([0.16, 0.3, 0.52, 1.0], dtype=np.float32)
SHOULDER_M = np.array([0.12, -0.05, 0.62])  # a person standing where the robot's base is
FOREARM_M = 0.26


def write_human_videos(
    path: str | Path,
    tasks: Sequence[str],
    videos_per_task: int,
    *,
    seed: int = 1,
    rate_hz: float = 20,
    **scene: Any,
) -> list[Path]:
    """Write MP4 files and `captions.jsonl` into the folder `path`; returns the files.

    Each line of `captions.jsonl` holds `file`, `caption`, `captions` (all phrasings), `plan` and `task`. There are
    no actions and no proprio anywhere. scene: the other arguments of `record_episodes`; of a camera named `human`,
    without noise.

    Raises: DataError when `path` holds captions already.
    """
    path = Path(path)
    if (path / "captions.jsonl").exists():
        raise DataError(f"{path} already holds videos", fix="choose another folder or remove it")
    path.mkdir(parents=True, exist_ok=True)
    settings = {"noise": 0.0, "camera": "human", **scene, "body": "human", "rate_hz": rate_hz}
    episodes = record_episodes(tasks, videos_per_task, seed=seed, **settings)
    files, lines = [], []
    for number, episode in enumerate(episodes):
        files.append(path / f"{episode.task}-{number % videos_per_task:04d}.mp4")
        write_video(files[-1], episode.images, rate_hz, crf=4)  # 49 dB: the small frames keep their colours
        caption = {"file": files[-1].name, "caption": episode.texts[0], "captions": list(episode.texts)}
        lines.append(
            json.dumps({**caption, "plan": episode.plan, "task": episode.task, "success": episode.success}) + "\n"
        )
    (path / "captions.jsonl").write_text("".join(lines))
    return files


def draw_arm(scene, *, hand_m: np.ndarray, fingertips_m: np.ndarray, opening: float, forearm: bool = True) -> None:
    """Append an arm to a MuJoCo scene, its fingers closing along y as the gripper's do.

    hand_m: (3,) where the gripper's body is. fingertips_m: (3,) between its fingers. opening: 0 closed, 1 open.
    forearm: False draws a hand alone.
    """
    wrist = hand_m + np.array([0.0, -0.01, 0.05])
    elbow = wrist + FOREARM_M * _unit(SHOULDER_M - wrist)
    palm = (wrist + fingertips_m) / 2 + np.array([0.0, 0.0, 0.025])
    if forearm:
        _capsule(scene, wrist, elbow, 0.027, SKIN_RGBA)
        _capsule(scene, wrist + 0.45 * (elbow - wrist), elbow, 0.036, SLEEVE_RGBA)
        _capsule(scene, elbow, SHOULDER_M, 0.042, SLEEVE_RGBA)
    _ellipsoid(scene, palm, (0.036, 0.022, 0.042), SKIN_RGBA)
    half_gap = 0.012 + 0.04 * opening
    for side in (-1.5, -0.5, 0.5, 1.5):
        knuckle = palm + np.array([0.017 * side, 0.012, -0.02])
        tip = fingertips_m + np.array([0.014 * side, half_gap, -0.012 + 0.004 * abs(side)])
        bend = (knuckle + tip) / 2 + np.array([0.0, 0.012 + 0.01 * opening, 0.004])
        _capsule(scene, knuckle, bend, 0.0085, SKIN_RGBA)
        _capsule(scene, bend, tip, 0.0075, SKIN_RGBA)
    root = palm + np.array([-0.02, -0.014, -0.005])
    tip = fingertips_m + np.array([-0.004, -half_gap, -0.004])
    bend = (root + tip) / 2 + np.array([-0.006, -0.014, 0.0])
    _capsule(scene, root, bend, 0.011, SKIN_RGBA)
    _capsule(scene, bend, tip, 0.009, SKIN_RGBA)


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def next_geom(scene):
    """A free place of a MuJoCo scene's geoms."""
    if scene.ngeom >= scene.maxgeom:
        raise DataError(f"the scene is full: {scene.maxgeom} geoms")
    scene.ngeom += 1
    return scene.geoms[scene.ngeom - 1]


def _capsule(scene, start_m: np.ndarray, end_m: np.ndarray, radius_m: float, rgba: np.ndarray) -> None:
    import mujoco

    geom, kind = next_geom(scene), mujoco.mjtGeom.mjGEOM_CAPSULE
    mujoco.mjv_initGeom(geom, kind, np.zeros(3), np.zeros(3), np.eye(3).ravel(), rgba)
    mujoco.mjv_connector(geom, kind, radius_m, start_m, end_m)


def _ellipsoid(scene, centre_m: np.ndarray, radii_m: tuple[float, float, float], rgba: np.ndarray) -> None:
    import mujoco

    kind = mujoco.mjtGeom.mjGEOM_ELLIPSOID
    mujoco.mjv_initGeom(next_geom(scene), kind, np.array(radii_m), centre_m, np.eye(3).ravel(), rgba)
