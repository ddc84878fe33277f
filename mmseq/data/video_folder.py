"""Video files as episodes without actions: clips resampled to a rate, and folders of them with captions.

    for episode in VideoFolderReader("clips", rate_hz=5): ...

A folder may hold `captions.jsonl`, one object per line: {"file": "a.mp4", "caption": "...",
"captions": ["...", "..."], "plan": "...", "success": true}; every key but `file` is optional.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmseq.data.video import VideoInfo, iter_frames, probe, read_frames
from mmseq.embodiment import Embodiment
from mmseq.episode import Episode
from mmseq.errors import DataError, did_you_mean

_KEYS = {"caption": str, "plan": str, "captions": list, "success": bool}  # of a line of captions.jsonl
_KINDS = {str: "a text", list: "a list of texts", bool: "true or false"}
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mkv", ".webm", ".mov", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".3gp", ".ogv")


def resample_indices(times_s: np.ndarray, rate_hz: float, end_s: float) -> np.ndarray:
    """For each tick k / rate_hz before `end_s`, the index of the nearest of `times_s`; the earlier of two as near."""
    ticks = np.arange(max(1, int(np.floor(end_s * rate_hz + 1e-6)))) / rate_hz
    after = np.searchsorted(times_s, ticks).clip(0, len(times_s) - 1)
    before = np.maximum(after - 1, 0)
    return np.where(times_s[after] - ticks < ticks - times_s[before] - 1e-9, after, before)


def _clip(path: Path, rate_hz: float | None) -> tuple[np.ndarray, float, VideoInfo]:
    """Which frames make the episode, and its rate."""
    if rate_hz is not None and not rate_hz > 0:
        raise DataError(f"rate_hz must be positive, got {rate_hz}")
    info = probe(path)
    return resample_indices(info.times_s, rate_hz or info.rate_hz, info.duration_s), rate_hz or info.rate_hz, info


def read_video_episode(path: str | Path, texts: Sequence[str] = (), rate_hz: float | None = None) -> Episode:
    """A video file as an episode with the one stream `image.main` and no embodiment.

    rate_hz: steps per second, each the nearest frame; default: the video's own.
    Raises: DataError for a broken file.
    """
    path = Path(path)
    indices, rate_hz, info = _clip(path, rate_hz)
    return Episode.from_arrays(
        path.stem,
        rate_hz,
        {"image.main": lambda: read_frames(path, indices)},
        length=len(indices),
        texts=list(texts),
        source=str(path),
        metadata={"source_rate_hz": info.rate_hz, "height": info.height, "width": info.width},
    )


class VideoFolderReader:
    """A folder of video files (searched below it too) as episodes, in order of their names.

    rate_hz: steps per second of every episode; default: each video's own.
    Raises: DataError for an empty folder, a broken line of captions.jsonl, or one that names no file.
    """

    def __init__(
        self,
        path: str | Path,
        rate_hz: float | None = None,
        embodiment: Embodiment | None = None,
        map: Mapping[str, Any] | None = None,
    ):
        """embodiment, map: as other readers have them; refused, since there is nothing that they could say."""
        if map:
            raise DataError(f"{path} is video, whose one stream no map changes", fix="leave the map out")
        if embodiment is not None:
            raise DataError(
                f"{path} is video without actions, so embodiment {embodiment.name!r} does not apply",
                fix="leave the embodiment out",
            )
        self.path = Path(path)
        self.rate_hz = rate_hz
        if self.path.is_file():
            self.files = [self.path]
            self.path = self.path.parent
            captions: dict[str, dict[str, Any]] = {}
        else:
            if not self.path.is_dir():
                raise DataError(f"{path} does not exist", fix="give a folder of videos, or one video")
            suited = lambda p: p.suffix.lower() in VIDEO_SUFFIXES and not p.name.startswith(".") and p.is_file()
            self.files = sorted(filter(suited, self.path.rglob("*")))
            if not self.files:
                raise DataError(f"{path} holds no videos", fix=f"put files ending in {', '.join(VIDEO_SUFFIXES)} there")
            captions = self._read_captions()
        self._captions = captions

    def _read_captions(self) -> dict[str, dict[str, Any]]:
        path = self.path / "captions.jsonl"
        if not path.exists():
            return {}
        known = {file.relative_to(self.path).as_posix() for file in self.files}
        captions: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise DataError(f"{where} is not JSON: {error}", fix="correct or delete the line") from error
            if not isinstance(entry, dict) or not isinstance(entry.get("file"), str):
                raise DataError(f'{where} has no "file"', fix='write {"file": "a.mp4", "caption": "..."}')
            for key, kind in _KEYS.items():
                value = entry.get(key)
                texts = value if isinstance(value, list) else []
                if value is not None and not (isinstance(value, kind) and all(isinstance(v, str) for v in texts)):
                    raise DataError(f"{where}: {key!r} is {value!r}", fix=f"give {_KINDS[kind]}")
            if entry["file"] not in known:
                raise DataError(
                    f"{where} names {entry['file']!r}, which is not in {self.path}: "
                    + did_you_mean(entry["file"], known)[:200],
                    fix="correct the name, add the file or delete the line",
                )
            captions[entry["file"]] = entry
        return captions

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Episode:
        path = self.files[range(len(self.files))[index]]
        name = path.relative_to(self.path).as_posix()
        entry = self._captions.get(name, {})
        texts = entry.get("captions") or ([entry["caption"]] if entry.get("caption") else [])
        episode = read_video_episode(path, texts, self.rate_hz)
        episode.id = name
        episode.plans = [entry["plan"]] if entry.get("plan") else []
        episode.success = entry.get("success")
        return episode

    def __iter__(self) -> Iterator[Episode]:
        return (self[i] for i in range(len(self)))

    def embodiment(self) -> None:
        """Video without a robot has none."""

    def frames(self, index: int, camera: str = "main") -> Iterator[np.ndarray]:
        """The frames of episode `index` one at a time, uint8 (H, W, 3), in bounded memory."""
        path = self.files[range(len(self.files))[index]]
        return iter_frames(path, _clip(path, self.rate_hz)[0])
