"""LeRobot v3 datasets as episodes, read directly: no lerobot needs to be installed.

    from mmseq.data.lerobot import LeRobotReader
    reader = LeRobotReader("path/to/dataset")
    episode, robot = reader[0], reader.embodiment()

======================================  =============================================================
`observation.images.<cam>`              `image.<cam>`, decoded when it is first used
`observation.image`                     `image.main`
`observation.state`                     `proprio`
`action`                                `action`
`task` of the episode                   `texts`
`success` of the episode, or a column   `success`
`next.success` / `success`
`meta/embodiment.json` (optional)       the `Embodiment`; otherwise it is inferred from info.json
`meta/mmseq.json` (optional)            {"tasks": {"<task>": {"paraphrases": ["..."], "plan": "..."}}}
======================================  =============================================================

At a lower `rate_hz`, a step takes the observation at its beginning. Of the actions within it, it takes
the last (absolute targets, and every gripper axis), the sum (delta) or the mean (velocity).
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mmseq.data.video import VideoDecoder
from mmseq.embodiment import Axes, Camera, Embodiment
from mmseq.episode import Episode
from mmseq.errors import DataError, EmbodimentError, EpisodeError

STATE, ACTION = "observation.state", "action"
_IMAGES, _IMAGE = "observation.images.", "observation.image"
_BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")
_SUCCESS = ("next.success", "success", "is_episode_successful")
_REFETCH = "fetch the dataset again: hf download <repo> --repo-type dataset --local-dir <path>"
_OPEN_VIDEOS = 8  # decoders kept, one per camera and file in use
_OPEN_TABLES = 4  # data files of which the vectors are kept


def _axis_names(feature: dict[str, Any], width: int) -> list[str]:
    """Names of the axes from a list, {"motors": [...]} or {"x": 0, "y": 1}; numbered where they do not fit."""
    names = feature.get("names")
    if isinstance(names, dict):
        if names and all(isinstance(v, int) for v in names.values()):
            names = sorted(names, key=names.__getitem__)
        else:
            names = [name for value in names.values() for name in (value if isinstance(value, list) else [value])]
    names = [str(name) for name in names] if isinstance(names, list) else []
    if len(names) == width and len(set(names)) == width:
        return names
    stem = names[0] if len(names) == 1 else "axis"
    return [f"{stem}_{i}" for i in range(width)]


def _guess_action_form(names: list[str]) -> str:
    """What the names of the axes, gripper aside, say: all `delta...`, all `vel...`, else absolute."""
    arm = [name.lower() for name in names if "gripper" not in name.lower()]
    for form, marks in (("delta", ("delta",)), ("velocity", ("velocity", "vel_", ".vel", "_vel"))):
        if arm and all(any(mark in name for mark in marks) for name in arm):
            return form
    return "absolute"


class LeRobotReader:
    """A LeRobot v3 dataset on disk: `len()`, `[i] -> Episode`, iteration, `embodiment()`.

    rate_hz: steps per second, at most the dataset's; default: the embodiment's, else the dataset's.
    embodiment: the contract to hold the data to; default: meta/embodiment.json, else inferred.
    Reading episodes in order decodes each video file once; memory holds a decoder per camera and the
    vectors of a few data files. `unused` names the features that have no place in an episode.
    Raises: DataError for a dataset that is of another version, empty, incomplete or inconsistent.
    """

    def __init__(self, path: str | Path, rate_hz: float | None = None, embodiment: Embodiment | None = None):
        self.path = Path(path)
        self.info = self._read_info()
        self.fps = float(self.info["fps"])
        self.features: dict[str, dict[str, Any]] = self.info["features"]
        self._cameras = self._find_cameras()
        used = {feature for _, feature in self._cameras} | {STATE, ACTION, *_BOOKKEEPING, *_SUCCESS}
        self.unused = tuple(name for name in self.features if name not in used)
        self._episodes = self._read_episodes()
        self._tasks = self._read_tasks()
        self._extra = self._read_extra()
        self._given, self._embodiment = embodiment, None
        stored = self.path / "meta" / "embodiment.json"
        if self._given is None and stored.exists():
            self._given = Embodiment.load(stored)
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
        self._open_state()

    # ------------------------------------------------------------------ metadata

    def _read_info(self) -> dict[str, Any]:
        path = self.path / "meta" / "info.json"
        if not path.is_file():
            raise DataError(
                f"{self.path} is not a LeRobot dataset (no meta/info.json)", fix="give the folder that holds meta/"
            )
        try:
            info = json.loads(path.read_bytes())
            version = str(info["codebase_version"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is corrupt: {error!r}", fix=_REFETCH) from error
        if not version.startswith("v3"):
            if version.startswith(("v2", "v1")):
                fix = (
                    "convert it: python -m lerobot.scripts.convert_dataset_v21_to_v30 --repo-id=<repo> "
                    f"--root={self.path} --push-to-hub=false"
                )
            else:
                fix = "update mmseq, or write the dataset as v3"
            raise DataError(f"{self.path} is a LeRobot dataset of version {version}, this reads v3", fix=fix)
        fps, features = info.get("fps"), info.get("features")
        if not isinstance(fps, (int, float)) or not (math.isfinite(fps) and fps > 0) or not isinstance(features, dict):
            raise DataError(f"{path} has fps={fps!r} and features of type {type(features).__name__}", fix=_REFETCH)
        for name, feature in features.items():
            shape = feature.get("shape", []) if isinstance(feature, dict) else None
            if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape):
                raise DataError(f"{path}: feature {name!r} is {feature!r:.200}", fix=_REFETCH)
        return info

    def _find_cameras(self) -> list[tuple[str, str]]:
        """(camera, feature) in the order of info.json."""
        cameras = []
        for name, feature in self.features.items():
            if feature.get("dtype") not in ("video", "image") or (feature.get("info") or {}).get("is_depth_map"):
                continue
            if name.startswith(_IMAGES):
                cameras.append((name.removeprefix(_IMAGES), name))
            elif name == _IMAGE or name.startswith(_IMAGE + "."):
                cameras.append((name.removeprefix(_IMAGE).removeprefix(".") or "main", name))
        return cameras

    def _read_parquet(self, path: Path, columns: list[str] | None = None) -> pa.Table:
        if not path.is_file():
            raise DataError(f"{path} is missing", fix=_REFETCH)
        try:
            return pq.read_table(path, columns=columns, partitioning=None)  # type: ignore[arg-type]
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path} is truncated or corrupt: {error}", fix=_REFETCH) from error

    def _read_episodes(self) -> list[dict[str, Any]]:
        files = sorted((self.path / "meta" / "episodes").glob("chunk-*/file-*.parquet"))
        rows: list[dict[str, Any]] = []
        for file in files:
            try:
                names = [n for n in pq.read_schema(file).names if not n.startswith("stats/")]
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"{file} is truncated or corrupt: {error}", fix=_REFETCH) from error
            rows += self._read_parquet(file, names).to_pylist()
        promised = self.info.get("total_episodes", len(rows))
        if not rows and not promised:
            raise DataError(f"{self.path} has no episodes", fix="record some, or leave the dataset out")
        if len(rows) != promised:
            raise DataError(
                f"{self.path}: meta/info.json promises {promised} episodes, meta/episodes lists {len(rows)}",
                fix=_REFETCH,
            )
        try:
            rows.sort(key=lambda row: row["episode_index"])
            frames = sum(row["length"] for row in rows)
            files = {self._data_path(row) for row in rows}
            files |= {self._video_path(row, f) for row in rows for _, f in self._cameras if self._is_video(f)}
        except (KeyError, TypeError) as error:
            raise DataError(f"{self.path}: meta/episodes lacks {error}", fix=_REFETCH) from error
        if self.info.get("total_frames", frames) != frames:
            raise DataError(
                f"{self.path}: meta/info.json promises {self.info['total_frames']} frames, the episodes have {frames}",
                fix=_REFETCH,
            )
        missing = sorted(str(file) for file in files if not file.is_file())
        if missing:
            raise DataError(
                f"{missing[0]} is missing" + (f" (and {len(missing) - 1} more)" if missing[1:] else ""), fix=_REFETCH
            )
        return rows

    def _read_tasks(self) -> dict[int, str]:
        table = self._read_parquet(self.path / "meta" / "tasks.parquet")
        texts = [
            n
            for n in table.column_names
            if pa.types.is_string(table.schema.field(n).type) or pa.types.is_large_string(table.schema.field(n).type)
        ]
        if "task_index" not in table.column_names or not texts:
            raise DataError(f"{self.path}/meta/tasks.parquet has columns {table.column_names}", fix=_REFETCH)
        column = "task" if "task" in texts else texts[0]  # older writers left the column of texts unnamed
        return dict(zip(table["task_index"].to_pylist(), table[column].to_pylist(), strict=True))

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

    def _data_path(self, row: dict[str, Any]) -> Path:
        template = self.info.get("data_path") or "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
        return self.path / template.format(chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])

    def _video_path(self, row: dict[str, Any], feature: str) -> Path:
        template = self.info.get("video_path") or "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
        return self.path / template.format(
            video_key=feature,
            chunk_index=row[f"videos/{feature}/chunk_index"],
            file_index=row[f"videos/{feature}/file_index"],
        )

    def _is_video(self, feature: str) -> bool:
        return self.features[feature]["dtype"] == "video"

    # ------------------------------------------------------------------ vectors

    def _open_state(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._tables: OrderedDict[Path, dict[str, np.ndarray]] = OrderedDict()
        self._videos: OrderedDict[Path, VideoDecoder] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_pid", "_lock", "_tables", "_videos")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_state()

    def _acquire(self) -> threading.RLock:
        if self._pid != os.getpid():  # a forked worker must not share file positions with its parent
            self._open_state()
        return self._lock

    def _width(self, feature: str) -> int:
        shape = self.features[feature].get("shape") or [1]
        if len(shape) != 1:
            raise DataError(f"{self.path}: {feature} has shape {list(shape)}, expected one axis", fix="flatten it")
        return int(shape[0])

    def _matrix(self, table: pa.Table, feature: str, path: Path) -> np.ndarray:
        column, width = table[feature].combine_chunks(), self._width(feature)
        if isinstance(column, pa.ChunkedArray):
            column = column.chunk(0)
        if pa.types.is_nested(column.type):
            lengths = (
                column.value_lengths().to_numpy(zero_copy_only=False)
                if not pa.types.is_fixed_size_list(column.type)
                else None
            )
            if column.null_count or (lengths is not None and (lengths != width).any()):
                raise DataError(f"{path}: {feature} has rows that do not hold {width} numbers", fix=_REFETCH)
            column = column.flatten()
        values = column.to_numpy(zero_copy_only=False)
        if values.size != len(table) * width:
            raise DataError(
                f"{path}: {feature} holds {values.size} numbers for {len(table)} rows of {width}", fix=_REFETCH
            )
        return values.reshape(len(table), width).astype(np.float32)

    def _table(self, path: Path) -> dict[str, np.ndarray]:
        """The vectors of one data file: (rows, axes) float32, and its bookkeeping columns."""
        with self._acquire():
            if path in self._tables:
                self._tables.move_to_end(path)
                return self._tables[path]
            wanted = [n for n in (STATE, ACTION, *_SUCCESS, "timestamp", "episode_index") if n in self.features]
            table = self._read_parquet(path, wanted)
            absent = [n for n in wanted if n not in table.column_names]
            if absent:
                raise DataError(f"{path} lacks the columns {absent} that meta/info.json promises", fix=_REFETCH)
            arrays = {n: self._matrix(table, n, path) for n in (STATE, ACTION) if n in wanted}
            for name in (*_SUCCESS, "timestamp", "episode_index"):
                if name in wanted:
                    column = table[name].combine_chunks()
                    column = column.flatten() if pa.types.is_nested(column.type) else column
                    arrays[name] = column.to_numpy(zero_copy_only=False)
            self._tables[path] = arrays
            if len(self._tables) > _OPEN_TABLES:
                self._tables.popitem(last=False)
            return arrays

    def _rows(self, index: int) -> tuple[dict[str, np.ndarray], int, int]:
        """The data file of an episode and its first and end row there."""
        row = self._episodes[index]
        path = self._data_path(row)
        table = self._table(path)
        found = np.flatnonzero(table["episode_index"] == row["episode_index"])
        length = int(row["length"])
        if len(found) != length or length == 0 or found[-1] - found[0] + 1 != length:
            raise DataError(
                f"{path}: episode {row['episode_index']} has {len(found)} rows, meta/episodes says {length}",
                fix=_REFETCH,
            )
        return table, int(found[0]), int(found[-1]) + 1

    def _steps(self, length: int) -> np.ndarray:
        """The first frame of each step; int (steps,)."""
        steps = max(1, math.floor(length * self.rate_hz / self.fps + 1e-6))
        return np.minimum(np.floor(np.arange(steps) * self.fps / self.rate_hz + 1e-6).astype(np.int64), length - 1)

    def _vectors(self, index: int, form: str, feature: str) -> np.ndarray:
        """proprio or action of an episode at `rate_hz`, checked to be finite; float32 (steps, axes)."""
        table, start, end = self._rows(index)
        values = table[feature][start:end]
        bad = ~np.isfinite(values)
        if bad.any():
            step, axis = np.argwhere(bad)[0]
            name = _axis_names(self.features[feature], values.shape[1])[axis]
            raise EpisodeError(
                f"{self.path}, episode {self._episodes[index]['episode_index']}: {feature} axis {name!r} is "
                f"{values[step, axis]} at step {step}",
                fix="repair or remove the episode: lerobot-edit-dataset --operation.type delete_episodes",
            )
        steps = self._steps(len(values))
        if feature == STATE or len(steps) == len(values):
            return values[steps].copy()
        ends = np.append(steps[1:], min(len(values), round(len(steps) * self.fps / self.rate_hz)))
        last = values[ends - 1]
        if form == "absolute":
            return last.copy()
        total = np.add.reduceat(values[: ends[-1]].astype(np.float64), steps, axis=0)
        if form == "velocity":
            total /= (ends - steps)[:, None]
        names = _axis_names(self.features[feature], values.shape[1])
        gripper = np.array(["gripper" in name.lower() for name in names])
        return np.where(gripper, last, total).astype(np.float32)

    def embodiment(self) -> Embodiment:
        """The contract of the robot, with statistics over the whole dataset where it is inferred.

        Raises: DataError when the dataset contradicts meta/embodiment.json or the given one.
        """
        if self._embodiment is None:
            self._embodiment = self._hold_to(self._given) if self._given is not None else self._infer()
        return self._embodiment

    def _all(self, feature: str, form: str) -> np.ndarray:
        return np.concatenate([self._vectors(i, form, feature) for i in range(len(self))])

    def _size(self, feature: str) -> tuple[int, int]:
        """Height and width in pixels."""
        shape, names = list(self.features[feature].get("shape") or []), self.features[feature].get("names")
        if len(shape) != 3:
            raise DataError(
                f"{self.path}: {feature} has shape {shape}, expected height, width and channels", fix=_REFETCH
            )
        first = (names and str(names[0]).startswith("channel")) or (shape[0] in (1, 3) and shape[2] not in (1, 3))
        return (shape[1], shape[2]) if first else (shape[0], shape[1])

    def _infer(self) -> Embodiment:
        sizes = [(camera, *self._size(feature)) for camera, feature in self._cameras]
        names = {n: _axis_names(self.features[n], self._width(n)) for n in (STATE, ACTION) if n in self.features}
        form = self._action_form()
        axes = {n: Axes.from_values(self._all(n, form), names[n]) for n in names}
        return Embodiment(
            name=self._robot_name(),
            rate_hz=self.rate_hz,
            cameras=tuple(Camera(name=name, height=height, width=width) for name, height, width in sizes),
            proprio=axes.get(STATE),
            action=axes.get(ACTION),
            action_form=form,
        )

    def _hold_to(self, given: Embodiment) -> Embodiment:
        for feature, axes in ((STATE, given.proprio), (ACTION, given.action)):
            width = self._width(feature) if feature in self.features else 0
            if len(axes or ()) != width:
                raise EmbodimentError(
                    f"embodiment {given.name!r} has {len(axes or ())} axes for {feature}, {self.path} has {width}",
                    fix="correct meta/embodiment.json, or pass the embodiment of this robot",
                )
        ours = {name: self._size(feature) for name, feature in self._cameras}
        theirs = {camera.name: (camera.height, camera.width) for camera in given.cameras}
        if ours != theirs:
            raise EmbodimentError(
                f"embodiment {given.name!r} has cameras {theirs}, {self.path} has {ours} (name: height, width)",
                fix="correct the embodiment, or pass the embodiment of this robot",
            )
        if abs(given.rate_hz - self.rate_hz) <= 1e-6:
            return given
        action = given.action
        if action is not None and given.action_form == "delta":  # steps are longer, so their sums are larger
            action = Axes.from_values(self._all(ACTION, "delta"), action.names, action.units)
        return replace(given, rate_hz=self.rate_hz, action=action)

    # ------------------------------------------------------------------ episodes

    def _action_form(self) -> str:
        if self._given is not None:
            return self._given.action_form
        if ACTION not in self.features:
            return "absolute"
        return _guess_action_form(_axis_names(self.features[ACTION], self._width(ACTION)))

    @property
    def cameras(self) -> list[str]:
        return [camera for camera, _ in self._cameras]

    def __len__(self) -> int:
        return len(self._episodes)

    def __iter__(self) -> Iterator[Episode]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Episode:
        index = range(len(self))[index]
        row = self._episodes[index]
        table, start, end = self._rows(index)
        steps = len(self._steps(end - start))
        form = self._action_form()
        arrays: dict[str, Any] = {}
        for camera, _ in self._cameras:
            arrays[f"image.{camera}"] = lambda camera=camera: np.stack(list(self.frames(index, camera)))
        for stream, feature in (("proprio", STATE), ("action", ACTION)):
            if feature in self.features:
                arrays[stream] = self._vectors(index, form, feature)
        if not arrays:
            raise DataError(
                f"{self.path} has neither cameras nor {STATE} nor {ACTION}", fix="name its features as LeRobot does"
            )
        texts, plans = self._texts(row)
        return Episode.from_arrays(
            f"{self.path.name}/{row['episode_index']:06d}",
            self.rate_hz,
            arrays,
            length=steps,
            texts=texts,
            plans=plans,
            embodiment=(self._given.name if self._given else self._robot_name()),
            success=self._success(row, table, start, end),
            source=f"{self.path}#{row['episode_index']}",
            metadata={"format": "lerobot v3", "source_rate_hz": self.fps, "source_steps": end - start},
        )

    def _texts(self, row: dict[str, Any]) -> tuple[list[str], list[str]]:
        tasks = [task for task in row.get("tasks") or [] if task]
        texts, plans = list(tasks), []
        for task in tasks:
            extra = self._extra.get(task, {})
            texts += extra.get("paraphrases", [])
            plans += [extra["plan"]] if extra.get("plan") else []
        return list(dict.fromkeys(texts)), plans

    def _success(self, row: dict[str, Any], table: dict[str, np.ndarray], start: int, end: int) -> bool | None:
        for name in _SUCCESS:
            if row.get(name) is not None:
                return bool(np.any(row[name]))
        for name in _SUCCESS:
            if name in table:
                return bool(np.any(table[name][start:end].astype(bool)))
        return None

    def _robot_name(self) -> str:
        """The dataset's robot type in characters that a name may have."""
        return re.sub(r"[^\w .-]", "_", str(self.info.get("robot_type") or "unknown")).lstrip("_ .-")[:100] or "unknown"

    def frames(self, index: int, camera: str, steps: Sequence[int] | None = None) -> Iterator[np.ndarray]:
        """The frames of episode `index` one at a time, uint8 (H, W, 3), in bounded memory.

        steps: only those, not decreasing; of video no more is decoded than from the key frame before each.
        Raises: DataError for a missing frame or a broken file.
        """
        index = range(len(self))[index]
        feature = dict(self._cameras)[camera]
        row = self._episodes[index]
        table, start, end = self._rows(index)
        at = self._steps(end - start)
        at = at if steps is None else at[list(steps)]
        if not self._is_video(feature):
            return self._stored_images(self._data_path(row), feature, start, at)
        offset = float(row[f"videos/{feature}/from_timestamp"])
        held = float(row[f"videos/{feature}/to_timestamp"]) - offset
        if abs(held - (end - start) / self.fps) > 0.5 / self.fps:
            raise DataError(
                f"{self.path}: episode {row['episode_index']} has {end - start} steps at {self.fps:g} Hz, "
                f"but {held:.3f} s of {feature}",
                fix=_REFETCH,
            )
        times = table["timestamp"][start:end].astype(np.float64)[at] if "timestamp" in table else at / self.fps
        return self._video_frames(self._video_path(row, feature), offset + times)

    def _video_frames(self, path: Path, times_s: np.ndarray) -> Iterator[np.ndarray]:
        with self._acquire():
            decoder = self._videos.pop(path, None)
        if decoder is None:
            decoder = VideoDecoder(path)
        done = False
        try:
            yield from decoder.frames_at(decoder.ticks(times_s), tolerance=decoder.ticks([0.49 / self.fps])[0])
            done = True
        finally:
            # whoever reads holds the decoder; it comes back where the next episode begins
            if done:
                with self._acquire():
                    stale = self._videos.pop(path, None)
                    self._videos[path] = decoder
                    if len(self._videos) > _OPEN_VIDEOS:
                        _, oldest = self._videos.popitem(last=False)
                        oldest.close()
                if stale is not None:
                    stale.close()
            else:
                decoder.close()

    def _stored_images(self, path: Path, feature: str, start: int, steps: np.ndarray) -> Iterator[np.ndarray]:
        """Images that stand in the parquet itself, as {"bytes", "path"}; only the row groups in question are read."""
        wanted = steps + start
        try:
            file = pq.ParquetFile(path)
            first = 0
            for group in range(file.metadata.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                inside = wanted[(wanted >= first) & (wanted < first + count)] - first
                if len(inside):
                    column = file.read_row_group(group, columns=[feature])[feature]
                    for row in inside:
                        yield self._decode_image(column[int(row)].as_py(), path, feature, first + int(row))
                first += count
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path} is truncated or corrupt: {error}", fix=_REFETCH) from error

    def _decode_image(self, value: dict[str, Any] | None, path: Path, feature: str, row: int) -> np.ndarray:
        try:
            assert value is not None
            source = io.BytesIO(value["bytes"]) if value.get("bytes") else self.path / value["path"]
            with Image.open(source) as image:
                return np.asarray(image.convert("RGB"))
        except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
            raise DataError(f"{path}: {feature} of row {row} is no image: {error}", fix=_REFETCH) from error
