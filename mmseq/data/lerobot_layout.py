"""Layout: where a LeRobot dataset keeps what, of versions 2 and 3; the rows of its data decide over its metadata.

v2.0, v2.1                                        v3.0
meta/episodes.jsonl  tasks.jsonl                  meta/episodes/chunk-000/file-000.parquet  tasks.parquet
data/chunk-000/episode_000000.parquet             data/chunk-000/file-000.parquet
videos/chunk-000/<key>/episode_000000.mp4         videos/<key>/chunk-000/file-000.mp4

An episode is the rows that carry its index, in the order of the files, as LeRobot reads them; where `frame_index`
numbers them in another order, in that one, which is the order of time and of the frames of videos. What metadata says
otherwise (lengths, totals, which file) is passed on as a note; what cannot be read is the problem of the episodes
that need it, and of no others.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmseq.data.lerobot_files import (
    NOT_FINALIZED,
    REFETCH,
    commonest,
    is_number,
    joined,
    lines,
    listed,
    read_parquet,
    scalars,
    unreadable,
    whole,
)
from mmseq.errors import DataError

BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index", "subtask_index")
PERSISTENT, EVENTS = "language_persistent", "language_events"  # annotations of LeRobot 0.6
_OLDER = (
    "convert it to v2.0, which is read as it is, with convert_dataset_v1_to_v2 of lerobot 0.1 (LeRobot itself goes on "
    "with convert_dataset_v20_to_v21 and convert_dataset_v21_to_v30)"
)
_TEMPLATES = {
    "v2": (
        "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    ),
    "v3": (
        "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    ),
}


@dataclass
class Record:
    """One episode: its index, what metadata says of it, and where its rows are: (file, first row, end row).

    order: the row of each frame, where the rows do not lie in the order of frames.
    """

    index: int
    meta: dict[str, Any] = field(default_factory=dict)
    parts: list[tuple[Path, int, int]] = field(default_factory=list)
    order: np.ndarray | None = None
    problem: str | None = None

    def __len__(self) -> int:
        return sum(end - start for _, start, end in self.parts)


class Layout:
    """What there is: `info`, `fps`, `features`, `types` (the columns of the data), `records`, `tasks`, `subtasks`.

    `notes` says what is odd. Raises: DataError for what is no dataset, of a version that is not read, or when not
    one episode can be read.
    """

    def __init__(self, path: Path):
        self.path, self.notes = path, []
        self.broken: dict[Path, DataError] = {}  # files that cannot be read
        self.types: dict[str, pa.DataType] = {}
        self.steps: list[float] = []  # seconds between rows, of each episode whose timestamps are even
        self.orders: dict[int, np.ndarray] = {}  # of the episodes whose rows lie in another order than their frames
        self.info = self._read_info()
        self.version = self._version()
        self.features = self._features()
        self.records = self._join(self._scan(), self._listed())
        self.notes += [f"not read: {error}" for error in self.broken.values()]
        self.tasks = self._read_texts("tasks", "task")
        self.subtasks = self._read_texts("subtasks", "subtask")
        if all(record.problem for record in self.records):
            reasons = dict.fromkeys(str(record.problem) for record in self.records)
            raise DataError(next(iter(reasons)) if reasons else f"{path} has no episodes. Record some, or leave it out")

    # ------------------------------------------------------------------ metadata

    def _read_info(self) -> dict[str, Any]:
        path = self.path / "meta" / "info.json"
        if not path.is_file():
            old = (self.path / "meta_data").is_dir()
            raise DataError(
                f"{self.path} is {'a LeRobot dataset of version 1' if old else 'not a LeRobot dataset'} "
                "(no meta/info.json)",
                fix=_OLDER if old else "give the folder that holds meta/",
            )
        try:
            info = json.loads(path.read_bytes())
            features, fps = info["features"], float(info["fps"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is corrupt: {error!r}", fix=REFETCH) from error
        if not (math.isfinite(fps) and fps > 0) or not isinstance(features, dict):
            raise DataError(f"{path} has fps={fps!r} and features of type {type(features).__name__}", fix=REFETCH)
        self.fps = fps
        return info

    def _version(self) -> str:
        """v2 or v3: what is said, unless the files are laid out as the other."""
        said = str(self.info.get("codebase_version", ""))
        if said.startswith(("v0", "v1")):
            raise DataError(f"{self.path} is a LeRobot dataset of version {said}, this reads v2 and v3", fix=_OLDER)
        if said and not said.startswith(("v2", "v3")):
            raise DataError(
                f"{self.path} is a LeRobot dataset of version {said}", fix="update mmseq, or write it as v3"
            )
        meta = self.path / "meta"
        found = {"v2": (meta / "episodes.jsonl").is_file(), "v3": any((meta / "episodes").glob("*/*.parquet"))}
        version = "v2" if said.startswith("v2") or (not said and found["v2"]) else "v3"
        other = "v3" if version == "v2" else "v2"
        if found[version] or not found[other]:
            return version
        hint = (
            " (LeRobot itself makes v3 of a real one with convert_dataset_v20_to_v21, then convert_dataset_v21_to_v30)"
        )
        self.notes.append(
            f"meta/info.json says {said or 'no version'}, the files are laid out as {other}: read as that"
            + (hint if version == "v2" else "")
        )
        return other

    def _features(self) -> dict[str, dict[str, Any]]:
        strange = [name for name, feature in self.info["features"].items() if not isinstance(feature, dict)]
        if strange:
            self.notes.append(f"meta/info.json does not describe {listed(strange)}: taken as the data have it")
        return {name: {} if name in strange else feature for name, feature in self.info["features"].items()}

    def _listed(self) -> list[dict[str, Any]]:
        """What metadata says of each episode."""
        rows: list[dict[str, Any]] = []
        files = sorted((self.path / "meta" / "episodes").glob("*/*.parquet"))
        if self.version == "v2":
            files = [self.path / "meta" / "episodes.jsonl"]
        for file in files:
            try:
                if file.suffix == ".jsonl":
                    rows += list(lines(file))
                else:
                    names = [n for n in pq.read_schema(file).names if not n.startswith("stats/")]
                    rows += read_parquet(file, names).to_pylist()
            except DataError as error:
                self.broken[file] = error
            except (OSError, pa.ArrowException) as error:
                self.broken[file] = unreadable(file, error)
        return rows

    def _read_texts(self, stem: str, column: str) -> dict[int, str]:
        """meta/tasks or meta/subtasks: the text of each index."""
        table, listing = (self.path / "meta" / f"{stem}.{suffix}" for suffix in ("parquet", "jsonl"))
        index = f"{column}_index"
        if listing.is_file() and (self.version == "v2" or not table.is_file()):
            rows = list(lines(listing))
        elif table.is_file() or index in self.types:
            rows = read_parquet(table if self.version == "v3" or table.is_file() else listing).to_pylist()
        else:
            return {}
        found: dict[int, str] = {}
        for row in rows:
            others = (value for value in row.values() if isinstance(value, str))  # older writers named none of them
            text, number = (
                row[column] if isinstance(row.get(column), str) else next(others, None),
                whole(row.get(index)),
            )
            if number is None or text is None:
                raise DataError(
                    f"{self.path}/meta/{stem} has columns {list(row)}, expected {index}, {column}", fix=REFETCH
                )
            found[number] = text
        return found

    # ------------------------------------------------------------------ data

    def _scan(self) -> dict[int, list[tuple[Path, int, int]]]:
        """Which rows of which files carry which episode's index, in the order of the files."""
        rows: dict[int, list[tuple[Path, int, int]]] = {}
        numbered: dict[int, list[np.ndarray | range | None]] = {}  # the frames of each part; a range takes no room
        uneven: list[int] = []
        types: dict[str, Counter[pa.DataType]] = {}
        for path in self._data_files():
            try:
                file = pq.ParquetFile(path)
                for found in file.schema_arrow:
                    types.setdefault(found.name, Counter())[found.type] += 1
                names = [n for n in ("episode_index", "timestamp", "frame_index") if n in file.schema_arrow.names]
                table = file.read(names) if names else None
            except (OSError, pa.ArrowException) as error:
                self.broken[path] = unreadable(path, error)
                continue
            numbers = self._indices(path, table, file.metadata.num_rows)
            if numbers is None or not len(numbers):
                continue
            times, frames = _numbers(table, "timestamp"), _numbers(table, "frame_index")
            cuts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
            for start, end in pairwise(cuts):
                index = int(numbers[start])
                part = None if frames is None else frames[start:end]
                order = _order(part)
                said = times[start:end] if times is not None else None
                said = said[order] if said is not None and order is not None else said
                if said is not None and not self._even(said, continued=index in rows):
                    uneven.append(index)
                rows.setdefault(index, []).append((path, start, end))
                numbered.setdefault(index, []).append(_short(part))
        self.types = {name: commonest(found) for name, found in types.items()}
        for index, parts in numbered.items():
            known = [np.asarray(part) for part in parts if part is not None]
            order = _order(np.concatenate(known)) if len(known) == len(parts) else None
            if order is not None:
                self.orders[index] = order
        if self.orders:
            self.notes.append(
                f"rows of episodes {listed(self.orders)} are not in the order of their frame_index: put into that order"
            )
        # of rows shuffled across files, the timestamps of one part say nothing
        uneven = [index for index in uneven if index not in self.orders or len(rows[index]) == 1]
        if uneven:
            self.notes.append(
                f"timestamps of episodes {listed(dict.fromkeys(uneven))} are not frame / fps: row k is frame k, "
                "whatever its timestamp says"
            )
        return rows

    def _data_files(self) -> list[Path]:
        """Those that LeRobot reads, in its order; what editors hide beside them is none."""
        folder = self.path / "data"
        found = sorted(folder.glob("*/*.parquet")) or sorted(folder.rglob("*.parquet"))
        return [p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts)]

    @cached_property
    def filmed(self) -> set[str]:
        """The features of which there is a folder of videos."""
        inner = "chunk-*/*" if self.version == "v2" else "*"
        return {folder.name for folder in (self.path / "videos").glob(inner) if folder.is_dir()}

    def _indices(self, path: Path, table: pa.Table | None, rows: int) -> np.ndarray | None:
        if table is not None and "episode_index" in table.column_names:
            values = scalars(joined(table["episode_index"]))
            if values.dtype.kind in "iu":
                return values.astype(np.int64)
            numbers = [whole(value) for value in values]
            if None not in numbers:
                return np.array(numbers, np.int64)
            self.broken[path] = DataError(f"{path}: episode_index is no whole number in some rows", fix=REFETCH)
            return None
        named = re.fullmatch(r"episode_(\d+)", path.stem)
        if named is None:
            self.broken[path] = DataError(f"{path} has no column episode_index", fix=REFETCH)
            return None
        return np.full(rows, int(named[1]), np.int64)

    def _even(self, times_s: np.ndarray, continued: bool) -> bool:
        """Whether timestamps are frame / fps; steady ones of another rate are kept in `steps`."""
        if continued:
            return True
        times_s = times_s.astype(np.float64)
        if np.abs(times_s - np.arange(len(times_s)) / self.fps).max() < 1e-3:
            return True
        if len(times_s) > 2 and abs(times_s[0]) < 1e-3:
            step = float(times_s[-1]) / (len(times_s) - 1)
            if step > 0 and np.abs(np.diff(times_s) - step).max() < 0.05 * step:
                self.steps.append(step)
        return False

    def _join(self, rows: dict[int, list[tuple[Path, int, int]]], entries: list[dict[str, Any]]) -> list[Record]:
        """Rows and metadata of each episode; episodes without rows that nobody expects any of are left out."""
        known: dict[int, dict[str, Any]] = {}
        twice, nameless, empty, other_file, other_length = [], 0, [], [], []
        for entry in entries:
            index = whole(entry.get("episode_index"))
            if index is None:
                nameless += 1
            elif index in known and known[index] != entry:
                twice.append(index)
            else:
                known[index] = entry
        why = next((str(error) for error in self.broken.values()), "")
        needs_list = self.version == "v3" and any(f.get("dtype") == "video" for f in self.features.values())
        records = []
        for index in sorted(set(rows) | set(known)):
            record = Record(index, known.get(index, {}), rows.get(index, []), self.orders.get(index))
            length, file = whole(record.meta.get("length")), self._data_file(record)
            if not record.parts:
                if file in self.broken:
                    record.problem = str(self.broken[file])
                elif file is not None and not file.is_file() and length != 0:
                    record.problem = str(unreadable(file, ""))
                elif length == 0 or self.version == "v2":
                    empty.append(index)
                    continue
                else:
                    record.problem = f"no file in {self.path / 'data'} holds rows of it. {why or 'Fetch them again'}"
            elif index in twice:
                record.problem = "meta/episodes lists it twice, differently"
            elif index not in known and needs_list:
                unlisted = "meta/episodes does not list it, and so not where its videos are"
                record.problem = f"{unlisted}. {why}" if why else str(DataError(unlisted, fix=NOT_FINALIZED))
            elif index in known:
                if length != len(record):
                    other_length.append(index)
                if self.version == "v3" and file != record.parts[0][0]:
                    other_file.append(index)
            records.append(record)
        promised = whole(self.info.get("total_episodes"))
        if promised is not None and promised > len(records) + len(empty):
            gaps = [i for i in range(promised) if i not in known and i not in rows][
                : promised - len(records) - len(empty)
            ]
            problem = (
                f"meta/info.json promises {promised} episodes, there are {len(records)}. {why or 'Fetch the rest'}"
            )
            records += [Record(i, problem=problem) for i in gaps]
        frames, found = whole(self.info.get("total_frames")), sum(map(len, records))
        said = {
            "episodes": (promised, promised is not None and promised < len(records) + len(empty)),
            "frames": (frames, frames is not None and frames != found and not any(r.problem for r in records)),
        }
        count = {"episodes": len(records), "frames": found}
        notes = [
            f"meta/info.json says {n} {what}, the data hold {count[what]}" for what, (n, odd) in said.items() if odd
        ]
        for what, indices in (
            ("empty and left out", empty),
            ("of another length than meta/episodes says, as the data have it", other_length),
            ("in another file than data/file_index of meta/episodes says, or it says none", other_file),
        ):
            if indices:
                notes.append(f"{'episode' if len(indices) == 1 else 'episodes'} {listed(indices)}: {what}")
        if nameless:
            notes.append(f"meta/episodes has {nameless} rows whose episode_index is no number")
        self.notes += notes
        return records

    # ------------------------------------------------------------------ files

    def _data_file(self, record: Record) -> Path | None:
        """The file that metadata names for an episode, None where it names none."""
        try:
            return self._place(0, record, "data")
        except DataError:
            return None

    def video_file(self, record: Record, feature: str) -> Path:
        """The video of an episode. Raises: DataError naming the column that does not say."""
        path = self._place(1, record, f"videos/{feature}", feature)
        if self.version == "v2" and not path.is_file():  # in another chunk than its number says
            return next(iter(sorted(self.path.glob(f"videos/*/{feature}/{path.name}"))), path)
        return path

    def begins_at(self, record: Record, feature: str, end: bool = False) -> float | None:
        """Where in its video file an episode begins, or ends, in seconds."""
        if self.version == "v2":
            return None if end else 0.0
        value = record.meta.get(f"videos/{feature}/{'to' if end else 'from'}_timestamp")
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None

    def _place(self, which: int, record: Record, prefix: str, feature: str = "") -> Path:
        key = ("data_path", "video_path")[which]
        template = self.info.get(key)
        default = _TEMPLATES[self.version][which]
        if not isinstance(template, str) or ("episode_index" in template) != (self.version == "v2"):
            template = default
        values: dict[str, Any] = {"video_key": feature, "episode_index": record.index}
        values["episode_chunk"] = record.index // (whole(self.info.get("chunks_size")) or 1000)
        if self.version == "v3":
            for name in ("chunk_index", "file_index"):
                values[name] = whole(record.meta.get(f"{prefix}/{name}"))
                if values[name] is None:
                    said = record.meta.get(f"{prefix}/{name}")
                    raise DataError(f"meta/episodes, episode {record.index}: {prefix}/{name} is {said}", fix=REFETCH)
        try:
            return self.path / template.format(**values)
        except (KeyError, IndexError, ValueError) as error:
            raise DataError(f"{self.path}/meta/info.json: {key} is {template!r}", fix=f"write {default}") from error


def _numbers(table: pa.Table | None, name: str) -> np.ndarray | None:
    """A column of one number per row, None where there is no such column."""
    if table is None or name not in table.column_names or not is_number(table.schema.field(name).type):
        return None
    return scalars(joined(table[name]))


def _order(frames: np.ndarray | None) -> np.ndarray | None:
    """The row of each frame, where these numbers of frames are 0 to n - 1 in another order than that; else None."""
    if frames is None or frames.dtype.kind not in "iuf":
        return None
    order = np.argsort(frames, kind="stable")
    count = np.arange(len(frames))
    return order if np.array_equal(frames[order], count) and not np.array_equal(order, count) else None


def _short(frames: np.ndarray | None) -> np.ndarray | range | None:
    """Numbers of frames that follow each other as a range, so that millions of rows in order take no memory."""
    if frames is None or frames.dtype.kind not in "iu" or not len(frames):
        return frames
    first = int(frames[0])
    return range(first, first + len(frames)) if np.array_equal(frames, first + np.arange(len(frames))) else frames
