"""Loader: our token shards and our live video against lerobot's own dataset and dataloader, on the same data, in turns.

    mmseq bench loader --json loader.json                             # generated episodes, one 640 x 480 camera
    mmseq bench loader data=PATH_TO_LEROBOT_V3 --json loader.json

Every side reads moments in random order with two worker processes: the frames of every camera there, and text; of
single frames (window=1) also state and action.

    tokens    token shards of the data through the loader that training uses: packed batches of
              `text, image, proprio -> action[1]`, or `text, image -> video[window - 1]`; frames are codes
    live      video decoded as it is read, by our reader in torch's DataLoader: the items that lerobot gives
    lerobot   LeRobotDataset in torch's DataLoader: PyAV, frames as uint8 as its own training has them, with
              delta_timestamps for a window

Bytes are what the processes ask the system to read, cached or not. How much tokens gain grows with the size of the
frames: tokens cost the same for all, decoding does not.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmseq.bench.rows import BenchRow, Spread, require_positive, row, take_turns
from mmseq.bench.samples import demo_tokenizers, write_lerobot
from mmseq.bench.worker import Worker
from mmseq.data.importing import open_episodes
from mmseq.data.lerobot import LeRobotReader
from mmseq.data.mixture import DataState, MixConfig, Mixture, SourceConfig, TaskConfig
from mmseq.data.tokens import write_token_shards
from mmseq.errors import ConfigError, DataError, require
from mmseq.reading import Reading
from mmseq.streams import IMAGE_PREFIX, OWN_VECTORS
from mmseq.testing import tiny
from mmseq.tokenization.bundle import Tokenizers
from mmseq.tokenization.text import TextTokenizer
from mmseq.training.loader import steps

SIDES = ("tokens", "live", "lerobot")
WORKERS = 2
BATCH = 32
AHEAD = 2 * WORKERS  # batches that torch's DataLoader and ours hold ready


@dataclass(frozen=True, kw_only=True)
class Config(Reading):
    """What `mmseq bench loader` measures, and how its data are read."""

    data: str | None = None  # a LeRobot v3 dataset; default: lerobot writes one
    episodes: int = 8  # of the written dataset
    length: int = 50  # frames of each of its episodes
    height: int = 480  # pixels of its frames
    width: int = 640  # pixels of its frames
    window: int = 1  # consecutive frames of a moment
    turn_s: float = 3.0  # how long a side reads in its turn
    seconds: float = 60.0  # of all turns together
    seed: int = 0  # of what is drawn

    def check(self) -> None:
        """Raises: ConfigError naming the option."""
        require_positive(self, "episodes", "length", "height", "width", "window", "turn_s", "seconds")
        if not self.data and self.window > self.length:
            raise ConfigError(f"window={self.window} does not fit into length={self.length}", fix="raise length")
        if self.swap_colours:
            raise ConfigError(
                "lerobot cannot exchange colours, so swap_colours would have the sides give different pictures",
                fix="leave it out: it costs no time",
            )
        if not self.data and self.said():
            raise ConfigError(f"{', '.join(self.said())} is of a dataset, and data names none", fix="give data=PATH")


def bench(config: Config) -> tuple[list[BenchRow], list[str]]:
    """Rows, and what else there is to say. Raises: ConfigError, DependencyError, DataError."""
    config.check()
    require("lerobot", "lerobot")
    with tempfile.TemporaryDirectory() as folder:
        c = config
        data = Path(c.data) if c.data else Path(folder, "dataset")
        if not c.data:
            print(f"writing {c.episodes} episodes of {c.length} steps", flush=True)
            write_lerobot(data, episodes=c.episodes, length=c.length, height=c.height, width=c.width)
        about = open_lerobot(data, c)
        if not about.cameras:
            raise DataError(f"{data} has no cameras", fix="give a dataset with video")
        print(f"tokenizing {len(about)} episodes", flush=True)
        tokenize(about, Path(folder))
        workers: dict[str, Worker] = {}
        try:
            for side in SIDES:
                workers[side] = Worker(Side, config, side, str(data), folder)
            apart = difference(workers["live"]("item", 0), workers["lerobot"]("item", 0))
            runs: dict[str, Callable[[], float]] = {s: lambda w=w: w("turn") for s, w in workers.items()}
            rates = take_turns(runs, seconds=config.seconds)
            read = {side: Spread((worker("bytes_per_frame"),)) for side, worker in workers.items()}
        finally:
            for worker in workers.values():
                worker.close()
    rows = []
    for side in ("tokens", "live"):
        rows.append(row(f"loader.{side}", "frames/s", rates[side], "lerobot", rates["lerobot"], seed=config.seed))
        rows.append(row(f"loader.{side}.read", "bytes/frame", read[side], "lerobot", read["lerobot"], better="lower"))
    shape = "x".join(map(str, about.features[picture_column(about, about.cameras[0])]["shape"]))
    notes = [f"{side}: {rates[side]} frames/s, {read[side].median:,.0f} bytes read per frame" for side in SIDES]
    notes.append(
        f"{config.data or 'generated episodes'}: {len(about)} episodes, {len(about.cameras)} camera(s) of {shape}; "
        f"windows of {config.window}; {WORKERS} processes; "
        f"live frames differ from lerobot's by at most {apart:.0f} of 255"
    )
    return rows, notes


def open_lerobot(path: str | Path, reading: Reading) -> LeRobotReader:
    return open_episodes(path, reading, format="lerobot")  # type: ignore[return-value]


def column_of(reader: LeRobotReader, stream: str) -> str | None:
    """The one column that fills a stream, by which lerobot knows it; None where several or parts of one do."""
    columns = reader.streams.get(stream, ())
    return columns[0] if len(columns) == 1 and columns[0] in reader.features else None


def picture_column(reader: LeRobotReader, camera: str) -> str:
    return reader.streams[f"{IMAGE_PREFIX}{camera}"][0]


def tokenize(reader: LeRobotReader, folder: Path) -> None:
    """`tokenizers` and `tokens/robot` of a LeRobot dataset in `folder`; frames as 8 x 8 codes."""
    texts = {text for episode in reader for text in episode.texts} or tiny.TEXTS
    tokenizers = demo_tokenizers(TextTokenizer.train(texts, vocab_size=512), [reader.embodiment()])
    tokenizers.save(folder / "tokenizers")
    write_token_shards(reader, folder / "tokens" / "robot", tokenizers, name="robot")


def difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The largest difference of two items' images, in levels of 255. Raises: DataError when vectors differ."""
    pictures = [name for name, value in a.items() if value.ndim >= 3]
    for name in a.keys() & b.keys() - {"index", *pictures}:
        if not torch.allclose(a[name], b[name]):
            raise DataError(f"{name} of the first moment differs from lerobot's", fix="report this dataset")
    image = next(name for name in b if name in pictures)
    if b[image].dtype != torch.uint8:  # lerobot gives frames that are stored as images as floats
        return float((a[image] / 255 - b[image]).abs().max() * 255)
    return float((a[image].int() - b[image].int()).abs().max())


class Side:
    """One way of reading, in a process of its own; its workers stay from turn to turn."""

    def __init__(self, config: Config, side: str, data: str, folder: str):
        torch.set_num_threads(1)
        self.config, self.bytes, self.count = config, 0, 0
        if side == "tokens":
            self.parts = self._tokens(Path(folder))
        else:
            self.reader = open_lerobot(data, config)
            lengths = [len(self.reader[i]) for i in range(len(self.reader))]
            self.dataset = LiveVideo(self.reader, lengths, config.window) if side == "live" else self._lerobot(data)
            self.parts = self._batches(lengths)

    def _tokens(self, folder: Path) -> Iterator[int]:
        """Frames of step after step."""
        window, tokenizers = self.config.window, Tokenizers.load(folder / "tokenizers")
        arrow = "text, image, proprio -> action[1]" if window == 1 else f"text, image -> video[{window - 1}]"
        mix = MixConfig(sources={"robot": SourceConfig(path=".")}, tasks=[TaskConfig(task=arrow)], holdout=0.0)
        row_tokens, seed = 2048 * (1 + window // 8), self.config.seed
        mixture = Mixture(mix, folder / "tokens", tokenizers, row_tokens=row_tokens, seed=seed)
        cameras = len(next(iter(tokenizers.embodiments.values())).cameras)
        order = {"rows_per_step": 8, "rows_per_pass": 4, "rank": 0, "world": 1}
        for step in steps(mixture, DataState(), **order, prefetch=AHEAD, workers=WORKERS):
            if step.bad:
                raise DataError(step.bad[0][1])
            yield len(step.samples) * window * cameras

    def _batches(self, lengths: list[int]) -> Iterator[int]:
        """Frames of batch after batch."""
        from torch.utils.data import DataLoader

        window, ends = self.config.window, np.cumsum(lengths)
        moments = [np.arange(end - n, end - window + 1) for n, end in zip(lengths, ends) if n >= window]
        if not moments:
            raise ConfigError(f"window={window} is longer than every episode", fix=f"give at most {max(lengths)}")
        sampler = Endless(np.concatenate(moments), self.config.seed)
        for batch in DataLoader(self.dataset, BATCH, sampler=sampler, num_workers=WORKERS, prefetch_factor=2):
            yield len(batch["index"]) * window * len(self.reader.cameras)

    def _lerobot(self, path: str) -> Any:
        from lerobot.datasets.lerobot_dataset import LeRobotDataset

        window, fps = self.config.window, self.reader.fps
        names = [picture_column(self.reader, camera) for camera in self.reader.cameras]
        times = {name: [k / fps for k in range(window)] for name in names} if window > 1 else None
        return LeRobotDataset("local/bench", root=path, video_backend="pyav", delta_timestamps=times, return_uint8=True)

    def turn(self) -> float:
        """Frames per second."""
        for _ in range(1 + AHEAD):  # what was made while others had their turn
            next(self.parts)
        before, began, done = bytes_read(), time.perf_counter(), 0
        while time.perf_counter() - began < self.config.turn_s:
            done += next(self.parts)
        took = time.perf_counter() - began
        self.bytes += bytes_read() - before
        self.count += done
        return done / took

    def bytes_per_frame(self) -> float:
        return self.bytes / self.count

    def item(self, index: int) -> dict[str, Any]:
        return {name: value for name, value in self.dataset[index].items() if isinstance(value, torch.Tensor)}


class Endless(torch.utils.data.Sampler[int]):
    """Moments in random order for ever, drawn with replacement."""

    def __init__(self, moments: np.ndarray, seed: int):
        self.moments, self.random = moments, np.random.default_rng(seed)

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from self.random.choice(self.moments, 1024).tolist()


class LiveVideo(torch.utils.data.Dataset):
    """Moments of a LeRobot dataset by number, as lerobot gives them: images uint8 (3, H, W), of a window
    (window, 3, H, W)."""

    def __init__(self, reader: LeRobotReader, lengths: list[int], window: int):
        self.reader, self.ends, self.window = reader, np.cumsum(lengths), window
        self.known: dict[int, dict[str, Any]] = {}  # text and vectors of the episodes that were met

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = int(np.searchsorted(self.ends, index, side="right"))
        step = index - (int(self.ends[number - 1]) if number else 0)
        if number not in self.known:
            episode = self.reader[number]
            named = {stream: column_of(self.reader, stream) for stream in OWN_VECTORS if stream in episode}
            vectors = {name: episode[stream] for stream, name in named.items() if name is not None}
            self.known[number] = {"task": episode.texts[0] if episode.texts else "", **vectors}
        item: dict[str, Any] = {"index": index, **self.known[number]}
        for name in item.keys() - {"index", "task"}:
            item[name] = torch.from_numpy(item[name][step])
        for camera in self.reader.cameras:
            frames = list(self.reader.frames(number, camera, range(step, step + self.window)))
            images = np.empty((self.window, 3, *frames[0].shape[:2]), dtype=np.uint8)
            for image, frame in zip(images, frames):
                image[:] = frame.transpose(2, 0, 1)
            item[picture_column(self.reader, camera)] = torch.from_numpy(images if self.window > 1 else images[0])
        return item


def bytes_read() -> int:
    """What this process and its children have asked the system to read, as Linux counts it."""
    files = Path("/proc/self/task").glob("*/children")
    children = [child for file in files for child in file.read_text().split()]
    total = 0
    for process in [str(os.getpid()), *children]:
        found = re.search(r"rchar: (\d+)", Path(f"/proc/{process}/io").read_text())
        assert found is not None
        total += int(found[1])
    return total
