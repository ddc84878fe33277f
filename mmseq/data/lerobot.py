"""LeRobot datasets (v2.0, v2.1, v3) as episodes, read directly: no lerobot needs to be installed.

    from mmseq.data.lerobot import LeRobotReader
    reader = LeRobotReader("path/to/dataset", map={"force": ("observation.ft_sensor",)})
    episode, robot = reader[0], reader.embodiment()

======================================  =============================================================
`observation.images.<cam>`              `image.<cam>`, decoded when it is first used
`observation.image`                     `image.main`
`observation.state`                     `proprio`
`action`                                `action`
`task_index` of each row                `texts`, or `spans` where an episode has several tasks
`subtask_index`, `language_persistent`  `plans`, or `spans`: the subtask that is under way
`next.success`, `success`, ...          `success`; None where nobody knows
any other column                        named in `left_out`, and taken by `map` (mmseq/data/mapping.py)
`meta/embodiment.json` (optional)       the `Embodiment`; otherwise it is inferred from the data
`meta/mmseq.json` (optional)            {"tasks": {"<task>": {"paraphrases": ["..."], "plan": "..."}}}
======================================  =============================================================

Row k of an episode, in the order of `frame_index`, is frame k of its part of a video. At a lower `rate_hz`, a step
takes the observation at its beginning. Of the actions within it, it takes the last (absolute targets, and every gripper
axis), the sum (delta) or the mean (velocity).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mmseq.data.lerobot_columns import camera_name, columns_of, success_of, truth
from mmseq.data.lerobot_files import scalars, whole
from mmseq.data.lerobot_images import stored_images
from mmseq.data.lerobot_layout import Layout, Record
from mmseq.data.lerobot_rows import Rows
from mmseq.data.lerobot_text import Texts
from mmseq.data.lerobot_video import Videos
from mmseq.data.mapping import Streams
from mmseq.data.reader import DatasetReader
from mmseq.embodiment import Camera, Embodiment
from mmseq.episode import IMAGE_PREFIX, Episode
from mmseq.errors import DataError, EmbodimentError
from mmseq.streams import OWN_VECTORS, STREAMS

STATE, ACTION = "observation.state", "action"
_FOUND = {name: str(STREAMS[name].column) for name in OWN_VECTORS}


def _guess_action_form(names: Sequence[str]) -> str:
    """What the names of the axes, gripper aside, say: all `delta...`, all `vel...`, else absolute."""
    arm = [name.lower() for name in names if "gripper" not in name.lower()]
    for form, marks in (("delta", ("delta",)), ("velocity", ("velocity", "vel_", ".vel", "_vel"))):
        if arm and all(any(mark in name for mark in marks) for name in arm):
            return form
    return "absolute"


class LeRobotReader(DatasetReader):
    """A LeRobot dataset on disk.

    rate_hz: steps per second, at most the dataset's; default: the embodiment's, else the dataset's.
    embodiment: the contract to hold the data to; default: meta/embodiment.json, else inferred. map: columns that fill
    streams, over what the usual names give.
    Reading episodes in order decodes each video file once; memory holds a decoder per camera and the
    vectors of a few data files.
    Raises: DataError for a dataset that is of another version, empty, or of which no episode can be read.
    """

    def __init__(
        self,
        path: str | Path,
        rate_hz: float | None = None,
        embodiment: Embodiment | None = None,
        map: Streams | None = None,
    ):
        super().__init__(path, embodiment)
        self.layout = Layout(self.path)
        self.info, self.features, self.fps = self.layout.info, self.layout.features, self.layout.fps
        self.columns, self.notes = columns_of(self.layout), self.layout.notes
        self._fill(self._find(), map or {}, self.columns)
        if not self.cameras and not self.vectors:
            raise DataError(
                f"{self.path} has neither cameras nor {STATE} nor {ACTION}; {'; '.join(self.notes) or 'it is bare'}",
                fix="say with --map which columns are what",
            )
        self._rows, self._videos = Rows(self.layout, self.streams), Videos(self.layout)
        stored = self.path / "meta" / "embodiment.json"
        if self._given is None and stored.exists():
            self._given = Embodiment.load(stored)
        self._settle_fps()
        self._texts = Texts(self._rows, self.fps)
        wanted = (embodiment.rate_hz if embodiment else self.fps) if rate_hz is None else rate_hz
        self.rate_hz = float(wanted)
        if not 0 < self.rate_hz <= self.fps + 1e-6:
            raise DataError(
                f"{self.path}: rate_hz={self.rate_hz:g}, but the dataset has {self.fps:g} steps per second",
                fix="choose a rate that is not higher: actions cannot be invented",
            )
        if embodiment is not None and abs(embodiment.rate_hz - self.rate_hz) > 1e-6:
            raise EmbodimentError(
                f"embodiment {embodiment.name!r} runs at {embodiment.rate_hz:g} Hz, the episodes at {self.rate_hz:g}",
                fix="give the same rate_hz, or leave it out",
            )

    def _find(self) -> Streams:
        """What the usual names fill."""
        found: Streams = {}
        for name, column in self.columns.items():
            camera = camera_name(name) if name in self.features or name in self.layout.types else None
            if column.kind == "picture" and camera and f"{IMAGE_PREFIX}{camera}" not in found:
                if not name.endswith(camera) and camera != "main":
                    self.notes.append(f"camera {name!r} is called {camera!r}")
                found[f"{IMAGE_PREFIX}{camera}"] = (name,)
        vectors = {
            s: (n,) for s, n in _FOUND.items() if n in self.columns and self.columns[n].kind in ("vector", "flag")
        }
        outcome = success_of(self.columns)
        return found | vectors | ({"success": (outcome,)} if outcome else {})

    def _settle_fps(self) -> None:
        """Where timestamps are steady at another rate than meta/info.json says, the videos decide."""
        steps = np.asarray(self.layout.steps)
        if len(steps) == 0 or len(steps) < sum(len(r) > 2 for r in self.layout.records):
            return
        rate = 1 / float(np.median(steps))
        rate = float(round(rate)) if abs(rate - round(rate)) < 1e-3 * rate else rate
        if np.abs(steps * rate - 1).max() > 0.01:
            return
        shown = self._videos.parts.rate(next(iter(self._filmed), None))
        close = lambda a, b: shown is not None and abs(a - b) < 0.02 * b
        self.notes.append(f"meta/info.json says {self.fps:g} steps per second, the timestamps {rate:g}")
        if close(shown, rate) and not close(shown, self.fps):
            self.notes[-1] += " and so do the videos, which decide"
            self.fps = rate

    def _feature(self, camera: str) -> str:
        return self.streams[f"{IMAGE_PREFIX}{camera}"][0]

    @property
    def _filmed(self) -> list[str]:
        """The features of those cameras that are videos, not pictures in the rows."""
        return [f for f in map(self._feature, self.cameras) if f not in self.layout.types]

    # ------------------------------------------------------------------ vectors

    def _steps(self, length: int) -> np.ndarray:
        """The first frame of each step; int (steps,)."""
        steps = max(1, math.floor(length * self.rate_hz / self.fps + 1e-6))
        return np.floor(np.arange(steps) * self.fps / self.rate_hz + 1e-6).astype(np.int64)

    def _vectors(self, record: Record, stream: str) -> np.ndarray:
        """A vector stream of an episode at `rate_hz`, float32 (steps, axes)."""
        values = self._rows.vector(record, stream)
        steps = self._steps(len(values))
        if stream != "action" or len(steps) == len(values):
            return values[steps].copy()
        ends = np.append(steps[1:], min(len(values), round(len(steps) * self.fps / self.rate_hz)))
        last = values[ends - 1]
        form = self._action_form()
        if form == "absolute":
            return last.copy()
        total = np.add.reduceat(values[: ends[-1]].astype(np.float64), steps, axis=0)
        if form == "velocity":
            total /= (ends - steps)[:, None]
        known = {g.axis for g in self._given.grippers} if self._given is not None else set()
        gripper = np.array([name in known or "gripper" in name.lower() for name in self._rows.axes(stream)])
        return np.where(gripper, last, total).astype(np.float32)

    # ------------------------------------------------------------------ contract

    def _all(self, stream: str) -> list[tuple[str, np.ndarray]]:
        """A vector stream of every episode that can be read, each with what to call it."""

        def of(index: int) -> tuple[str, np.ndarray]:
            record = self._rows.record(index)
            return f"episode {record.index}", self._vectors(record, stream)

        return list(self._readable(of))

    def _size(self, camera: str) -> tuple[int, int]:
        """Height and width in pixels: what meta/info.json says where any episode agrees, else what most have."""
        feature = self._feature(camera)
        shape, names = self.features.get(feature, {}).get("shape"), self.features.get(feature, {}).get("names")
        shape = [whole(n) for n in shape] if isinstance(shape, list) and len(shape) == 3 else [0, 0, 0]
        named = isinstance(names, list) and bool(names) and str(names[0]).startswith("channel")
        said = shape[1:] if named or (shape[0] in (1, 3) and shape[2] not in (1, 3)) else shape[:2]
        seen: Counter[tuple[int, int]] = Counter()
        for image in self._readable(lambda index: next(self.frames(index, camera, [0]))):
            seen[image.shape[0], image.shape[1]] += 1
            if tuple(said) in seen:
                return image.shape[0], image.shape[1]
        size = max(seen, key=lambda s: (seen[s], s))
        self.notes.append(f"{feature} is {size[0]} x {size[1]}, meta/info.json says {said[0]} x {said[1]}")
        return size

    def _infer(self) -> Embodiment:
        sizes = {camera: self._size(camera) for camera in self.cameras}
        cameras = [Camera(name=name, height=height, width=width) for name, (height, width) in sizes.items()]
        axes = {stream: self._axes(stream, self._all(stream), self._rows.axes(stream)) for stream in self.vectors}
        return self._contract(self._robot_name(), cameras, axes, self._action_form())

    def _hold_to(self, given: Embodiment) -> Embodiment:
        wanted = given.vectors
        for stream in dict.fromkeys((*self.vectors, *wanted)):
            width = sum(map(self._rows.taken, self.streams.get(stream, ())))
            axes = len(wanted.get(stream, ()))
            if axes != width:
                column = "+".join(self.streams.get(stream, ())) or _FOUND.get(stream, stream)
                raise EmbodimentError(
                    f"embodiment {given.name!r} has {axes} axes for {column}, {self.path} has {width}",
                    fix="correct meta/embodiment.json, pass the embodiment of this robot, or say with --map what it is",
                )
        ours = {camera: self._size(camera) for camera in self.cameras}
        theirs = {camera.name: (camera.height, camera.width) for camera in given.cameras}
        if ours != theirs:
            raise EmbodimentError(
                f"embodiment {given.name!r} has cameras {theirs}, {self.path} has {ours} (name: height, width)",
                fix="correct the embodiment, pass the embodiment of this robot, or name cameras with --map",
            )
        if abs(given.rate_hz - self.rate_hz) <= 1e-6:
            return given
        action = given.action
        if action is not None and given.action_form == "delta":  # steps are longer, so their sums are larger
            action = self._axes("action", self._all("action"), action.names, action.units)
        return replace(given, rate_hz=self.rate_hz, action=action)

    def _action_form(self) -> str:
        if self._given is not None:
            return self._given.action_form
        return _guess_action_form(self._rows.axes("action")) if "action" in self.streams else "absolute"

    def _robot_name(self) -> str:
        """The dataset's robot type in characters that a name may have."""
        said = self.info.get("robot_type") or "unknown"
        kept = re.sub(r"[^\w .-]", "_", "_".join(map(str, said)) if isinstance(said, list) else str(said)).lstrip(
            "_ .-"
        )
        name = (kept if re.match(r"[A-Za-z0-9]", kept) else f"robot_{kept}")[:100]
        return name.rstrip("_")

    # ------------------------------------------------------------------ episodes

    def __len__(self) -> int:
        return len(self.layout.records)

    def __getitem__(self, index: int) -> Episode:
        index = range(len(self))[index]
        record = self._rows.record(index)
        at = self._steps(len(record))
        arrays: dict[str, Any] = {f"{IMAGE_PREFIX}{c}": partial(self._stack, index, c) for c in self.cameras}
        arrays |= {stream: self._vectors(record, stream) for stream in self.vectors}
        texts, plans, spans = self._texts.of(record, at)
        return Episode.from_arrays(
            f"{self.path.name}/{record.index:06d}",
            self.rate_hz,
            arrays,
            length=len(at),
            texts=texts,
            plans=plans,
            spans=spans,
            embodiment=(self._given.name if self._given else self._robot_name()),
            success=self._success(record),
            source=f"{self.path}#{record.index}",
            metadata={
                "format": f"lerobot {self.layout.version}",
                "source_rate_hz": self.fps,
                "source_steps": len(record),
            },
        )

    def _success(self, record: Record) -> bool | None:
        """Whether an episode reached its goal; None when neither its rows nor meta/episodes know."""
        names = self.streams.get("success", ())
        said = [v for n in names if self._rows.has(record, n) for v in scalars(self._rows.column(record, n)).tolist()]
        known = [v for v in map(truth, said) if v is not None]
        if not known:
            stated = record.meta.get(success_of(record.meta) or "")
            known = [v for v in map(truth, np.ravel(np.asarray(stated, object)).tolist()) if v is not None]
        return any(known) if known else None

    # ------------------------------------------------------------------ frames

    def check(self, index: int) -> None:
        """What can be known of an episode's pictures without decoding them. Raises: DataError."""
        record = self._rows.record(index)
        for feature in self._filmed:
            for _ in self._videos.frames(record, feature, np.arange(0), self.fps):
                pass

    def frames(self, index: int, camera: str, steps: Sequence[int] | None = None) -> Iterator[np.ndarray]:
        """The frames of episode `index` one at a time, uint8 (H, W, 3), in bounded memory.

        steps: only those, not decreasing; of video no more is decoded than from the key frame before each.
        Raises: DataError for a missing frame or a broken file.
        """
        record = self._rows.record(range(len(self))[index])
        feature = self._feature(camera)
        at = self._steps(len(record))
        at = at if steps is None else at[list(steps)]
        if feature in self.layout.types:
            return stored_images(self.path, record, feature, at)
        return self._videos.frames(record, feature, at, self.fps)
