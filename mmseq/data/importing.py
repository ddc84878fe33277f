"""Import: any supported dataset becomes episode shards, the form that everything after it reads.

    mmseq data import SRC OUT [--rate-hz 5] [--size 128]

    from mmseq.data.importing import EpisodeShardReader, import_episodes
    import_episodes("path/to/lerobot", "shards", size=128)
    episode = EpisodeShardReader("shards")[0]

One sample of a shard holds:

====================  =======================================================================
`json`                id, rate_hz, length, texts, plans, embodiment, success, source, metadata
`proprio.npy`         float32 (steps, axes), if there is one
`action.npy`          float32 (steps, axes), if there is one
`image.<camera>.mp4`  h264 4:4:4 at 40 dB or more, one frame per step
====================  =======================================================================

The embodiments stand beside them as `embodiments/<name>.json`, their fingerprints in the manifest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from mmseq.data import hdf5
from mmseq.data.lerobot import LeRobotReader
from mmseq.data.shards import ShardReader, ShardWriter, decode_npy, holds_shards
from mmseq.data.video import VideoDecoder, decode_video
from mmseq.data.video_folder import VIDEO_SUFFIXES, VideoFolderReader
from mmseq.embodiment import Camera, Embodiment
from mmseq.episode import IMAGE_PREFIX, Episode
from mmseq.errors import DataError, EpisodeError, FingerprintError, did_you_mean
from mmseq.mp4 import encode_video

FORMATS = ("lerobot", "video", "hdf5")
VECTORS = ("proprio", "action")
_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_TO_LEROBOT = (
    "convert it to LeRobot v3 first (LeRobotDataset.create, add_frame, save_episode, finalize) and import that"
)


@runtime_checkable
class EpisodeSource(Protocol):
    """What every reader offers: a number of episodes, each one lazily, and its frames one at a time."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Episode: ...
    def embodiment(self) -> Embodiment | None: ...
    def frames(self, index: int, camera: str) -> Iterator[np.ndarray]: ...


def detect_format(src: str | Path) -> str:
    """One of FORMATS. Raises: DataError that says what was found instead, and the way out."""
    src = Path(src)
    if not src.exists():
        raise DataError(f"{src} does not exist", fix="give a LeRobot v3 dataset, HDF5 files or a folder of videos")
    if src.is_file():
        suffix = src.suffix.lower()
        if suffix in VIDEO_SUFFIXES:
            return "video"
        if suffix in hdf5.SUFFIXES:
            return "hdf5"
        raise DataError(f"{src} is neither a video nor HDF5", fix=_TO_LEROBOT)
    if (src / "meta" / "info.json").is_file():
        return "lerobot"
    if holds_shards(src):
        raise DataError(f"{src} holds shards already", fix="use it as it is")
    inner = [p.parent.parent.name for p in sorted(src.glob("*/meta/info.json"))]
    inner += [p.name for p in sorted(src.iterdir()) if holds_shards(p)]
    if inner:
        raise DataError(f"{src} is a folder of datasets", fix=f"name one of them: {', '.join(inner[:8])}")
    found = {"lerobot": 0, "hdf5": 0, "video": 0, "rlds": 0}
    for path in src.rglob("*"):
        found["hdf5"] += path.suffix.lower() in hdf5.SUFFIXES
        found["video"] += path.suffix.lower() in VIDEO_SUFFIXES
        found["rlds"] += ".tfrecord" in path.name
    if found["rlds"]:
        raise DataError(f"{src} is RLDS (tfrecord files), which is not supported yet", fix=_TO_LEROBOT)
    if found["hdf5"] and found["video"]:
        raise DataError(f"{src} holds both HDF5 files and videos", fix="say which with format='hdf5' or format='video'")
    if found["hdf5"] or found["video"]:
        return "hdf5" if found["hdf5"] else "video"
    raise DataError(
        f"{src} holds no dataset that is known", fix="give a LeRobot v3 dataset, HDF5 files or a folder of videos"
    )


def open_episodes(
    src: str | Path,
    *,
    format: str | None = None,
    rate_hz: float | None = None,
    embodiment: Embodiment | None = None,
) -> EpisodeSource:
    """A reader of the dataset at `src`; format: one of FORMATS, default: what is found there.

    Raises: DataError for an unknown format, or what the reader finds wrong.
    """
    format = format or detect_format(src)
    if format == "lerobot":
        return LeRobotReader(src, rate_hz=rate_hz, embodiment=embodiment)
    if format == "hdf5":
        return hdf5.Hdf5Reader(src, rate_hz=rate_hz, embodiment=embodiment)
    if format == "video":
        if embodiment is not None:
            raise DataError(
                f"{src} is video without actions, so embodiment {embodiment.name!r} does not apply",
                fix="leave the embodiment out",
            )
        return VideoFolderReader(src, rate_hz=rate_hz)
    if format == "rlds":
        raise DataError("RLDS is not supported yet", fix=_TO_LEROBOT)
    raise DataError(f"format {format!r} is unknown: {did_you_mean(format, FORMATS)}")


def square(frame: np.ndarray, size: int) -> np.ndarray:
    """Crop the largest centred square of uint8 (H, W, 3) and scale it to (size, size, 3).

    Shrinking averages areas; enlarging interpolates bicubically.
    """
    height, width = frame.shape[:2]
    if height == width == size:
        return frame
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    how = Image.Resampling.BOX if size <= side else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(frame).resize((size, size), how, box=(left, top, left + side, top + side)))


def import_episodes(
    src: str | Path,
    out: str | Path,
    *,
    format: str | None = None,
    rate_hz: float | None = None,
    embodiment: Embodiment | None = None,
    size: int | None = None,
    name: str | None = None,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write the episodes of `src` as shards to `out`, and return their manifest.

    rate_hz: steps per second, see the reader of the format; default: the source's. embodiment: the
    contract to hold the data to, with the cameras of the source. size: crop every frame to its largest
    centred square and scale it to size x size; the stored contract then says so. name: of the dataset;
    default: the name of `src`. on_progress: called as (episodes done, episodes in all).
    Raises: DataError for a broken source or an existing `out`; EpisodeError that names the episode, the
    axis and the step of a value that is not finite or outside the embodiment's limits.
    """
    if size is not None and size < 8:
        raise DataError(f"size is {size} pixels", fix="give at least 8")
    if rate_hz is not None and not 0.01 <= rate_hz <= 10_000:
        raise DataError(f"rate_hz is {rate_hz:g}", fix="give steps per second, 0.01 to 10000")
    source = open_episodes(src, format=format, rate_hz=rate_hz, embodiment=embodiment)
    robot = source.embodiment()
    stored = robot
    if robot is not None and size is not None:
        stored = replace(robot, cameras=tuple(Camera(name=c.name, height=size, width=size) for c in robot.cameras))
    manifest = {
        "kind": "episodes",
        "name": name or Path(src).resolve().name,
        "source": str(src),
        "embodiments": {stored.name: stored.fingerprint} if stored else {},
        "tokenizers": {},
    }
    with ShardWriter(out, manifest, overwrite=overwrite) as writer:
        if stored is not None:
            data = json.dumps(stored.to_dict(), indent=2) + "\n"
            writer.add_file(f"embodiments/{_file_name(stored.name)}.json", data.encode())
        total = len(source)
        for index in range(total):
            _import_one(writer, source, index, robot, size)
            if on_progress is not None:
                on_progress(index + 1, total)
        return writer.close()


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)


def _import_one(
    writer: ShardWriter, source: EpisodeSource, index: int, robot: Embodiment | None, size: int | None
) -> None:
    episode = source[index]
    where = f"episode {episode.id!r} ({episode.source})"
    sizes = {camera.name: (camera.height, camera.width) for camera in robot.cameras} if robot else {}
    members: dict[str, Any] = {}
    for stream in VECTORS:
        axes = getattr(robot, stream) if robot else None
        if stream in episode:
            if axes is None:
                raise EpisodeError(f"{where} has {stream}, its embodiment has none", fix="correct the embodiment")
            members[f"{stream}.npy"] = axes.check(episode[stream], what=stream, where=where)
    for camera in episode.cameras:
        if not _NAME.fullmatch(camera):
            raise DataError(
                f"{where}: camera {camera!r} has a name that cannot be stored", fix="rename it: letters, digits, '_'"
            )
        frames = _checked(source.frames(index, camera), sizes.get(camera), f"{where}, camera {camera!r}")
        data, count = encode_video((square(f, size) for f in frames) if size else frames, episode.rate_hz)
        if count != len(episode):
            raise DataError(
                f"{where}: camera {camera!r} has {count} frames for {len(episode)} steps", fix="repair the dataset"
            )
        members[f"{IMAGE_PREFIX}{camera}.mp4"] = data
    head = {
        "id": episode.id,
        "rate_hz": episode.rate_hz,
        "length": len(episode),
        "texts": episode.texts,
        "plans": episode.plans,
        "embodiment": episode.embodiment,
        "success": episode.success,
        "source": episode.source,
        "metadata": episode.metadata,
    }
    note = {key: head[key] for key in ("id", "length", "rate_hz", "embodiment", "success")}
    note |= {"streams": list(episode.streams), "texts": len(episode.texts), "plans": len(episode.plans)}
    writer.add(f"{index:08d}", {"json": head} | members, metadata=note)


def _checked(frames: Iterator[np.ndarray], expected: tuple[int, int] | None, where: str) -> Iterator[np.ndarray]:
    for frame in frames:
        if expected is not None and frame.shape[:2] != expected:
            raise DataError(
                f"{where}: frames have (height, width) {frame.shape[:2]}, the embodiment says {expected}",
                fix="correct the sizes in the embodiment or in meta/info.json",
            )
        yield frame


class EpisodeShardReader:
    """Episode shards as episodes: `len()`, `[i] -> Episode`, iteration. Streams are read when first used.

    `embodiments` holds the contracts by name; `metadata[i]` says what the index knows of an episode
    (id, length, rate_hz, embodiment, success, streams, numbers of texts and plans) without opening it.
    Raises: DataError for a directory that is broken or holds something else.
    """

    def __init__(self, directory: str | Path):
        self.shards = ShardReader(directory, kind="episodes")
        self.directory = self.shards.directory
        self.embodiments: dict[str, Embodiment] = {}
        listed = self.shards.manifest.get("embodiments") or {}
        if not isinstance(listed, dict):
            raise DataError(
                f"{self.directory}: the manifest lists embodiments as {listed!r:.80}", fix="import it again"
            )
        for name, fingerprint in listed.items():
            file = f"embodiments/{_file_name(name)}.json"
            try:
                robot = Embodiment.from_dict(json.loads(self.shards.read_file(file)))
            except ValueError as error:
                raise DataError(f"{self.directory / file} is corrupt: {error}", fix="write the shards again") from error
            if robot.fingerprint != fingerprint:
                raise FingerprintError(
                    f"{self.directory / file} has fingerprint {robot.fingerprint}, the manifest says {fingerprint}",
                    fix="write the shards again",
                )
            self.embodiments[name] = robot

    @property
    def manifest(self) -> dict[str, Any]:
        return self.shards.manifest

    @property
    def metadata(self) -> list[dict[str, Any]]:
        return self.shards.metadata

    def embodiment(self) -> Embodiment | None:
        """The only contract, or None. Raises: DataError when there are several."""
        if len(self.embodiments) > 1:
            raise DataError(
                f"{self.directory} holds several embodiments: {sorted(self.embodiments)}", fix="use .embodiments"
            )
        return next(iter(self.embodiments.values()), None)

    def __len__(self) -> int:
        return len(self.shards)

    def __iter__(self) -> Iterator[Episode]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Episode:
        index = range(len(self))[index]
        shards = self.shards
        head = shards.read(index, ["json"])["json"]
        arrays: dict[str, Any] = {}
        try:
            length = int(head["length"])
            for extension in shards.members(index):
                if extension.endswith(".mp4"):
                    arrays[extension.removesuffix(".mp4")] = lambda extension=extension: decode_video(
                        shards.read_bytes(index, extension), length, shards.where(index, extension)
                    )
                elif extension.endswith(".npy"):
                    arrays[extension.removesuffix(".npy")] = lambda extension=extension: decode_npy(
                        shards.read_bytes(index, extension), shards.where(index, extension)
                    )
            fields = ("texts", "plans", "embodiment", "success", "source", "metadata")
            return Episode.from_arrays(
                head["id"], float(head["rate_hz"]), arrays, length=length, **{field: head[field] for field in fields}
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{shards.where(index, 'json')} is incomplete: {error!r}", fix="write the shards again"
            ) from error

    def frames(self, index: int, camera: str) -> Iterator[np.ndarray]:
        """The frames of episode `index` one at a time, uint8 (H, W, 3)."""
        extension = f"{IMAGE_PREFIX}{camera}.mp4"
        with VideoDecoder(self.shards.read_bytes(index, extension), self.shards.where(index, extension)) as decoder:
            yield from decoder.all_frames()
