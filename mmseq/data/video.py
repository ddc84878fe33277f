"""Video files in and out, through PyAV: frames, clips as episodes, folders of captioned clips.

    from mmseq.data.video import VideoFolderReader, read_frames
    frames = read_frames("clip.mp4", [0, 10, 20])          # uint8 (3, H, W, 3)
    for episode in VideoFolderReader("clips", rate_hz=5): ...

A folder may hold `captions.jsonl`, one object per line: {"file": "a.mp4", "caption": "...",
"captions": ["...", "..."], "plan": "..."}; every key but `file` is optional.
"""

# PyAV types open() as either an input or an output container, and time bases as optional
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Colorspace, VideoReformatter

from mmseq.episode import Episode
from mmseq.errors import DataError, did_you_mean

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi")
NEAR_LOSSLESS_CRF = 10
_BT709 = 1  # AVColorSpace of high-definition video
_REPLACE = "fetch or record the file again, or take it out"
_SKIP_S = 2.0  # a gap up to this long is decoded through, a longer one is a seek


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a video file holds.

    times_s: float64 (frames,), when each frame is shown, the first at 0. pts: int64 (frames,), the
    same in the stream's own ticks, or None when the container stores none.
    """

    frames: int
    height: int
    width: int
    rate_hz: float
    codec: str
    times_s: np.ndarray
    pts: np.ndarray | None

    @property
    def duration_s(self) -> float:
        return float(self.times_s[-1]) + 1 / self.rate_hz


class VideoDecoder:
    """One open video, which continues where it stopped: reading clips in order decodes each frame once.

    source: a path, or the bytes of a file. name: what errors call it. Not for several threads at once.
    """

    def __init__(self, source: str | Path | bytes, name: str | None = None):
        self.name = name or ("video" if isinstance(source, bytes) else str(source))
        if not isinstance(source, bytes):
            path = Path(source)
            if not path.is_file():
                raise DataError(f"video {self.name} does not exist", fix="check the path")
            if path.stat().st_size == 0:
                raise DataError(f"video {self.name} is empty (0 bytes)", fix=_REPLACE)
        try:
            self._container = av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source))
        except (av.FFmpegError, OSError, ValueError) as error:
            raise DataError(
                f"video {self.name} cannot be opened, it is truncated or no video: {error}", fix=_REPLACE
            ) from error
        if not self._container.streams.video:
            self._container.close()
            raise DataError(f"{self.name} holds no video stream", fix="take the file out of the dataset")
        self._stream = self._container.streams.video[0]
        self._reformatter = VideoReformatter()  # keeps its conversion context from frame to frame
        small = self._stream.width * self._stream.height <= 256 * 256
        self._stream.thread_type = (
            "SLICE" if small else "AUTO"
        )  # frame threads cost more than they gain on small frames
        if small:
            self._stream.codec_context.thread_count = 1
        self._frames: Iterator[av.VideoFrame] | None = None
        self._pending: av.VideoFrame | None = None  # decoded, not yet asked for
        self._last: int | None = None  # pts of the frame that was decoded last

    def close(self) -> None:
        self._frames = self._pending = None
        self._container.close()

    def __enter__(self) -> VideoDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def probe(self) -> VideoInfo:
        """Count and time the frames from the packets, without decoding any.

        Raises: DataError for a file that promises more frames than it holds.
        """
        stream, self._frames, self._pending = self._stream, None, None
        pts: list[int | None] = []
        discarded = 0
        try:
            self._seek(stream.start_time or 0)
            for packet in self._container.demux(stream):
                if packet.size == 0:
                    continue
                if packet.is_discard:
                    discarded += 1
                else:
                    pts.append(packet.pts)
            self._seek(stream.start_time or 0)
        except av.FFmpegError as error:
            raise self._corrupt(f"cannot be read after {len(pts)} frames: {error}") from error
        promised = stream.frames
        if not pts:
            raise DataError(f"video {self.name} holds no frames", fix=_REPLACE)
        if promised and len(pts) + discarded < promised:
            raise self._corrupt(f"is truncated: it promises {promised} frames and holds {len(pts) + discarded}")
        rate = stream.average_rate or stream.guessed_rate or Fraction(30)
        ticks = None
        if all(p is not None for p in pts) and len(set(pts)) == len(pts):
            ticks = np.sort(np.asarray(pts, dtype=np.int64))
            times = (ticks - ticks[0]) * float(stream.time_base)
            if len(times) > 1:
                rate = (len(times) - 1) / times[-1]
        else:
            times = np.arange(len(pts)) / float(rate)
        promised_s, frame_s = self._promised_duration_s(), 1 / float(rate)
        steady = len(times) < 2 or np.diff(times).max() < 1.5 * frame_s
        slack_s = 3 * frame_s if steady else max(0.5, 3 * frame_s)  # of a varying rate the last frame may stay long
        if promised_s and not promised and promised_s > times[-1] + frame_s + slack_s:
            raise self._corrupt(f"is truncated: it promises {promised_s:.2f} s and ends at {times[-1]:.2f} s")
        return VideoInfo(
            frames=len(pts),
            height=stream.height,
            width=stream.width,
            rate_hz=round(float(rate), 6),
            codec=stream.codec_context.name,
            times_s=times,
            pts=ticks,
        )

    def _promised_duration_s(self) -> float | None:
        """What the header says, for containers (mkv, webm) that do not store a number of frames."""
        stored = self._stream.metadata.get("DURATION")
        if stored:
            hours, minutes, seconds = stored.split(":")
            return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
        if self._container.duration and len(self._container.streams) == 1:
            return self._container.duration / av.time_base
        return None

    def _corrupt(self, what: str) -> DataError:
        return DataError(f"video {self.name} {what}", fix=_REPLACE)

    def _seek(self, pts: int) -> None:
        self._container.seek(pts, stream=self._stream, backward=True, any_frame=False)
        self._frames = self._pending = self._last = None

    def _next(self) -> av.VideoFrame | None:
        if self._pending is not None:
            frame, self._pending = self._pending, None
            return frame
        frames = self._frames = self._container.decode(self._stream) if self._frames is None else self._frames
        try:
            frame = next(frames, None)
        except (av.FFmpegError, ValueError) as error:
            raise self._corrupt(f"is corrupt: {error}") from error
        self._last = frame.pts if frame is not None else None
        return frame

    def _rgb(self, frame: av.VideoFrame) -> np.ndarray:
        if frame.is_corrupt:
            raise self._corrupt(f"is corrupt at {frame.time:.2f} s")
        colors = {"src_colorspace": Colorspace.ITU709} if frame.colorspace == _BT709 else {}
        image = self._reformatter.reformat(frame, format="rgb24", **colors).to_ndarray()
        return np.rot90(image, frame.rotation // 90) if frame.rotation % 360 else image

    def all_frames(self) -> Iterator[np.ndarray]:
        """Every frame in order, uint8 (H, W, 3), from the start."""
        if self._frames is not None or self._pending is not None:
            self._seek(self._stream.start_time or 0)
        while (frame := self._next()) is not None:
            yield self._rgb(frame)

    def frames_at(self, pts: Sequence[int], tolerance: float = 0.0) -> Iterator[np.ndarray]:
        """The frames shown at `pts` (stream ticks, not decreasing), uint8 (H, W, 3) each.

        tolerance: how far a frame's own time may be off, in ticks. Repeated entries repeat the frame.
        Raises: DataError when there is no frame at a time.
        """
        if len(pts) == 0:
            return
        self._position(pts[0], tolerance)
        k = 0
        while k < len(pts):
            frame = self._next()
            if frame is None:
                raise self._missing(pts[k])
            if frame.pts is None or frame.pts < pts[k] - tolerance:
                continue
            if frame.pts > pts[k] + tolerance:
                self._pending = frame
                raise self._missing(pts[k])
            image = self._rgb(frame)
            while k < len(pts) and abs(frame.pts - pts[k]) <= tolerance:
                k += 1
                yield image

    def ticks(self, times_s: Sequence[float] | np.ndarray) -> list[int]:
        """Seconds on the stream's own clock as its ticks."""
        return np.round(np.asarray(times_s, dtype=np.float64) / float(self._stream.time_base)).astype(int).tolist()

    def _missing(self, pts: int) -> DataError:
        return DataError(
            f"video {self.name} has no frame at {float(pts * self._stream.time_base):.4f} s",
            fix="the file is truncated, or does not belong to this dataset: fetch it again",
        )

    def _position(self, pts: float, tolerance: float) -> None:
        """Make the next frame the one at `pts`, or one before it."""
        second = 1 / float(self._stream.time_base)
        behind = self._last is not None and not -tolerance <= pts - self._last <= _SKIP_S * second
        if self._frames is not None and not behind:  # what is next is worth decoding
            self._pending = self._next()
            if self._pending is not None and self._pending.pts is not None:
                ahead = pts - self._pending.pts
                if -tolerance <= ahead <= _SKIP_S * second:
                    return
        start = self._stream.start_time or 0
        back = 0
        while True:
            target = max(start, int(pts) - back)
            self._seek(target)
            self._pending = self._next()
            # containers that index by decoding time may land behind the wanted frame
            if self._pending is None or self._pending.pts is None:
                return
            if self._pending.pts <= pts + tolerance or target <= start:
                return
            back = max(2 * back, round(second))


def probe(path: str | Path) -> VideoInfo:
    """What the video file holds, without decoding it. Raises: DataError for a broken file."""
    with VideoDecoder(path) as decoder:
        return decoder.probe()


def iter_frames(source: str | Path | bytes, indices: Sequence[int] | np.ndarray | None = None) -> Iterator[np.ndarray]:
    """Frames one at a time, uint8 (H, W, 3): all of them, or those at `indices` (not decreasing).

    Raises: DataError for a broken file or an index outside it.
    """
    with VideoDecoder(source) as decoder:
        if indices is None:
            yield from decoder.all_frames()
            return
        info = decoder.probe()
        wanted = np.asarray(indices, dtype=np.int64)
        outside = wanted[(wanted < 0) | (wanted >= info.frames)]
        if len(outside):
            raise DataError(f"video {decoder.name} has frames 0 to {info.frames - 1}, not {outside[0]}")
        if info.pts is not None:
            yield from decoder.frames_at(info.pts[wanted].tolist())
            return
        k = 0
        for i, frame in enumerate(decoder.all_frames()):
            while k < len(wanted) and wanted[k] == i:
                k += 1
                yield frame
            if k == len(wanted):
                return
        raise DataError(f"video {decoder.name} ends before frame {wanted[k]}", fix=_REPLACE)


def read_frames(source: str | Path | bytes, indices: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
    """Frames as uint8 (N, H, W, 3) RGB: all of them, or those at `indices` in that order.

    Raises: DataError for a broken file or an index outside it.
    """
    if indices is None:
        with VideoDecoder(source) as decoder:
            expected = decoder.probe().frames
            frames = np.stack(list(decoder.all_frames()) or [np.empty(0, np.uint8)])
            if len(frames) != expected or frames.ndim != 4:
                raise DataError(
                    f"video {decoder.name} is corrupt: {len(frames)} of {expected} frames decode", fix=_REPLACE
                )
            return frames
    wanted = np.asarray(indices, dtype=np.int64)
    if len(wanted) == 0:
        info = probe(source) if not isinstance(source, bytes) else VideoDecoder(source).probe()
        return np.empty((0, info.height, info.width, 3), np.uint8)
    order = np.argsort(wanted, kind="stable")
    frames = list(iter_frames(source, wanted[order]))
    return np.stack([frames[i] for i in np.argsort(order)])


def decode_video(data: bytes, length: int | None = None, name: str = "video") -> np.ndarray:
    """Every frame of an mp4 in memory, uint8 (N, H, W, 3).

    length: how many there must be. name: what errors call it. Raises: DataError for a broken file.
    """
    with VideoDecoder(data, name) as decoder:
        frames = list(decoder.all_frames())
    if not frames or (length is not None and len(frames) != length):
        raise DataError(f"video {name} is corrupt: {len(frames)} of {length or 'its'} frames decode", fix=_REPLACE)
    return np.stack(frames)


def _encode(target: Any, frames: Iterable[np.ndarray], rate_hz: float, crf: float) -> int:
    rate = Fraction(rate_hz).limit_denominator(1001)
    count = 0
    with av.open(target, "w", format="mp4") as container:
        # no B-frames, so that decoding order is time order; a key frame at least every 32 frames, for seeks;
        # no arithmetic coding and no deblocking: 30 % larger, and decoded nearly twice as fast
        tools = "log-level=none:cabac=0:no-deblock=1"
        options = {"crf": f"{crf:g}", "preset": "veryfast", "tune": "psnr", "bf": "0", "g": "32", "x264-params": tools}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.pix_fmt = "yuv444p"  # full-resolution colour, and any width and height
        stream.codec_context.time_base = 1 / rate
        reformatter = VideoReformatter()
        for image in frames:
            image = np.ascontiguousarray(image)
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise DataError(
                    f"frame {count} has shape {image.shape} and dtype {image.dtype}, expected uint8 (H, W, 3)"
                )
            if count == 0:
                stream.height, stream.width = image.shape[:2]
                if stream.height * stream.width <= 256 * 256:
                    stream.codec_context.thread_count = 1
            elif image.shape[:2] != (stream.height, stream.width):
                raise DataError(f"frame {count} is {image.shape[:2]}, the first was {(stream.height, stream.width)}")
            frame = reformatter.reformat(av.VideoFrame.from_ndarray(image, format="rgb24"), format="yuv444p")
            frame.pts, frame.time_base = count, 1 / rate
            container.mux(stream.encode(frame))
            count += 1
        if count == 0:
            raise DataError("a video needs at least one frame")
        container.mux(stream.encode(None))
    return count


def encode_video(frames: Iterable[np.ndarray], rate_hz: float, crf: float = NEAR_LOSSLESS_CRF) -> tuple[bytes, int]:
    """The bytes of an mp4 (h264, 4:4:4) of `frames`, uint8 (H, W, 3) each, and how many there were.

    crf: 0 is the best; the default reads back at 40 dB or more.
    """
    buffer = io.BytesIO()
    count = _encode(buffer, frames, rate_hz, crf)
    return buffer.getvalue(), count


def write_video(path: str | Path, frames: Iterable[np.ndarray], rate_hz: float, crf: float = NEAR_LOSSLESS_CRF) -> int:
    """Write `frames`, uint8 (N, H, W, 3) or an iterable of (H, W, 3), as an mp4; return how many there were.

    The file appears under its name when it is complete.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        count = _encode(str(partial), frames, rate_hz, crf)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return count


def resample_indices(times_s: np.ndarray, rate_hz: float, end_s: float) -> np.ndarray:
    """For each tick k / rate_hz before `end_s`, the index of the last of `times_s` that is not later."""
    steps = max(1, int(np.floor(end_s * rate_hz + 1e-6)))
    ticks = np.arange(steps) / rate_hz
    return np.maximum(np.searchsorted(times_s, ticks + 1e-6, side="right") - 1, 0)


def _clip(path: Path, rate_hz: float | None) -> tuple[np.ndarray, float, VideoInfo]:
    """Which frames make the episode, and its rate."""
    if rate_hz is not None and not rate_hz > 0:
        raise DataError(f"rate_hz must be positive, got {rate_hz}")
    info = probe(path)
    return resample_indices(info.times_s, rate_hz or info.rate_hz, info.duration_s), rate_hz or info.rate_hz, info


def read_video_episode(path: str | Path, texts: Sequence[str] = (), rate_hz: float | None = None) -> Episode:
    """A video file as an episode with the one stream `image.main` and no embodiment.

    rate_hz: steps per second, each the nearest earlier frame; default: the video's mean rate.
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

    def __init__(self, path: str | Path, rate_hz: float | None = None):
        self.path = Path(path)
        self.rate_hz = rate_hz
        if self.path.is_file():
            self.files = [self.path]
            self.path = self.path.parent
            captions: dict[str, dict[str, Any]] = {}
        else:
            if not self.path.is_dir():
                raise DataError(f"{path} does not exist", fix="give a folder of videos, or one video")
            self.files = sorted(p for p in self.path.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES and p.is_file())
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
            for key, kind in (("caption", str), ("plan", str), ("captions", list)):
                value = entry.get(key)
                if value is not None and not (
                    isinstance(value, kind) and (kind is str or all(isinstance(v, str) for v in value))
                ):
                    raise DataError(
                        f"{where}: {key!r} is {value!r}", fix=f"give a {'list of texts' if kind is list else 'text'}"
                    )
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
        return episode

    def __iter__(self) -> Iterator[Episode]:
        return (self[i] for i in range(len(self)))

    def embodiment(self) -> None:
        """Video without a robot has none."""

    def frames(self, index: int, camera: str = "main") -> Iterator[np.ndarray]:
        """The frames of episode `index` one at a time, uint8 (H, W, 3), in bounded memory."""
        path = self.files[range(len(self.files))[index]]
        return iter_frames(path, _clip(path, self.rate_hz)[0])
