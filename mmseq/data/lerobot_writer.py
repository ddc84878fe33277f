"""Episodes as a LeRobot v3 dataset, written by LeRobot itself.

    with LeRobotWriter("dataset", contract) as writer:
        for episode in episodes:
            writer.add(episode)

Besides LeRobot's own files: `meta/embodiment.json`, the contract of the robot, and `meta/mmseq.json`, which maps each
task string to its plan and its other phrasings, and holds what `close` was told.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mmseq.embodiment import Embodiment
from mmseq.episode import IMAGE_PREFIX, Episode
from mmseq.errors import DataError, EpisodeError, require
from mmseq.streams import row_of

# yuv444p, since at 64 pixels a quarter of the colour is what 4:2:0 loses first (34 dB against 49)
CRF, PIXEL_FORMAT, PRESET, KEYFRAME_EVERY = 4, "yuv444p", "ultrafast", 2
MAX_EPISODE_STEPS = 4096  # LeRobot drops frames when its encoder's queue is full, so the queue holds an episode
OUTCOME = "next.success"


class LeRobotWriter:
    """Writes a dataset, an episode at a time; as a context it finishes the dataset, unless something failed.

    contract: of the robot; its cameras and vectors become columns, by LeRobot's names. columns: further ones, a number
    a step, which `add` is given. The first episode decides whether outcomes are written.
    Raises: DataError when `path` exists, or a rate that LeRobot cannot have; DependencyError without LeRobot.
    """

    def __init__(
        self, path: str | Path, contract: Embodiment, *, repo_id: str = "mmseq/episodes", columns: tuple[str, ...] = ()
    ):
        self.path, self.contract, self.columns = Path(path), contract, columns
        if self.path.exists():
            raise DataError(f"{path} already exists", fix="choose another folder or remove it")
        if contract.rate_hz != round(contract.rate_hz):
            raise DataError(
                f"{contract.name!r} has {contract.rate_hz:g} steps per second, LeRobot writes whole numbers of them",
                fix="import its data again with another --rate-hz",
            )
        require("lerobot", "lerobot")
        self._repo_id, self._dataset, self._outcomes = repo_id, None, False
        self._tasks: dict[str, dict[str, Any]] = {}
        self._names = {f"{IMAGE_PREFIX}{c.name}": f"observation.images.{c.name}" for c in contract.cameras}
        self._names |= {name: row_of(name).column or f"observation.{name}" for name in contract.vectors}

    def __enter__(self) -> LeRobotWriter:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None and self._dataset is not None:
            self.close()

    def add(self, episode: Episode, columns: Mapping[str, np.ndarray] | None = None, **said: Any) -> None:
        """Append an episode. columns: a number for each step, for each column. said: of its task, in mmseq.json.

        Raises: EpisodeError when it lacks what the contract has, or an outcome where others have one, has another
        rate, or more than `MAX_EPISODE_STEPS`.
        """
        columns = columns or {}
        missing = [name for name in self._names if name not in episode] + [c for c in self.columns if c not in columns]
        if missing:
            raise EpisodeError(f"episode {episode.id!r} has no {', '.join(missing)}, which the dataset has")
        mine, theirs = self.contract.rate_hz, episode.rate_hz
        if abs(mine - theirs) > 1e-6:
            raise EpisodeError(f"episode {episode.id!r} has {theirs:g} steps per second, the dataset {mine:g}")
        if len(episode) > MAX_EPISODE_STEPS:
            raise EpisodeError(
                f"episode {episode.id!r} has {len(episode)} steps, LeRobot's writer holds {MAX_EPISODE_STEPS}",
                fix="cut it into shorter ones",
            )
        with _quiet():
            if self._dataset is None:
                self._outcomes = episode.success is not None
                self._dataset = self._create(episode)
            if self._outcomes and episode.success is None:
                raise EpisodeError(f"episode {episode.id!r} has no outcome, episodes before it have")
            seen = {column: episode[name] for name, column in self._names.items()}
            for step in range(len(episode)):
                frame = {column: values[step] for column, values in seen.items()}
                frame |= {column: np.array([columns[column][step]], np.float32) for column in self.columns}
                frame |= {OUTCOME: np.array([bool(episode.success)])} if self._outcomes else {}
                texts, plans = episode.texts_of("text", step), episode.texts_of("plan", step)
                text = texts[0] if texts else ""
                self._dataset.add_frame({**frame, "task": text})
                known = self._tasks.get(text, {"paraphrases": [], "plan": ""})  # of an episode before, told otherwise
                phrasings = list(dict.fromkeys([*known["paraphrases"], *texts]))
                self._tasks[text] = {**said, "paraphrases": phrasings, "plan": known["plan"] or (plans or [""])[0]}
            self._dataset.save_episode()

    def close(self, contract: Embodiment | None = None, **said: Any) -> None:
        """Finish the dataset. contract: stored in place of that which it was made with, such as one with statistics.
        said: further keys of mmseq.json. Raises: DataError when there are no episodes."""
        if self._dataset is None:
            raise DataError("there are no episodes to write")
        with _quiet():
            self._dataset.finalize()
        (contract or self.contract).save(self.path / "meta" / "embodiment.json")
        (self.path / "meta" / "mmseq.json").write_text(json.dumps({"tasks": self._tasks, **said}, indent=2) + "\n")
        self._dataset = None

    def _create(self, episode: Episode) -> Any:
        from lerobot.configs.video import RGBEncoderConfig
        from lerobot.datasets.lerobot_dataset import LeRobotDataset

        features: dict[str, Any] = {}
        for name, column in self._names.items():
            if name.startswith(IMAGE_PREFIX):
                shape = episode[name].shape[1:]
                features[column] = {"dtype": "video", "shape": shape, "names": ["height", "width", "channels"]}
            else:
                axes = self.contract.vectors[name].names
                features[column] = {"dtype": "float32", "shape": (len(axes),), "names": list(axes)}
        features |= {column: {"dtype": "float32", "shape": (1,), "names": None} for column in self.columns}
        if self._outcomes:
            features[OUTCOME] = {"dtype": "bool", "shape": (1,), "names": None}  # of the episode
        return LeRobotDataset.create(
            self._repo_id,
            fps=round(self.contract.rate_hz),
            features=features,
            root=self.path,
            robot_type=self.contract.name,
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
