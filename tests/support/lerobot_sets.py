"""Small LeRobot datasets, made up: the same content in the forms of v2.1 and v3, plain or odd.

    made = make(seed=3)
    made.write(folder, "v3")                         as LeRobot writes it
    made.write(folder, "v2", odd={"gaps", "zero"})   as it also comes

A plain set of any seed is one that LeRobot's own reader can read (v2.1 after its converter): files that do not line up
with episodes, several tasks in an episode, rates, codecs, pictures in the rows, names. What is odd (`ODD`) changes no
frame, vector, text or order of the content.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

STAMPS = {  # of row k of an episode that begins at row `start`, in frames
    "jitter": lambda k, start: k + 0.6 * (k % 2),
    "cumulative": lambda k, start: k + start,
    "unix": lambda k, start: k + 1e6,
    "zero": lambda k, start: 0 * k,
    "shuffled": lambda k, start: k[::-1],
}
ODD = (
    *(
        "gaps",
        "float",
        "lost file",
        "wrong file",
        "wrong length",
        "wrong totals",
        "wrong end",
        "meta order",
        "listless",
    ),
    *("nothing said", "wrong shape", "strange", "task order", "task text", "large", "other version", *STAMPS),
)
NO_VIDEO = ("listless",)  # v3 needs meta/episodes to find an episode in a video
LOSSLESS = "libx264 with B-frames"  # LeRobot's converter cannot join these; they are the same in a file of any length
CODECS = {
    "libx264": {"qp": "10", "preset": "ultrafast", "bf": "0"},
    "mpeg4": {"qmin": "2", "qmax": "3"},
    "libaom-av1": {"crf": "20", "cpu-used": "8", "lag-in-frames": "0"},
    LOSSLESS: {"qp": "0", "preset": "fast", "bf": "2"},
}
CAMERAS = ("observation.images.front", "observation.images.cam.left", "observation.image", "observation.images.wrist-2")
TASKS = ("open the drawer", "close it", "put the größte cup, the red one, on the plate", "push")


def picture(number: int, height: int, width: int, seed: int) -> np.ndarray:
    """A frame that shows its number in blocks over a gradient, so that no codec makes it another's."""
    down, right = np.mgrid[0:height, 0:width]
    frame = np.stack([down * 2 + seed * 40, right * 2, down + right], axis=2) % 200
    for bit in range(8):
        left = bit * width // 8
        frame[: height // 2, left : left + width // 8] = 230 if number >> bit & 1 else 20
    return frame.astype(np.uint8)


def shown(frame: np.ndarray) -> int:
    """The number that a frame shows."""
    height, width = frame.shape[:2]
    block = lambda bit: frame[height // 8 : 3 * height // 8, bit * width // 8 + 1 : (bit + 1) * width // 8 - 1]
    return sum((block(bit).mean() > 125) << bit for bit in range(8))


def encode(frames: np.ndarray, fps: float, codec: str, key_frames: int) -> bytes:
    buffer = io.BytesIO()
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream(codec.split()[0], rate=rate, options={**CODECS[codec], "g": str(key_frames)})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


@dataclass
class Made:
    """What a dataset holds. episodes: of each, the numbers that its frames show. tasks: of each row. cameras: the codec
    of each, or png or jpeg for pictures in the rows. rows, videos: how many rows and episodes the files of v3 hold."""

    seed: int
    fps: int
    episodes: list[np.ndarray]
    tasks: list[list[str]]
    vectors: dict[str, tuple[Any, list[np.ndarray]]]
    cameras: dict[str, str]
    size: tuple[int, int]
    rows_a_file: int
    episodes_a_video: int
    key_frames: int
    _encoded: dict[Any, bytes] = field(default_factory=dict)

    def frames(self, episode: int, camera: str) -> np.ndarray:
        at = list(self.cameras).index(camera)
        return np.stack([picture(int(n), *self.size, at) for n in self.episodes[episode]])

    def _video(self, camera: str, members: tuple[int, ...]) -> bytes:
        if (camera, members) not in self._encoded:
            frames = np.concatenate([self.frames(k, camera) for k in members])
            self._encoded[camera, members] = encode(frames, self.fps, self.cameras[camera], self.key_frames)
        return self._encoded[camera, members]

    # ------------------------------------------------------------------ writing

    def write(self, path: Path, version: str, odd: Iterable[str] = ()) -> Path:
        """The dataset as a folder. version: v2 or v3. odd: of `ODD`."""
        odd = set(odd)
        assert odd <= set(ODD), odd - set(ODD)
        (path / "meta").mkdir(parents=True)
        known = sorted({task for tasks in self.tasks for task in tasks}, key=TASKS.index)
        indices = [3 * k + 1 if "gaps" in odd else k for k in range(len(self.episodes))]
        tables = [self._table(k, indices[k], known, odd) for k in range(len(self.episodes))]
        entries = [
            {"episode_index": i, "tasks": list(dict.fromkeys(tasks)), "length": len(tasks) + ("wrong length" in odd)}
            for i, tasks in zip(indices, self.tasks)
        ]
        if "task text" in odd:
            for entry in entries:
                entry["tasks"] = entry["tasks"][0]
        write = self._write_v2 if version == "v2" else self._write_v3
        write(path, tables, entries, odd)
        texts = [{"task_index": i, "task": task} for i, task in enumerate(known)]
        self._write_meta(path, version, texts[::-1] if "task order" in odd else texts, entries, odd)
        return path

    def _table(self, k: int, index: int, known: list[str], odd: set[str]) -> pa.Table:
        count, start = len(self.episodes[k]), sum(map(len, self.episodes[:k]))
        rows = np.arange(count)
        stamp = next((STAMPS[name] for name in STAMPS if name in odd), lambda k, start: k)
        kind = np.float64 if "float" in odd else np.int64
        columns: dict[str, Any] = {}
        for name, (_, values) in self.vectors.items():
            form = pa.large_list(pa.float64()) if "large" in odd else pa.list_(pa.float32())
            flat = values[k].shape[1] == 1
            columns[name] = pa.array(values[k][:, 0]) if flat else pa.array(values[k].tolist(), form)
        for camera, codec in self.cameras.items():
            if codec in ("png", "jpeg"):
                columns[camera] = [_stored(image, codec) for image in self.frames(k, camera)]
        columns |= {"timestamp": pa.array((stamp(rows, start) / self.fps).astype(np.float32)), "frame_index": rows}
        columns |= {"episode_index": np.full(count, index, kind), "index": rows + start}
        columns["task_index"] = np.array([known.index(task) for task in self.tasks[k]]).astype(kind)
        return pa.table(columns)

    def _write_v2(self, path: Path, tables: list[pa.Table], entries: list[dict[str, Any]], odd: set[str]) -> None:
        for k, (table, entry) in enumerate(zip(tables, entries)):
            name, chunk = f"episode_{entry['episode_index']:06d}", f"chunk-{entry['episode_index'] // 2:03d}"
            _put(path / "data" / chunk / f"{name}.parquet", table)
            for camera in self._filmed():
                _put(path / "videos" / chunk / camera / f"{name}.mp4", self._video(camera, (k,)))

    def _write_v3(self, path: Path, tables: list[pa.Table], entries: list[dict[str, Any]], odd: set[str]) -> None:
        whole, starts = pa.concat_tables(tables), np.cumsum([0, *(len(t) for t in tables)])
        file = lambda kind, at: f"{kind}/chunk-{at // 2:03d}/file-{at % 2:03d}"
        for at, first in enumerate(range(0, len(whole), self.rows_a_file)):
            _put(path / f"{file('data', at)}.parquet", whole.slice(first, self.rows_a_file))
        for k, entry in enumerate(entries):
            at = int(starts[k]) // self.rows_a_file + ("wrong file" in odd)
            entry |= {"data/chunk_index": at // 2, "data/file_index": None if "lost file" in odd else at % 2}
            entry |= {"dataset_from_index": int(starts[k]), "dataset_to_index": int(starts[k + 1])}
        for camera in self._filmed():
            for at, first in enumerate(range(0, len(tables), self.episodes_a_video)):
                members = tuple(range(first, min(first + self.episodes_a_video, len(tables))))
                _put(path / f"{file(f'videos/{camera}', at)}.mp4", self._video(camera, members))
                for k in members:
                    begin = (starts[k] - starts[first]) / self.fps
                    end = begin + len(tables[k]) / self.fps + (0.3 if "wrong end" in odd else 0)
                    said = {"chunk_index": at // 2, "file_index": at % 2, "from_timestamp": begin, "to_timestamp": end}
                    entries[k] |= {f"videos/{camera}/{key}": value for key, value in said.items()}

    def _write_meta(
        self, path: Path, version: str, texts: list[dict[str, Any]], entries: list[dict[str, Any]], odd: set[str]
    ) -> None:
        meta = path / "meta"
        if "float" in odd:
            change = lambda entry: {n: float(v) if isinstance(v, int) else v for n, v in entry.items()}
            entries = [change(entry) for entry in entries]
        entries = entries[::-1] if "meta order" in odd else entries
        statistics = [
            {"episode_index": e["episode_index"], "stats": self._statistics(k)} for k, e in enumerate(entries)
        ]
        if version == "v2":
            listing = {"tasks": texts, "episodes": entries, "episodes_stats": statistics}
            for name, rows in listing.items():
                if name != "episodes" or "listless" not in odd:
                    (meta / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            if "listless" not in odd:
                _put(meta / "episodes/chunk-000/file-000.parquet", pa.Table.from_pylist(entries))
            table = pa.Table.from_pylist(texts)
            _put(meta / "tasks.parquet", table if "task order" in odd else _indexed(table))
        rows = sum(map(len, self.episodes))
        totals = {"total_episodes": len(entries), "total_frames": rows, "total_tasks": len(texts)}
        if "wrong totals" in odd:
            totals = {"total_episodes": 1, "total_frames": rows + 7, "total_tasks": 0}
        said = {"v2": "v2.1", "v3": "v3.0"}["v3" if (version == "v3") != ("other version" in odd) else "v2"]
        info = {"codebase_version": said, "robot_type": "机器人" if "strange" in odd else "toy_arm", **totals}
        info |= {
            "fps": float(self.fps) if "strange" in odd else self.fps,
            "splits": {},
            "features": self._features(odd),
        }
        if version == "v2":
            info |= {"chunks_size": 2, "total_chunks": 1, "total_videos": 0}
            info["data_path"] = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
            info["video_path"] = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
        else:
            info |= {"chunks_size": 1000, "data_files_size_in_mb": 100, "video_files_size_in_mb": 200}
            info["data_path"] = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
            info["video_path"] = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
        (meta / "info.json").write_text(json.dumps(info, ensure_ascii=False))

    def _statistics(self, k: int) -> dict[str, Any]:
        keys = ("min", "max", "mean", "std")
        each = {name: [0.0] * values[k].shape[1] for name, (_, values) in self.vectors.items()}
        each |= {name: [[[0.0]]] * 3 for name in self.cameras}
        return {n: dict.fromkeys(keys, zeros) | {"count": [len(self.episodes[k])]} for n, zeros in each.items()}

    def _features(self, odd: set[str]) -> dict[str, Any]:
        features: dict[str, Any] = {}
        height, width = self.size
        for camera, codec in self.cameras.items():
            kind = "image" if codec in ("png", "jpeg") else "video"
            features[camera] = {"dtype": kind, "shape": [height, width, 3], "names": ["height", "width", "channels"]}
        for name, (names, values) in self.vectors.items():
            features[name] = {"dtype": "float32", "shape": [values[0].shape[1]], "names": names}
        for name in features if "wrong shape" in odd else ():
            features[name]["shape"] = [7, 9, 3] if name in self.cameras else [99]
        if "strange" in odd:
            features |= {"target": {"dtype": "float32", "shape": [0]}, "note": {"dtype": "string", "shape": None}}
        if "nothing said" in odd:
            return {name: feature for name, feature in features.items() if self.cameras.get(name) in CODECS}
        count = ("frame_index", "episode_index", "index", "task_index")
        kinds = {"timestamp": "float32"} | dict.fromkeys(count, "int64")
        return features | {name: {"dtype": kind, "shape": [1], "names": None} for name, kind in kinds.items()}

    def _filmed(self) -> Iterator[str]:
        return (camera for camera, codec in self.cameras.items() if codec in CODECS)


def make(seed: int) -> Made:
    """Content of a seed."""
    rng = np.random.default_rng(seed)
    pick = lambda *options: options[int(rng.integers(len(options)))]
    lengths = [int(rng.integers(1, 13)) for _ in range(int(rng.integers(1, 6)))]
    numbers = [np.arange(n) + sum(lengths[:k]) for k, n in enumerate(lengths)]
    tasks: list[list[str]] = []
    change = pick("never", "by episode", "by row")
    for n in lengths:
        first, second = (str(t) for t in rng.choice(TASKS, 2, replace=False))
        at = int(rng.integers(0, n + 1)) if change == "by row" else n
        tasks.append([TASKS[3]] * n if change == "never" else [first] * at + [second] * (n - at))
    vectors: dict[str, tuple[Any, list[np.ndarray]]] = {}
    for name, share in (("observation.state", 0.8), ("action", 0.9), ("observation.ft_sensor", 0.3)):
        if rng.random() < share or (name == "action" and not vectors):
            width = int(rng.integers(1, 8))
            names = [f"joint {i}" for i in range(width)]
            values = [rng.normal(size=(n, width)).astype(np.float32) for n in lengths]
            vectors[name] = pick(None, names, [names], {"motors": names}, {n: i for i, n in enumerate(names)}), values
    cameras = {str(c): pick(*CODECS, "png", "jpeg") for c in rng.permutation(CAMERAS)[: int(rng.integers(0, 3))]}
    if LOSSLESS in cameras.values():
        cameras = {name: LOSSLESS if codec in CODECS else codec for name, codec in cameras.items()}
    size = pick((32, 48), (48, 32), (64, 64))
    files = {"rows_a_file": pick(1, 4, 9, 1000), "episodes_a_video": pick(1, 2, 1000), "key_frames": pick(2, 5, 250)}
    return Made(seed, pick(5, 10, 15, 24, 30, 50), numbers, tasks, vectors, cameras, size, **files)


def oddities(seed: int, version: str, made: Made) -> set[str]:
    """A few of what may be odd in a set of this version, one at least, and at most one kind of timestamps."""
    rng = np.random.default_rng(seed)
    filmed = version == "v3" and any(codec in CODECS for codec in made.cameras.values())
    options = [name for name in ODD if not (filmed and name in NO_VIDEO)]
    chosen = [str(name) for name in rng.choice(options, int(rng.integers(1, 6)), replace=False)]
    stamps = [name for name in chosen if name in STAMPS]
    return {name for name in chosen if name not in stamps[1:]}


def _stored(image: np.ndarray, codec: str) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, codec, **({"quality": 95} if codec == "jpeg" else {}))
    return {"bytes": buffer.getvalue(), "path": None}


def _indexed(table: pa.Table) -> pa.Table:
    """The table as pandas writes it with the texts as its index."""
    return pa.Table.from_pandas(table.to_pandas().set_index("task"))


def _put(path: Path, content: bytes | pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        pq.write_table(content, path)
