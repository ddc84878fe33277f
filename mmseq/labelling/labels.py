"""Video becomes a robot's episodes: each step with the action and the state that were read off it, and a confidence.

label_source(open_labeller("runs/labeller"), "videos", "labelled")
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from mmseq.data.importing import square
from mmseq.data.lerobot_writer import LeRobotWriter
from mmseq.data.reader import EpisodeSource
from mmseq.data.sources import open_source
from mmseq.embodiment import Axes, Embodiment
from mmseq.episode import IMAGE_PREFIX, Episode, Stream
from mmseq.errors import CheckpointError, ConfigError, DataError, did_you_mean
from mmseq.inference.decoding import Decoder, Request
from mmseq.labelling.network import SETTINGS, LabellerNetwork, Labels
from mmseq.reading import Reading
from mmseq.streams import OWN_VECTORS
from mmseq.tasks import Task
from mmseq.tokenization.bundle import EpisodeTokens

CONFIDENCE = "label.confidence"  # the column of a dataset
APART = 4  # steps between the two frames from which a checkpoint tells actions
BATCH = 32  # requests that a checkpoint answers together


class VideoLabeller(Protocol):
    """What reads labels off frames uint8 (steps, H, W, 3) of its `camera`, of the size that `contract` says."""

    contract: Embodiment
    camera: str
    origin: dict[str, Any]  # what labels are signed with

    def label(self, frames: np.ndarray) -> Labels: ...


@dataclass(frozen=True, kw_only=True)
class LabelConfig(Reading):
    """What is labelled, how it is read, and what becomes of it."""

    camera: str | None = None  # of the source, that is taken for the labeller's; default: its only one
    min_confidence: float = 0.0  # episodes below it on average are left out
    workers: int = 1  # processes that label

    def check(self) -> None:
        """Raises: ConfigError naming the field."""
        if not 0 <= self.min_confidence <= 1:
            raise ConfigError(f"min_confidence is {self.min_confidence}", fix="give 0 to 1")
        if self.workers < 1:
            raise ConfigError(f"workers is {self.workers}", fix="give at least 1")


def open_labeller(path: str | Path, embodiment: str | None = None) -> VideoLabeller:
    """A labeller's folder, or a checkpoint whose arrows label. embodiment: the robot, of a checkpoint of several.

    Raises: CheckpointError for a folder that is neither.
    """
    if (Path(path) / SETTINGS).is_file():
        labeller = PixelLabeller(path)
        if embodiment not in (None, labeller.contract.name):
            raise ConfigError(f"the labeller in {path} is of {labeller.contract.name!r}, not of {embodiment!r}")
        return labeller
    if (Path(path) / "config.json").is_file():
        return ArrowLabeller(path, embodiment)
    raise CheckpointError(f"{path} holds neither a labeller nor a checkpoint", fix="train one: mmseq labeller train")


class PixelLabeller:
    """A labeller's network."""

    def __init__(self, path: str | Path):
        self._network = LabellerNetwork.load(path)
        self.contract, self.camera = self._network.contract, self._network.config.camera
        self.origin = {"labeller": str(path), "around": list(self._network.config.around)}

    def label(self, frames: np.ndarray) -> Labels:
        return self._network.label(frames)


class ArrowLabeller:
    """A checkpoint: inverse dynamics between frames `APART` steps apart, and the state of each frame.

    A step's action is the mean over all pairs of frames that enclose it; where they disagree, confidence is low.
    """

    actions, states = f"image, image@+{APART} -> action[{APART}]", "image -> proprio"

    def __init__(self, path: str | Path, embodiment: str | None = None):
        from mmseq.model.sequence_model import SequenceModel

        self._model = SequenceModel.from_pretrained(path)
        tokenizers = self._model.tokenizers
        assert tokenizers is not None
        robots = {n: e for n, e in tokenizers.embodiments.items() if set(OWN_VECTORS) <= set(e.vectors)}
        if len(robots) != 1 and embodiment not in robots:
            raise ConfigError(
                f"{path} knows {', '.join(robots) or 'no robot with actions and a state'}"
                + (f", not {embodiment!r}: {did_you_mean(embodiment, robots)}" if embodiment else ""),
                fix="name the robot with --embodiment",
            )
        for arrow in (self.actions, self.states):
            task = Task.parse(arrow)
            if not any(Task.parse(a).covers(task) for a in self._model.tasks.values()):
                raise CheckpointError(
                    f"{path} was not trained on {arrow!r}, so its labels would be noise",
                    fix="add the arrow to the mix, or label with a labeller (mmseq labeller train)",
                )
        self.contract = robots[embodiment] if embodiment else next(iter(robots.values()))
        if len(self.contract.cameras) != 1:
            raise ConfigError(f"{self.contract.name!r} has {len(self.contract.cameras)} cameras, video has one")
        self.camera = self.contract.cameras[0].name
        self.origin = {"checkpoint": str(path), "arrows": [self.actions, self.states]}

    def label(self, frames: np.ndarray) -> Labels:
        length, axes = len(frames), self.contract.vectors
        if length <= APART:
            raise DataError(f"a video of {length} frames is too short", fix=f"it takes more than {APART}")
        episode = Episode.from_arrays(
            "video", self.contract.rate_hz, {f"{IMAGE_PREFIX}{self.camera}": frames}, embodiment=self.contract.name
        )
        tokens = EpisodeTokens(episode, self._model.tokenizers)  # type: ignore[arg-type]
        chunks = self._decode(self.actions, tokens, range(length - APART), "action")
        state = self._decode(self.states, tokens, range(length), "proprio").reshape(length, -1)
        votes: list[list[np.ndarray]] = [[] for _ in range(length)]
        for start, chunk in enumerate(chunks):
            for step, action in enumerate(chunk):
                votes[start + step].append(action)
        votes[-APART:] = [v or votes[length - APART - 1] for v in votes[-APART:]]
        action = np.stack([np.mean(v, 0) for v in votes])
        for gripper in self.contract.grippers:
            axis = axes["action"].names.index(gripper.axis)
            middle = (gripper.open + gripper.closed) / 2
            high, low = max(gripper.open, gripper.closed), min(gripper.open, gripper.closed)
            action[:, axis] = np.where(action[:, axis] > middle, high, low)
        spread = np.maximum(action.std(0), 1e-6)
        doubt = np.stack([np.std(v, 0) for v in votes]) / spread
        error = np.concatenate([doubt**2, np.tile(doubt.mean(1, keepdims=True) ** 2, (1, state.shape[1]))], 1)
        return Labels(np.concatenate([action, state], 1).astype(np.float32), error, action.shape[1])

    def _decode(self, arrow: str, tokens: EpisodeTokens, steps: range, stream: str) -> np.ndarray:
        from mmseq.inference.predict import to_streams

        task, decoder, found = Task.parse(arrow), Decoder(self._model, speculate=True), []
        for first in range(steps.start, steps.stop, BATCH):
            asked = [Request(tokens, t) for t in range(first, min(first + BATCH, steps.stop))]
            for decoded in decoder.decode(task, asked):
                found.append(to_streams(decoded, self._model.tokenizers, tokens)[stream])  # type: ignore[arg-type]
        return np.stack(found)


def label_episode(
    labeller: VideoLabeller, source: EpisodeSource, index: int, camera: str | None
) -> tuple[Episode, np.ndarray]:
    """An episode of the robot from one of video, and the confidence of each step, float32 (steps,).

    Its words and its outcome stay; its frames are scaled to those of the robot's camera.
    """
    episode = source[index]
    wanted = next(c for c in labeller.contract.cameras if c.name == labeller.camera)
    if camera not in episode.cameras if camera else len(episode.cameras) != 1:
        raise ConfigError(
            f"episode {episode.id!r} has the cameras {', '.join(episode.cameras)}"
            + (f", not {camera!r}" if camera else ""),
            fix="name the one to label with --camera",
        )
    chosen = camera or episode.cameras[0]
    frames = np.stack([_fit(frame, wanted.height, wanted.width) for frame in source.frames(index, chosen)])
    found = labeller.label(frames)
    times = np.arange(len(frames)) / labeller.contract.rate_hz
    limits = labeller.contract.vectors
    streams = {
        f"{IMAGE_PREFIX}{labeller.camera}": Stream(frames, times),
        "action": Stream(_within(found.action, limits["action"]), times),
        "proprio": Stream(_within(found.state, limits["proprio"]), times),
    }
    labelled = replace(
        episode,
        rate_hz=labeller.contract.rate_hz,
        streams=streams,
        embodiment=labeller.contract.name,
        metadata={**episode.metadata, "labelled_by": labeller.origin},
    )
    return labelled, found.confidence


def label_source(
    labeller: str | Path,
    source: str | Path,
    out: str | Path,
    config: LabelConfig | None = None,
    *,
    embodiment: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Label every episode of a source, and write them to `out` as a LeRobot v3 dataset with a column `CONFIDENCE`.

    labeller: as for `open_labeller`. What was labelled lies in `<out>.labels` until the dataset is whole, so that the
    same call goes on after a kill. Returns what is also in meta/mmseq.json: by whom, how sure, how many were left out.
    Raises: DataError when `out` exists or nothing is left; ConfigError for a camera that is not there.
    """
    config = config or LabelConfig()
    config.check()
    out = Path(out)
    if out.exists():
        raise DataError(f"{out} already exists", fix="choose another folder or remove it")
    opened = open_labeller(labeller, embodiment)
    videos = open_source(source, config, rate_hz=None if _has_shards(source) else opened.contract.rate_hz)
    kept = out.with_name(out.name + ".labels")
    kept.mkdir(parents=True, exist_ok=True)
    mark = hashlib.sha256(
        f"{Path(source).resolve()} {opened.origin} {config.camera} {config.said()}".encode()
    ).hexdigest()
    if (kept / "of").is_file() and (kept / "of").read_text() != mark:
        raise DataError(f"{kept} holds labels of another run", fix="remove it")
    (kept / "of").write_text(mark)
    jobs = [(str(labeller), embodiment, str(source), i, config, str(kept)) for i in range(len(videos))]
    jobs = [job for job in jobs if not (kept / f"{job[3]}.safetensors").is_file()]
    done = len(videos) - len(jobs)
    for _ in _run(jobs, config.workers):
        done += 1
        if on_progress is not None:
            on_progress(done, len(videos))
    report = _write(opened, videos, kept, out, config)
    shutil.rmtree(kept)
    return report


def _write(
    labeller: VideoLabeller, videos: EpisodeSource, kept: Path, out: Path, config: LabelConfig
) -> dict[str, Any]:
    cameras = tuple(c for c in labeller.contract.cameras if c.name == labeller.camera)
    contract = replace(labeller.contract, cameras=cameras)
    confidences, left_out = [], []
    known = all(videos[index].success is not None for index in range(len(videos)))  # LeRobot has it of all or none
    with LeRobotWriter(out, contract, repo_id="mmseq/labelled", columns=(CONFIDENCE,)) as writer:
        for index in range(len(videos)):
            found = load_file(kept / f"{index}.safetensors")
            if found["confidence"].mean() < config.min_confidence:
                left_out.append(videos[index].id)
                continue
            confidences.append(float(found["confidence"].mean()))
            episode = _with(videos[index], found, labeller)
            episode = episode if known else replace(episode, success=None)
            writer.add(episode, {CONFIDENCE: found["confidence"]})
        if not confidences:
            raise DataError(f"no episode has a confidence of {config.min_confidence}", fix="ask for less")
        report = {"labelled_by": labeller.origin, "confidence": float(np.mean(confidences)), "left_out": left_out}
        writer.close(labels=report)
    return report | {"episodes": len(confidences)}


def _with(episode: Episode, found: dict[str, np.ndarray], labeller: VideoLabeller) -> Episode:
    times = np.arange(len(found["action"])) / labeller.contract.rate_hz
    names = {"frames": f"{IMAGE_PREFIX}{labeller.camera}", "action": "action", "proprio": "proprio"}
    streams = {stream: Stream(found[key], times) for key, stream in names.items()}
    return replace(episode, rate_hz=labeller.contract.rate_hz, streams=streams, embodiment=labeller.contract.name)


def _run(jobs: list[tuple], workers: int) -> Iterator[None]:
    if workers <= 1 or len(jobs) <= 1:
        yield from map(_label_job, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context, initializer=_start_worker) as pool:
        yield from pool.map(_label_job, jobs)


def _start_worker() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


_opened: dict[tuple, tuple[VideoLabeller, EpisodeSource]] = {}  # of this process


def _label_job(job: tuple[str, str | None, str, int, LabelConfig, str]) -> None:
    path, embodiment, source, index, config, kept = job
    key = (path, embodiment, source, str(config.said()))
    if key not in _opened:
        labeller = open_labeller(path, embodiment)
        rate_hz = None if _has_shards(source) else labeller.contract.rate_hz
        _opened[key] = labeller, open_source(source, config, rate_hz=rate_hz)
    labeller, videos = _opened[key]
    episode, confidence = label_episode(labeller, videos, index, config.camera)
    members = {"frames": episode[f"{IMAGE_PREFIX}{labeller.camera}"], "confidence": confidence}
    members |= {name: episode[name] for name in OWN_VECTORS}
    partial = Path(kept) / f"{index}.partial"
    save_file({name: np.ascontiguousarray(values) for name, values in members.items()}, partial)
    partial.replace(Path(kept) / f"{index}.safetensors")


def _has_shards(path: str | Path) -> bool:
    from mmseq.data.shards import holds_shards

    return holds_shards(path)


def _fit(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    if frame.shape[:2] == (height, width):
        return frame
    if height != width:
        raise ConfigError(
            f"frames are {frame.shape[:2]}, the robot's camera is {(height, width)}", fix="scale the video to that"
        )
    return square(frame, height)


def _within(values: np.ndarray, axes: Axes) -> np.ndarray:
    """Values moved into the limits that the contract has for them."""
    low, high = (np.asarray(limit, np.float32) for limit in (axes.minimum, axes.maximum))
    return np.clip(values, low, high)
