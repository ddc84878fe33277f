"""Frames of video files, through PyAV.

    from mmseq.data.video import read_frames
    frames = read_frames("clip.mp4", [0, 10, 20])          # uint8 (3, H, W, 3)

What counts are the frames that are there: a video may begin at any time or before a key frame, have any rates, rotation
and other streams. Only a file whose own structure says that bytes are missing is called truncated.
"""

# PyAV types open() as either an input or an output container, and time bases as optional
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Colorspace, VideoReformatter

from mmseq.data.containers import missing_bytes
from mmseq.errors import DataError

_BT709 = 1  # AVColorSpace of high-definition video
_REPLACE = "fetch or record the file again, or take it out"
_SKIP_S = 2.0  # a gap up to this long is decoded through, a longer one is a seek


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a video file holds.

    height, width: of its frames as they are shown, after any rotation. rate_hz: of most of its frames, see `_usual`;
    of a video whose times are all different, the mean. times_s: float64 (frames,), when each frame is
    shown, the first at 0. pts: int64 (frames,), the same in the stream's own ticks, or None when the container stores
    none.
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
        if missing := missing_bytes(source):
            raise self._corrupt(f"is truncated: its last {missing} bytes are missing")
        self._source = source
        self._reformatter = VideoReformatter()  # keeps its conversion context from frame to frame
        self._open()

    def _open(self) -> None:
        source = self._source
        self._begun = False
        self._frames: Iterator[av.VideoFrame] | None = None
        self._shown: av.VideoFrame | None = None  # the frame at which it stopped
        self._ahead: av.VideoFrame | None = None  # the next one, where it was looked at already
        try:
            self._container = av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source))
        except (av.FFmpegError, OSError, ValueError) as error:
            raise self._corrupt(f"cannot be opened, it is unfinished or no video: {error}") from error
        if not self._container.streams.video:
            self._container.close()
            raise DataError(f"{self.name} holds no video stream", fix="take the file out of the dataset")
        self._stream = self._container.streams.video[0]
        small = self._stream.width * self._stream.height <= 256 * 256
        # frame threads cost more than they gain on small frames
        self._stream.thread_type = "SLICE" if small else "AUTO"
        if small:
            self._stream.codec_context.thread_count = 1

    def close(self) -> None:
        self._frames = self._shown = self._ahead = None
        self._container.close()

    def __enter__(self) -> VideoDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def probe(self) -> VideoInfo:
        """Count and time the frames from the packets; only the first frame is decoded.

        Raises: DataError for a file without frames.
        """
        self._rewind()
        pts: list[int | None] = []
        try:
            for packet in self._packets():
                if packet.size and not packet.is_discard and not self._is_hidden(packet):
                    pts.append(packet.pts)
        except av.FFmpegError as error:
            raise self._corrupt(f"cannot be read after {len(pts)} frames: {error}") from error
        self._rewind()
        stream, first = self._stream, self._next()
        if first is None or not pts:
            raise DataError(f"video {self.name} holds no frames", fix=_REPLACE)
        height, width = (first.width, first.height) if first.rotation % 180 else (first.height, first.width)
        rate = stream.average_rate or stream.guessed_rate or Fraction(30)
        ticks = None
        if all(p is not None for p in pts) and len(set(pts)) == len(pts):
            ticks = np.sort(np.asarray(pts, dtype=np.int64))
            if first.pts is not None:  # what comes before needs a key frame that was cut off
                ticks = ticks[ticks >= first.pts]
            times = (ticks - ticks[0]) * float(stream.time_base)
            if len(times) > 1:
                rate = 1 / _usual(np.diff(times))
        else:
            times = np.arange(len(pts)) / float(rate)
        return VideoInfo(
            frames=len(times),
            height=height,
            width=width,
            rate_hz=round(float(rate), 6),
            codec=stream.codec_context.name,
            times_s=times,
            pts=ticks,
        )

    def _is_hidden(self, packet: av.Packet) -> bool:
        """Whether it holds a frame that is only referred to, never shown: VP8 has them in packets of their own."""
        return self._stream.codec_context.name.startswith("vp8") and not memoryview(packet)[0] & 0x10

    def _corrupt(self, what: str) -> DataError:
        return DataError(f"video {self.name} {what}", fix=_REPLACE)

    # ------------------------------------------------------------------ frame by frame

    def _seek(self, pts: int) -> None:
        try:
            self._container.seek(pts, stream=self._stream, backward=True, any_frame=False)
        except av.FFmpegError:  # no key frame is there: go to any, and decode from the next key frame on
            self._container.seek(pts, stream=self._stream, backward=True, any_frame=True)
        self._frames, self._shown, self._ahead, self._begun = None, None, None, True

    def _rewind(self) -> None:
        """To the very first frame, which a seek may miss: some containers look for the time of decoding."""
        if self._begun:
            self.close()
            self._open()

    def _packets(self) -> Iterator[av.Packet]:
        self._begun = True
        return self._container.demux(self._stream)

    def _decoded(self) -> Iterator[av.VideoFrame]:
        begun = False
        for packet in self._packets():
            begun = begun or packet.is_keyframe or packet.dts is None
            if begun and (packet.size or packet.dts is None):  # an empty packet with a time repeats a frame
                yield from packet.decode()  # type: ignore[misc]  # a video's packets hold no subtitles

    def _next(self) -> av.VideoFrame | None:
        if self._ahead is not None:
            frame, self._ahead = self._ahead, None
            return frame
        self._frames = self._frames or self._decoded()
        try:
            return next(self._frames, None)
        except (av.FFmpegError, ValueError) as error:
            raise self._corrupt(f"is corrupt: {error}") from error

    def _rgb(self, frame: av.VideoFrame) -> np.ndarray:
        if frame.is_corrupt:
            raise self._corrupt(f"is corrupt at {frame.time:.2f} s")
        colors = {"src_colorspace": Colorspace.ITU709} if frame.colorspace == _BT709 else {}
        image = self._reformatter.reformat(frame, format="rgb24", **colors).to_ndarray()
        return np.rot90(image, frame.rotation // 90) if frame.rotation % 360 else image

    def all_frames(self) -> Iterator[np.ndarray]:
        """Every frame in order, uint8 (H, W, 3), from the start."""
        self._rewind()
        while (frame := self._next()) is not None:
            yield self._rgb(frame)

    def frames_at(self, pts: Sequence[int], tolerance: float = 0.0) -> Iterator[np.ndarray]:
        """The frames nearest to `pts` (stream ticks, not decreasing), uint8 (H, W, 3) each.

        tolerance: how far a frame's own time may be off, in ticks. Repeated entries repeat the frame.
        Raises: DataError when there is no frame at a time.
        """
        image: np.ndarray | None = None
        for k, wanted in enumerate(pts):
            if k == 0:
                self._position(wanted, tolerance)
            while self._shown is not None and self._shown.pts != wanted:
                self._ahead = self._next()
                if self._ahead is None or abs(self._ahead.pts - wanted) >= abs(self._shown.pts - wanted):
                    break
                self._shown, self._ahead, image = self._ahead, None, None
            if self._shown is None or abs(self._shown.pts - wanted) > tolerance:
                raise DataError(
                    f"video {self.name} has no frame at {float(wanted * self._stream.time_base):.4f} s"
                    + (f", the nearest is at {self._shown.time:.4f} s" if self._shown is not None else ""),
                    fix="see whether the file belongs to this dataset, or fetch both again",
                )
            image = self._rgb(self._shown) if image is None else image
            yield image

    def ticks(self, times_s: Sequence[float] | np.ndarray) -> list[int]:
        """Seconds on the stream's own clock as its ticks."""
        return np.round(np.asarray(times_s, dtype=np.float64) / float(self._stream.time_base)).astype(int).tolist()

    def _position(self, pts: int, tolerance: float) -> None:
        """Stop at a frame that is not behind `pts`, where there is one."""
        second = round(1 / float(self._stream.time_base))
        if self._shown is not None and 0 <= pts - self._shown.pts <= _SKIP_S * second:
            return
        start, back = self._stream.start_time or 0, 0
        while True:
            target = max(start, int(pts) - back)
            if target > start:
                self._seek(target)
            else:
                self._rewind()
            self._shown = self._next()
            if self._shown is not None and self._shown.pts is None:
                raise self._corrupt("does not say when its frames are shown")
            # containers that index by decoding time may land behind the wanted frame
            if target <= start or (self._shown is not None and self._shown.pts <= pts + min(tolerance, 2)):
                return
            back = max(2 * back, second)


def _usual(gaps_s: np.ndarray) -> float:
    """The time from frame to frame: where a few frames stay longer or are missing, that of all the others."""
    middle = np.median(gaps_s)
    usual = gaps_s[(gaps_s > 0.5 * middle) & (gaps_s < 1.5 * middle)]
    most = len(usual) >= 0.75 * len(gaps_s) and gaps_s.sum() <= 4 * len(gaps_s) * middle  # no clock that was set anew
    return float(np.mean(usual if most else gaps_s))


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
