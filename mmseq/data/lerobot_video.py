"""Which frames of a video belong to the rows of an episode, and an open video that goes on where it stopped.

Row k is frame k of the episode's part, where that has as many frames as there are rows. Else it is the frame nearest to
k / fps after the beginning; and where a row has no frame that is near, the clocks differ, so it is frame k again. No
timestamp of a row has a say in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import av
import numpy as np

from mmseq.data.kept import Kept
from mmseq.data.lerobot_files import REFETCH, absent
from mmseq.data.lerobot_layout import Layout, Record
from mmseq.data.video import VideoDecoder
from mmseq.errors import DataError

_OPEN_VIDEOS = 8  # decoders kept, one per camera and file in use
NEAR = 0.49  # of a frame: no second row is as near


def place(times_s: np.ndarray, begin_s: float, end_s: float | None, rows: int, fps: float, shared: bool) -> np.ndarray:
    """The frame of each row, int (rows,), among frames that are shown at `times_s` (rising).

    begin_s: where the episode begins in the file. end_s: where the next one begins, or None. shared: both may show
    the same frames, as episodes do that overlap.
    Raises: DataError for fewer frames than rows.
    """
    wanted = begin_s + np.arange(rows) / fps
    right = np.searchsorted(times_s, wanted).clip(0, len(times_s) - 1)
    left = np.maximum(right - 1, 0)
    nearest = np.where(np.abs(times_s[left] - wanted) <= np.abs(times_s[right] - wanted), left, right)
    held = len(times_s) if end_s is None else int(np.searchsorted(times_s, end_s - NEAR / fps))
    first = int(nearest[0])
    near = np.abs(times_s[nearest] - wanted).max() <= NEAR / fps and (shared or nearest[-1] < held)
    if near and held - first != rows:
        return nearest
    if held - first < rows:
        raise DataError(
            f"{held - first} frames for {rows} steps",
            fix="fetch or record it again, or leave the episode out with --skip-bad",
        )
    return first + np.arange(rows)


class VideoParts:
    """Where in their video files the episodes of a dataset lie."""

    def __init__(self, layout: Layout):
        self.layout = layout
        self._begins: dict[str, dict[Path, list[float]]] = {}

    def _beginnings(self, feature: str) -> dict[Path, list[float]]:
        """Where episodes begin in each file of a camera, rising."""
        if feature not in self._begins:
            found: dict[Path, list[float]] = {}
            for record in self.layout.records:
                begin = self.layout.begins_at(record, feature)
                try:
                    path = self.layout.video_file(record, feature)
                except DataError:
                    continue
                found.setdefault(path, []).append(0.0 if begin is None else begin)
            self._begins[feature] = {path: sorted(begins) for path, begins in found.items()}
        return self._begins[feature]

    def rows(self, record: Record, feature: str, video: OpenVideo, fps: float) -> np.ndarray:
        """The frame of each row of an episode. Raises: DataError that names the episode and the camera."""
        where = f"{self.layout.path}, episode {record.index}, {feature}"
        begin = self.layout.begins_at(record, feature)
        if begin is None:
            raise DataError(f"{where}: from_timestamp is no number", fix=REFETCH)
        if self.layout.version == "v2":
            begins, end, shared = [0.0], None, True
        else:
            begins = self._beginnings(feature)[self.layout.video_file(record, feature)]
            end = next((b for b in begins if b > begin + NEAR / fps), None)
            stated = self.layout.begins_at(record, feature, end=True)
            shared = end is None or stated is None or abs(stated - end) > NEAR / fps
        try:
            return place(video.from_zero(begins[0], fps), begin, end, len(record), fps, shared)
        except DataError as error:
            raise DataError(f"{where}: {video.path} holds {error}") from error

    def rate(self, feature: str | None) -> float | None:
        """Frames per second of the first video of a camera that can be opened."""
        for record in self.layout.records if feature else ():
            try:
                video = OpenVideo(self.layout.video_file(record, feature or ""))
            except DataError:
                continue
            video.close()
            return video.rate_hz
        return None


class Videos:
    """The frames of episodes, from video files of which a few stay open."""

    def __init__(self, layout: Layout):
        self.parts = VideoParts(layout)
        self._open: Kept[Path, OpenVideo] = Kept(_OPEN_VIDEOS, OpenVideo.close)

    def frames(self, record: Record, feature: str, at: np.ndarray, fps: float) -> Iterator[np.ndarray]:
        """The frames of these rows (not decreasing), uint8 (H, W, 3)."""
        path = self.parts.layout.video_file(record, feature)
        video = self._open.take(path) or OpenVideo(path)
        try:
            yield from video.frames(self.parts.rows(record, feature, video, fps)[at])
        except BaseException:  # also when whoever reads has enough
            video.close()
            raise
        self._open.put(path, video)  # goes on where the next episode begins


class OpenVideo:
    """A video file with the times of its frames; reading episodes in order decodes each frame once."""

    def __init__(self, path: Path):
        if problem := absent(path):
            raise problem
        self.path, self.decoder = path, VideoDecoder(path)
        info = self.decoder.probe()
        self.times_s, self.pts, self.rate_hz = info.times_s, info.pts, info.rate_hz
        if info.pts is not None:  # on the file's own clock, which need not begin at 0
            first = info.pts[0] * float(self.decoder._stream.time_base or 0)
            self.times_s = info.times_s + first

    def close(self) -> None:
        self.decoder.close()

    def from_zero(self, earliest_s: float, fps: float) -> np.ndarray:
        """The times that metadata refer to: those of the file, unless episodes are said to begin before them."""
        late = len(self.times_s) and earliest_s < self.times_s[0] - NEAR / fps
        return self.times_s - self.times_s[0] if late else self.times_s

    def frames(self, indices: np.ndarray) -> Iterator[np.ndarray]:
        """The frames at `indices` (not decreasing), uint8 (H, W, 3)."""
        if self.pts is not None:
            yield from self.decoder.frames_at(self.pts[indices].tolist())
            return
        at, frames = 0, self.decoder.all_frames()
        frame = None
        for index in indices:
            if frame is None or index >= at:
                frame = next(islice(frames, int(index) - at, None))
                at = int(index) + 1
            yield frame


def is_depth(path: Path) -> bool:
    """Whether a video holds one channel of more than 8 bits: distances, not colours."""
    try:
        with av.open(str(path)) as container:
            form = container.streams.video[0].codec_context.pix_fmt or ""
    except (av.FFmpegError, OSError, IndexError):
        return False
    return form.startswith("gray") and form not in ("gray", "gray8")
