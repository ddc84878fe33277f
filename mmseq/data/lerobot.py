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

Row k of an episode is frame k of its part of a video. At a lower `rate_hz`, a step takes the observation at its
beginning. Of the actions within it, it takes the last (absolute targets, and every gripper axis), the sum (delta) or
the mean (velocity).
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mmseq.data import lerobot_text
from mmseq.data.lerobot_columns import camera_name, columns_of, success_of, truth
from mmseq.data.lerobot_images import stored_images
from mmseq.data.lerobot_layout import REFETCH, Layout, Record, axis_names, read_parquet, scalars, unique, whole
from mmseq.data.lerobot_video import OpenVideo, VideoParts
from mmseq.data.mapping import Streams, describe, fill, left_out
from mmseq.embodiment import Axes, Camera, Embodiment
from mmseq.episode import IMAGE_PREFIX, Episode
from mmseq.errors import DataError, EmbodimentError, EpisodeError, MMSeqError
from mmseq.statistics import remarks

STATE, ACTION = "observation.state", "action"
_FOUND = {"proprio": STATE, "action": ACTION}
_TEXTS = ("task_index", "subtask_index", "timestamp", lerobot_text.PERSISTENT)
_OPEN_VIDEOS = 8  # decoders kept, one per camera and file in use
_OPEN_TABLES = 4  # data files of which the vectors are kept


def _guess_action_form(names: Sequence[str]) -> str:
    """What the names of the axes, gripper aside, say: all `delta...`, all `vel...`, else absolute."""
    arm = [name.lower() for name in names if "gripper" not in name.lower()]
    for form, marks in (("delta", ("delta",)), ("velocity", ("velocity", "vel_", ".vel", "_vel"))):
        if arm and all(any(mark in name for mark in marks) for name in arm):
            return form
    return "absolute"


class LeRobotReader:
    """A LeRobot dataset on disk: `len()`, `[i] -> Episode`, iteration, `embodiment()`.

    rate_hz: steps per second, at most the dataset's; default: the embodiment's, else the dataset's.
    embodiment: the contract to hold the data to; default: meta/embodiment.json, else inferred. map: columns that fill
    streams, over what the usual names give.
    Reading episodes in order decodes each video file once; memory holds a decoder per camera and the
    vectors of a few data files. `left_out` names the columns that nothing uses, `notes` says that and what is odd.
    Raises: DataError for a dataset that is of another version, empty, or of which no episode can be read. What is
    wrong with an episode is raised where that is opened.
    """

    def __init__(
        self,
        path: str | Path,
        rate_hz: float | None = None,
        embodiment: Embodiment | None = None,
        map: Streams | None = None,
    ):
        self.path = Path(path)
        self.layout = Layout(self.path)
        self.info, self.features, self.fps = self.layout.info, self.layout.features, self.layout.fps
        self._episodes = self.layout.records
        self._parts = VideoParts(self.layout)
        self.columns = columns_of(self.layout)
        self.streams = fill(self._find(), map or {}, self.columns, str(self.path))
        self.left_out = left_out(self.columns, self.streams)
        self.notes = [*self.layout.notes, *describe(self.columns, self.left_out)]
        if not any(
            stream.startswith(IMAGE_PREFIX) or stream not in ("text", "plan", "success") for stream in self.streams
        ):
            raise DataError(
                f"{self.path} has neither cameras nor {STATE} nor {ACTION}; {'; '.join(self.notes) or 'it is bare'}",
                fix="say with --map which columns are what",
            )
        self._widths: dict[str, int] = {}
        self._extra = self._read_extra()
        self._given, self._embodiment = embodiment, None
        stored = self.path / "meta" / "embodiment.json"
        if self._given is None and stored.exists():
            self._given = Embodiment.load(stored)
        self._open_state()
        self._settle_fps()
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
            camera = camera_name(name)
            if column.kind == "image" and camera and f"{IMAGE_PREFIX}{camera}" not in found:
                found[f"{IMAGE_PREFIX}{camera}"] = (name,)
        vectors = {
            s: (n,) for s, n in _FOUND.items() if n in self.columns and self.columns[n].kind in ("vector", "flag")
        }
        outcome = success_of(self.columns)
        return found | vectors | ({"success": (outcome,)} if outcome else {})

    def _read_extra(self) -> dict[str, dict[str, Any]]:
        path = self.path / "meta" / "mmseq.json"
        if not path.exists():
            return {}
        try:
            tasks = json.loads(path.read_bytes()).get("tasks", {})
            for task, extra in tasks.items():
                paraphrases, plan = extra.get("paraphrases", []), extra.get("plan", "")
                if not isinstance(paraphrases, list) or not all(isinstance(p, str) for p in [*paraphrases, plan]):
                    raise TypeError(f"task {task!r} has {extra!r}")
        except (ValueError, AttributeError, TypeError) as error:
            raise DataError(
                f"{path} cannot be read: {error}",
                fix='write {"tasks": {"<task>": {"paraphrases": ["..."], "plan": "..."}}}',
            ) from error
        return tasks

    def _settle_fps(self) -> None:
        """Where timestamps are steady at another rate than meta/info.json says, the videos decide."""
        steps = np.asarray(self.layout.steps)
        if len(steps) == 0 or len(steps) < sum(len(r) > 2 for r in self._episodes):
            return
        rate = 1 / float(np.median(steps))
        rate = float(round(rate)) if abs(rate - round(rate)) < 1e-3 * rate else rate
        if np.abs(steps * rate - 1).max() > 0.01:
            return
        shown = self._parts.rate(next((f for _, f in self._videos_used()), None))
        close = lambda a, b: shown is not None and abs(a - b) < 0.02 * b
        self.notes.append(f"meta/info.json says {self.fps:g} steps per second, the timestamps {rate:g}")
        if close(shown, rate) and not close(shown, self.fps):
            self.notes[-1] += " and so do the videos, which decide"
            self.fps = rate

    def _videos_used(self) -> list[tuple[str, str]]:
        return [(camera, f) for camera, f in self._cameras if f not in self.layout.types]

    @property
    def _cameras(self) -> list[tuple[str, str]]:
        """(camera, feature), in order."""
        return [(s.removeprefix(IMAGE_PREFIX), n[0]) for s, n in self.streams.items() if s.startswith(IMAGE_PREFIX)]

    @property
    def _vector_streams(self) -> list[str]:
        return [s for s in self.streams if not s.startswith(IMAGE_PREFIX) and s not in ("text", "plan", "success")]

    # ------------------------------------------------------------------ rows

    def _open_state(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._tables: OrderedDict[Path, pa.Table] = OrderedDict()
        self._videos: OrderedDict[Path, OpenVideo] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_pid", "_lock", "_tables", "_videos")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_state()

    def _acquire(self) -> threading.RLock:
        if self._pid != os.getpid():  # a forked worker must not share file positions with its parent
            self._open_state()
        return self._lock

    def _table(self, path: Path) -> pa.Table:
        """The columns in use of one data file, pictures aside."""
        with self._acquire():
            if path in self._tables:
                self._tables.move_to_end(path)
                return self._tables[path]
            wanted = {n for s, names in self.streams.items() if not s.startswith(IMAGE_PREFIX) for n in names}
            wanted |= {n for n in _TEXTS if n in self.layout.types}
            table = read_parquet(path, sorted(wanted))
            self._tables[path] = table
            if len(self._tables) > _OPEN_TABLES:
                self._tables.popitem(last=False)
            return table

    def _record(self, index: int) -> Record:
        """An episode's record. Raises: EpisodeError when it cannot be read."""
        record = self._episodes[range(len(self))[index]]
        if record.problem:
            raise EpisodeError(f"{self._called(record)}: {record.problem}")
        return record

    def _called(self, record: Record) -> str:
        return f"{self.path}, episode {record.index}"

    def _column(self, record: Record, name: str) -> pa.ChunkedArray:
        """A column's rows of an episode. Raises: EpisodeError when one of its files has no such column."""
        chunks: list[pa.Array] = []
        for path, start, end in record.parts:
            table = self._table(path)
            if name not in table.column_names:
                raise EpisodeError(f"{self._called(record)}: {path} lacks the column {name!r}", fix=REFETCH)
            chunks += table[name].slice(start, end - start).chunks
        return pa.chunked_array(chunks)

    def _matrix(self, record: Record, name: str) -> np.ndarray:
        """A column of numbers, float32 (rows, axes). Raises: EpisodeError for rows of unequal widths."""
        array = self._column(record, name).combine_chunks()
        array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
        rows = len(array)
        if pa.types.is_nested(array.type):
            uneven = not pa.types.is_fixed_size_list(array.type) and len(set(array.value_lengths().to_pylist())) > 1
            if array.null_count or uneven:
                raise EpisodeError(f"{self._called(record)}: {name} has rows of unequal widths, or none", fix=REFETCH)
            array = array.flatten()
        try:
            return array.to_numpy(zero_copy_only=False).astype(np.float32).reshape(rows, -1)
        except (TypeError, ValueError) as error:
            raise EpisodeError(f"{self._called(record)}: {name} holds no numbers: {error}", fix=REFETCH) from error

    def _width(self, name: str) -> int:
        """How many numbers a row has: what meta/info.json says where any episode agrees, else what most have."""
        if name not in self._widths:
            shape = self.features.get(name, {}).get("shape") or [1]
            said, seen = whole(shape[-1]), Counter()
            for record in (r for r in self._episodes if not r.problem):
                try:
                    seen[self._matrix(record, name).shape[1]] += 1
                except MMSeqError:
                    continue
                if said in seen:
                    break
            most = max(seen, key=lambda w: (seen[w], w), default=said or 1)
            self._widths[name] = said if said is not None and said in seen else most
        return self._widths[name]

    def _names(self, stream: str) -> list[str]:
        """The names of a vector's axes, over all columns that are joined."""
        names: list[str] = []
        for column in self.streams[stream]:
            own = len(self.streams[stream]) > 1 or stream not in _FOUND
            width, said = self._width(column), self.features.get(column, {}).get("names")
            last = column.rpartition(".")[2]
            names += [last] if own and width == 1 and not said else axis_names(said, width, last if own else "axis")
        return unique(names)

    def _steps(self, length: int) -> np.ndarray:
        """The first frame of each step; int (steps,)."""
        steps = max(1, math.floor(length * self.rate_hz / self.fps + 1e-6))
        return np.minimum(np.floor(np.arange(steps) * self.fps / self.rate_hz + 1e-6).astype(np.int64), length - 1)

    def _vectors(self, record: Record, stream: str) -> np.ndarray:
        """A vector stream of an episode at `rate_hz`, checked to be finite; float32 (steps, axes)."""
        parts = []
        for name in self.streams[stream]:
            values = self._matrix(record, name)
            if values.shape[1] != self._width(name):
                raise EpisodeError(
                    f"{self._called(record)}: {name} has {values.shape[1]} numbers in a row, others have "
                    f"{self._width(name)}",
                    fix=REFETCH,
                )
            parts.append(values)
        values = np.concatenate(parts, axis=1)
        bad = ~np.isfinite(values)
        if bad.any():
            step, axis = np.argwhere(bad)[0]
            raise EpisodeError(
                f"{self._called(record)}: {'+'.join(self.streams[stream])} axis {self._names(stream)[axis]!r} is "
                f"{values[step, axis]} at step {step}",
                fix="leave the episode out with --skip-bad, or repair it",
            )
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
        known = {self._given.gripper.axis} if self._given is not None and self._given.gripper else set()
        gripper = np.array([name in known or "gripper" in name.lower() for name in self._names(stream)])
        return np.where(gripper, last, total).astype(np.float32)

    # ------------------------------------------------------------------ contract

    def embodiment(self) -> Embodiment:
        """The contract of the robot, with statistics over every episode that can be read where it is inferred.

        Raises: DataError when the dataset contradicts meta/embodiment.json or the given one.
        """
        if self._embodiment is None:
            self._embodiment = self._hold_to(self._given) if self._given is not None else self._infer()
        return self._embodiment

    def _all(self, stream: str) -> np.ndarray:
        """A vector stream of every episode that can be read, end to end; what lies far from the rest is noted."""
        found: list[tuple[str, np.ndarray]] = []
        problem = None
        for record in self._episodes:
            try:
                if not record.problem:
                    found.append((f"episode {record.index}", self._vectors(record, stream)))
            except MMSeqError as error:
                problem = problem or error
        if not found:
            raise problem or DataError(f"{self.path} has no {stream}")
        self.notes += remarks(found, self._names(stream), stream)
        return np.concatenate([values for _, values in found])

    def _size(self, camera: str, feature: str) -> tuple[int, int]:
        """Height and width in pixels: what meta/info.json says where any episode agrees, else what most have."""
        shape, names = self.features.get(feature, {}).get("shape"), self.features.get(feature, {}).get("names")
        shape = [whole(n) for n in shape] if isinstance(shape, list) and len(shape) == 3 else [0, 0, 0]
        named = isinstance(names, list) and bool(names) and str(names[0]).startswith("channel")
        said = shape[1:] if named or (shape[0] in (1, 3) and shape[2] not in (1, 3)) else shape[:2]
        seen: Counter[tuple[int, int]] = Counter()
        problem: MMSeqError | None = None
        for index in range(len(self)):
            try:
                image = next(self.frames(index, camera, [0]))
            except MMSeqError as error:
                problem = problem or error
                continue
            seen[image.shape[0], image.shape[1]] += 1
            if tuple(said) in seen:
                return image.shape[0], image.shape[1]
        if not seen:
            raise problem or DataError(f"{self.path} has no frames of {feature}")
        size = max(seen, key=lambda s: (seen[s], s))
        self.notes.append(f"{feature} is {size[0]} x {size[1]}, meta/info.json says {said[0]} x {said[1]}")
        return size

    def _infer(self) -> Embodiment:
        sizes = [(camera, *self._size(camera, feature)) for camera, feature in self._cameras]
        axes = {s: Axes.from_values(self._all(s), self._names(s)) for s in self._vector_streams}
        return Embodiment(
            name=self._robot_name(),
            rate_hz=self.rate_hz,
            cameras=tuple(Camera(name=name, height=height, width=width) for name, height, width in sizes),
            proprio=axes.pop("proprio", None),
            action=axes.pop("action", None),
            action_form=self._action_form(),
            gripper=None,  # which value means open is not written in a LeRobot dataset
            streams=axes,
        )

    def _hold_to(self, given: Embodiment) -> Embodiment:
        wanted = given.vectors
        for stream in dict.fromkeys((*self._vector_streams, *wanted)):
            width = sum(map(self._width, self.streams.get(stream, ())))
            axes = len(wanted.get(stream, ()))
            if axes != width:
                column = "+".join(self.streams.get(stream, ())) or _FOUND.get(stream, stream)
                raise EmbodimentError(
                    f"embodiment {given.name!r} has {axes} axes for {column}, {self.path} has {width}",
                    fix="correct meta/embodiment.json, pass the embodiment of this robot, or say with --map what it is",
                )
        ours = {name: self._size(name, feature) for name, feature in self._cameras}
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
            action = Axes.from_values(self._all("action"), action.names, action.units)
        return replace(given, rate_hz=self.rate_hz, action=action)

    def _action_form(self) -> str:
        if self._given is not None:
            return self._given.action_form
        return _guess_action_form(self._names("action")) if "action" in self.streams else "absolute"

    def _robot_name(self) -> str:
        """The dataset's robot type in characters that a name may have."""
        said = self.info.get("robot_type")
        kept = re.sub(r"[^\w .-]", "_", str(said or "unknown")).lstrip("_ .-")
        name = (kept if re.match(r"[A-Za-z0-9]", kept) else f"robot_{kept}")[:100]
        return name.rstrip("_") or "unknown"

    # ------------------------------------------------------------------ episodes

    @property
    def cameras(self) -> list[str]:
        return [camera for camera, _ in self._cameras]

    def __len__(self) -> int:
        return len(self._episodes)

    def __iter__(self) -> Iterator[Episode]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Episode:
        index = range(len(self))[index]
        record = self._record(index)
        at = self._steps(len(record))
        arrays: dict[str, Any] = {}
        for camera, _ in self._cameras:
            arrays[f"image.{camera}"] = lambda camera=camera: np.stack(list(self.frames(index, camera)))
        arrays |= {stream: self._vectors(record, stream) for stream in self._vector_streams}
        tasks, plans = self._texts(record, at)
        return Episode.from_arrays(
            f"{self.path.name}/{record.index:06d}",
            self.rate_hz,
            arrays,
            length=len(at),
            texts=tasks[0],
            plans=plans[0],
            spans=[*tasks[1], *plans[1]],
            embodiment=(self._given.name if self._given else self._robot_name()),
            success=self._success(record),
            source=f"{self.path}#{record.index}",
            metadata={
                "format": f"lerobot {self.layout.version}",
                "source_rate_hz": self.fps,
                "source_steps": len(record),
            },
        )

    def _looked_up(self, record: Record, name: str, texts: dict[int, str], at: np.ndarray) -> list[str]:
        """The texts of a column that holds texts, or their numbers."""
        values = self._column(record, name)
        if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            return [str(v or "") for v in np.asarray(values.to_pylist(), dtype=object)[at]]
        numbers = [whole(v) for v in scalars(values)[at]]
        if unknown := [n for n in numbers if n is not None and n not in texts]:
            raise EpisodeError(
                f"{self._called(record)}: {name} is {unknown[0]}, which meta/ has no text for", fix=REFETCH
            )
        return [texts.get(n, "") if n is not None else "" for n in numbers]

    def _texts(self, record: Record, at: np.ndarray) -> tuple[Any, Any]:
        """(texts, spans) of the tasks, and of the plans, at each step."""
        stated = record.meta.get("tasks")
        stated = [t for t in ([stated] if isinstance(stated, str) else stated if stated is not None else []) if t]
        name = self.streams.get("text", ("task_index",))[0]
        if name in self.layout.types and not (name == "task_index" and not self.layout.tasks):
            tasks = [(task,) if task else () for task in self._looked_up(record, name, self.layout.tasks, at)]
        else:
            tasks = [tuple(stated)] * len(at)
        more = {task: self._extra.get(task, {}) for said in set(tasks) for task in said}
        phrased = [
            tuple(dict.fromkeys(p for t in said for p in (t, *more[t].get("paraphrases", ())))) for said in tasks
        ]
        plans = self._plans(record, at) or [
            tuple(more[t]["plan"] for t in said if more[t].get("plan")) for said in tasks
        ]
        return lerobot_text.by_step("text", phrased), lerobot_text.by_step("plan", plans)

    def _plans(self, record: Record, at: np.ndarray) -> list[tuple[str, ...]]:
        """The subtask of each step, [] where nobody wrote any."""
        types = self.layout.types
        name = self.streams.get("plan", ("subtask_index",))[0]
        found = self._looked_up(record, name, self.layout.subtasks, at) if name in types else []
        if not any(found) and lerobot_text.PERSISTENT in types:
            rows = self._column(record, lerobot_text.PERSISTENT).to_pylist()
            times = (
                scalars(self._column(record, "timestamp")) if "timestamp" in types else np.arange(len(rows)) / self.fps
            )
            found = lerobot_text.active([rows[i] for i in at], times[at], "subtask")
        return [(text,) if text else () for text in found] if any(found) else []

    def _success(self, record: Record) -> bool | None:
        """Whether an episode reached its goal; None when neither its rows nor meta/episodes know."""
        names = self.streams.get("success", ())
        said = [v for n in names for v in scalars(self._column(record, n)).tolist()]
        known = [v for v in map(truth, said) if v is not None]
        if not known:
            stated = record.meta.get(success_of(record.meta) or "")
            known = [v for v in map(truth, np.ravel(np.asarray(stated, object)).tolist()) if v is not None]
        return any(known) if known else None

    # ------------------------------------------------------------------ frames

    def check(self, index: int) -> None:
        """What can be known of an episode's pictures without decoding them. Raises: DataError."""
        record = self._record(index)
        for _, feature in self._videos_used():
            for _ in self._video_frames(record, feature, np.arange(0)):
                pass

    def frames(self, index: int, camera: str, steps: Sequence[int] | None = None) -> Iterator[np.ndarray]:
        """The frames of episode `index` one at a time, uint8 (H, W, 3), in bounded memory.

        steps: only those, not decreasing; of video no more is decoded than from the key frame before each.
        Raises: DataError for a missing frame or a broken file.
        """
        record = self._record(index)
        feature = dict(self._cameras)[camera]
        at = self._steps(len(record))
        at = at if steps is None else at[list(steps)]
        if feature in self.layout.types:
            return stored_images(self.path, record, feature, at)
        return self._video_frames(record, feature, at)

    def _video_frames(self, record: Record, feature: str, at: np.ndarray) -> Iterator[np.ndarray]:
        path = self.layout.video_file(record, feature)
        with self._acquire():
            video = self._videos.pop(path, None)
        done = False
        video = video or OpenVideo(path)
        try:
            yield from video.frames(self._parts.rows(record, feature, video, self.fps)[at])
            done = True
        finally:
            # whoever reads holds the decoder; it comes back where the next episode begins
            if done:
                with self._acquire():
                    stale = self._videos.pop(path, None)
                    self._videos[path] = video
                    if len(self._videos) > _OPEN_VIDEOS:
                        _, oldest = self._videos.popitem(last=False)
                        oldest.close()
                if stale is not None:
                    stale.close()
            else:
                video.close()
