"""Video becomes a robot's episodes: each step with the action and the state that were read off it, and a confidence.

label_source(open_labeller("runs/labeller"), "videos", "labelled")
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from mmseq.data.importing import fitted
from mmseq.data.lerobot_writer import MAX_EPISODE_STEPS, LeRobotWriter
from mmseq.data.reader import EpisodeSource
from mmseq.data.sources import open_source, source_identity
from mmseq.embodiment import Axes, Embodiment
from mmseq.episode import IMAGE_PREFIX, Episode, Stream
from mmseq.errors import CheckpointError, ConfigError, DataError, MMSeqError, did_you_mean
from mmseq.inference.decoding import Decoder, Request
from mmseq.labelling.network import SETTINGS, LabellerNetwork, Labels
from mmseq.labelling.parts import Parts
from mmseq.reading import Reading
from mmseq.streams import OWN_VECTORS
from mmseq.tasks import Task
from mmseq.tokenization.bundle import EpisodeTokens

CONFIDENCE = "label.confidence"  # the column of a dataset
APART = 4  # steps between the two frames from which a checkpoint tells actions
BATCH = 32  # requests that a checkpoint answers together
LEAST_FILMED = 0.95  # frames of a video for a step of the robot: 29 of 30 are as good as 30


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

    A step's action is the mean over all pairs of frames that enclose it, of a gripper the vote nearest to that; where
    they disagree, confidence is low. The last step, which no pair encloses, has the action before it.
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
        votes[-1] = votes[-2]  # no pair of frames encloses the last step
        action = np.stack([np.mean(v, 0) for v in votes])
        for gripper in self.contract.grippers:  # between open and closed may lie nothing, so a mean is no vote
            axis = axes["action"].names.index(gripper.axis)
            for step, vote in enumerate(np.stack(v)[:, axis] for v in votes):
                action[step, axis] = vote[np.abs(vote - action[step, axis]).argmin()]
        reach = np.subtract(axes["action"].high, axes["action"].low)
        spread = np.maximum(reach / np.sqrt(12), 1e-6)  # of values that lie evenly: the video may hardly move an axis
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

    Its words and its outcome stay; its frames are cropped and scaled to those of the robot's camera. camera: of the
    episode, which is taken for the labeller's; None: its only one.
    Raises: ConfigError for a camera that is not there; DataError for another rate than the robot's, at which the frames
    around a step would say something else, for video that was filmed at a lower one, or frames that are missing.
    """
    frames = _seen(labeller, source, index, camera)
    found = labeller.label(frames)
    limits = labeller.contract.vectors
    values = {"action": _within(found.action, limits["action"]), "proprio": _within(found.state, limits["proprio"])}
    return _of_robot(source[index], labeller, frames, values), found.confidence


def _seen(labeller: VideoLabeller, source: EpisodeSource, index: int, camera: str | None) -> np.ndarray:
    """The frames of an episode as the labeller's camera would have them, uint8 (steps, H, W, 3)."""
    episode, contract = source[index], labeller.contract
    wanted = next(c for c in contract.cameras if c.name == labeller.camera)
    if camera not in episode.cameras if camera else len(episode.cameras) != 1:
        raise ConfigError(
            f"episode {episode.id!r} has the cameras {', '.join(episode.cameras) or 'none'}"
            + (f", not {camera!r}" if camera else ""),
            fix="name the one to label with --camera",
        )
    if abs(episode.rate_hz - contract.rate_hz) > 1e-6:
        raise DataError(
            f"episode {episode.id!r} has {episode.rate_hz:g} steps per second, {contract.name!r} {contract.rate_hz:g}",
            fix=f"import the video with --rate-hz {contract.rate_hz:g}",
        )
    filmed_hz = episode.metadata.get("source_rate_hz", episode.rate_hz)
    if filmed_hz < LEAST_FILMED * contract.rate_hz:
        raise DataError(
            f"episode {episode.id!r} was filmed at {filmed_hz:g} frames per second, {contract.name!r} has "
            f"{contract.rate_hz:g} steps: the same frame would stand for several, and nothing move between them",
            fix="leave it out, or train a labeller on episodes of a lower rate (mmseq data import --rate-hz)",
        )
    frames, count = np.empty((len(episode), wanted.height, wanted.width, 3), np.uint8), 0
    for count, frame in enumerate(source.frames(index, camera or episode.cameras[0]), start=1):
        frames[min(count, len(episode)) - 1] = fitted(frame, wanted.height, wanted.width)
    if count != len(episode):
        raise DataError(f"episode {episode.id!r} has {count} frames for {len(episode)} steps", fix="repair the video")
    return frames


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

    labeller: as for `open_labeller`. A video of more than `MAX_EPISODE_STEPS` becomes several episodes. What was
    labelled lies in `<out>.labels` until the dataset is whole, so that the same call goes on after a kill. Returns what
    is also in meta/mmseq.json: by whom, how sure, how many were left out.
    Raises: DataError when `out` exists, nothing is left, or `<out>.labels` is of another labeller or other video;
    ConfigError for a camera that is not there.
    """
    config = config or LabelConfig()
    config.check()
    out = Path(out)
    if out.exists():
        raise DataError(f"{out} already exists", fix="choose another folder or remove it")
    for what in (source, labeller):
        if out.resolve().is_relative_to(Path(what).resolve()):
            raise DataError(f"{out} lies in {what}, which is read", fix="choose a folder beside it")
    run = _Run(str(labeller), embodiment, str(source), config)
    opened, videos = run.open()
    kept = out.with_name(out.name + ".labels")
    mark = run.mark(opened)
    if (kept / "of").is_file() and (kept / "of").read_text() != mark:
        raise DataError(
            f"{kept} holds labels of another run: the labeller, the video or how it is read was another",
            fix="remove it, or choose another folder",
        )
    unfinished = kept / "dataset"
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed while it wrote
    writer = _writer(opened, unfinished)  # what it refuses, it refuses before anything is labelled
    kept.mkdir(parents=True, exist_ok=True)
    (kept / "of").write_text(mark)
    left = [i for i in range(len(videos)) if not (kept / f"{i}.safetensors").is_file()]
    done = len(videos) - len(left)
    for _ in _label_all(run, opened, videos, left, kept):
        done += 1
        if on_progress is not None:
            on_progress(done, len(videos))
    report = _write(opened, videos, kept, writer, config)
    unfinished.rename(out)
    shutil.rmtree(kept)
    return report


@dataclass(frozen=True)
class _Run:
    """What is labelled, by whom: what each process opens for itself."""

    labeller: str
    embodiment: str | None
    source: str
    config: LabelConfig

    def open(self) -> tuple[VideoLabeller, EpisodeSource]:
        labeller = open_labeller(self.labeller, self.embodiment)
        source = open_source(self.source, self.config, rate_hz=labeller.contract.rate_hz)
        return labeller, Parts(source, MAX_EPISODE_STEPS)

    def mark(self, labeller: VideoLabeller) -> str:
        """What changes when labels would."""
        files = source_identity(self.source, self.config)["sha256"], source_identity(self.labeller)["sha256"]
        said = [*files, labeller.contract.fingerprint, labeller.origin, self.config.camera]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _writer(labeller: VideoLabeller, path: Path) -> LeRobotWriter:
    contract, labelled = labeller.contract, tuple(c for c in labeller.contract.cameras if c.name == labeller.camera)
    contract = replace(contract, cameras=labelled, streams={})  # nobody reads further streams off a picture
    return LeRobotWriter(path, contract, repo_id="mmseq/labelled", columns=(CONFIDENCE,))


def _write(
    labeller: VideoLabeller, videos: EpisodeSource, kept: Path, writer: LeRobotWriter, config: LabelConfig
) -> dict[str, Any]:
    confidences, left_out = [], []
    known = all(videos[index].success is not None for index in range(len(videos)))  # LeRobot has it of all or none
    with writer:
        for index in range(len(videos)):
            found = load_file(kept / f"{index}.safetensors")
            confidence = found.pop("confidence")
            if confidence.mean() < config.min_confidence:
                left_out.append(videos[index].id)
                continue
            confidences.append(float(confidence.mean()))
            frames = _seen(labeller, videos, index, config.camera)  # again: raw ones of hours would fill the disk
            episode = _of_robot(videos[index], labeller, frames, found)
            writer.add(episode if known else replace(episode, success=None), {CONFIDENCE: confidence})
        if not confidences:
            raise DataError(f"no episode has a confidence of {config.min_confidence}", fix="ask for less")
        report = {"labelled_by": labeller.origin, "confidence": float(np.mean(confidences)), "left_out": left_out}
        writer.close(labels=report)
    return report | {"episodes": len(confidences)}


def _of_robot(
    episode: Episode, labeller: VideoLabeller, frames: np.ndarray, values: Mapping[str, np.ndarray]
) -> Episode:
    """An episode of video with what was read off its frames (steps, H, W, 3): `action` and `proprio`, (steps, axes)."""
    rate_hz = labeller.contract.rate_hz
    found = {f"{IMAGE_PREFIX}{labeller.camera}": frames, **values}
    streams = {name: Stream(v, np.arange(len(v)) / rate_hz) for name, v in found.items()}
    said = {**episode.metadata, "labelled_by": labeller.origin}
    return replace(episode, rate_hz=rate_hz, streams=streams, embodiment=labeller.contract.name, metadata=said)


def _label_all(
    run: _Run, labeller: VideoLabeller, videos: EpisodeSource, indices: Sequence[int], kept: Path
) -> Iterator[None]:
    if run.config.workers <= 1 or len(indices) <= 1:
        for index in indices:
            yield _label_one(labeller, videos, index, run.config, kept)
        return
    context, workers = multiprocessing.get_context("spawn"), min(run.config.workers, len(indices))
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(run,)) as pool:
        try:
            yield from pool.map(_label_in_worker, [(index, kept) for index in indices])
        except BrokenProcessPool as error:
            raise MMSeqError(
                "a process that labelled ended without a word", fix="give fewer workers, or the machine more memory"
            ) from error


_of_worker: list[Any] = []  # what this process was started for, and with


def _start_worker(run: _Run) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    _of_worker.append(run)


def _label_in_worker(job: tuple[int, Path]) -> None:
    index, kept = job
    if len(_of_worker) == 1:  # opened here, since what is raised where a process starts reaches nobody
        _of_worker.extend(_of_worker[0].open())
    run, labeller, videos = _of_worker
    _label_one(labeller, videos, index, run.config, kept)


def _label_one(labeller: VideoLabeller, videos: EpisodeSource, index: int, config: LabelConfig, kept: Path) -> None:
    episode, confidence = label_episode(labeller, videos, index, config.camera)
    members = {"confidence": confidence} | {name: episode[name] for name in OWN_VECTORS}
    partial = kept / f"{index}.partial"
    save_file({name: np.ascontiguousarray(values) for name, values in members.items()}, partial)
    partial.replace(kept / f"{index}.safetensors")


def _within(values: np.ndarray, axes: Axes) -> np.ndarray:
    """Values moved into the limits that the contract has for them."""
    low, high = (np.asarray(limit, np.float32) for limit in (axes.minimum, axes.maximum))
    return np.clip(values, low, high)
