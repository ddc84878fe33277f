"""Mixtures: which sources, tasks and weights a run reads, and the order in which it reads them.

The order is a pure function of (seed, block). Every (task, source) pair has moments:
all (episode, step, phrasing) at which the task can be filled, visited in an order that is a fresh
permutation each epoch. A block takes from each pair its share by weight, packs the samples into
rows and shuffles the rows. So the state of the data is two integers, resuming costs nothing, and
no world size or worker count changes what comes next.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from mmseq.config import load_config
from mmseq.data.tokens import CACHE_BYTES, EpisodePlan, Kind, TokenShards
from mmseq.errors import ConfigError, DataError, did_you_mean
from mmseq.packing import pack
from mmseq.reading import Reading
from mmseq.sequence import SequenceBuilder, TokenSequence, sequence_length
from mmseq.streams import lacking
from mmseq.tasks import PlacedSegment, Task
from mmseq.tokenization.bundle import Tokenizers

BLOCK_SAMPLES = 4096


@dataclass(frozen=True, kw_only=True)
class SourceConfig(Reading):
    """Episodes that a mix draws from, and how they are read."""

    path: str = "???"  # LeRobot, HDF5, a folder of videos or episode shards, relative to the mix's root
    weight: float = 1.0  # its share among the sources of a task
    rate_hz: float | None = None  # resample to so many steps per second; default: its own rate
    holdout: float | None = None  # share of its episodes that training never sees; default: the mix's
    skip_bad: int = 0  # leave out up to so many episodes that cannot be read; shards were told when they were imported


@dataclass(kw_only=True)
class TaskConfig:
    """An arrow to train."""

    task: str = "???"  # the arrow, or a built-in name
    name: str | None = None  # how it is reported; default: its alias, else the arrow itself
    weight: float = 1.0  # its share of samples
    sources: list[str] | None = None  # which sources it draws from; default: all that can fill it
    # of a task that ends with a chunk of actions: the share of samples in which the tokens of the chunk do not see each
    # other from a random step on, so that the model learns to decode them at once
    parallel: float = 0.0


@dataclass(kw_only=True)
class MixConfig:
    """A data mix."""

    name: str = "mix"  # how it is reported
    sources: dict[str, SourceConfig] = field(default_factory=dict)  # by name
    tasks: list[TaskConfig] = field(default_factory=list)  # what is trained
    weighting: str = "as_given"  # of sources: `as_given`, or `frames` (weight x number of moments)
    # share of every source's episodes that training never sees; a hash of the episode's id decides which, so adding
    # data moves none across
    holdout: float = 0.1

    def holdout_of(self, source: str) -> float:
        own = self.sources[source].holdout
        return self.holdout if own is None else own

    def check(self) -> None:
        """Raises: ConfigError or TaskError for the first thing that is wrong."""
        if not self.sources:
            raise ConfigError(f"mix {self.name!r} has no sources")
        if not self.tasks:
            raise ConfigError(f"mix {self.name!r} has no tasks")
        if self.weighting not in ("as_given", "frames"):
            raise ConfigError(f"mix {self.name!r}: weighting is {self.weighting!r}", fix="use as_given or frames")
        if not 0 <= self.holdout < 1:
            raise ConfigError(f"mix {self.name!r}: holdout must be in [0, 1), got {self.holdout}")
        for key, source in self.sources.items():
            if not (math.isfinite(source.weight) and source.weight >= 0):
                raise ConfigError(f"mix {self.name!r}: sources.{key}.weight must not be negative, got {source.weight}")
            if source.holdout is not None and not 0 <= source.holdout < 1:
                raise ConfigError(f"mix {self.name!r}: sources.{key}.holdout must be in [0, 1), got {source.holdout}")
        names = [task_name(t) for t in self.tasks]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"mix {self.name!r}: two tasks are named {name!r}", fix="give one of them a name")
        for task in self.tasks:
            final_chunk = Task.parse(task.task).final_chunk
            if not 0 <= task.parallel <= 1:
                raise ConfigError(
                    f"mix {self.name!r}: parallel of {task.task!r} must be in [0, 1], got {task.parallel}"
                )
            if task.parallel and final_chunk is None:
                raise ConfigError(
                    f"mix {self.name!r}: {task.task!r} has parallel={task.parallel:g}, but does not end with action[n]",
                    fix="leave parallel out",
                )
            if not (math.isfinite(task.weight) and task.weight >= 0):
                raise ConfigError(
                    f"mix {self.name!r}: the weight of {task.task!r} must not be negative, got {task.weight}"
                )
            if task.sources is not None and (not task.sources or len(set(task.sources)) < len(task.sources)):
                raise ConfigError(
                    f"mix {self.name!r}: task {task.task!r} has sources {task.sources}",
                    fix="name each source once, or leave sources out for all that can fill it",
                )
            for source in task.sources or []:
                if source not in self.sources:
                    raise ConfigError(
                        f"mix {self.name!r}: task {task.task!r} names an unknown source {source!r}: "
                        f"{did_you_mean(source, self.sources)}"
                    )


def task_name(config: TaskConfig) -> str:
    return config.name or Task.parse(config.task).alias or config.task


def load_mix(path: str | Path, overrides: Sequence[str] = ()) -> MixConfig:
    """Read a mix; unknown keys are errors."""
    mix = load_config(MixConfig, path, overrides)
    mix.check()
    return mix


def save_mix(mix: MixConfig, path: str | Path) -> None:
    OmegaConf.save(OmegaConf.structured(mix), path)


def held_out(episode_id: str, share: float) -> bool:
    """Whether an episode belongs to the held-out set: a fixed function of its id."""
    return holdout_rank(episode_id) < share


def holdout_rank(episode_id: str) -> float:
    """The share, in [0, 1), above which an episode is held out."""
    return int.from_bytes(hashlib.sha256(episode_id.encode()).digest()[:8], "big") / 2**64


def members_of(shards: TokenShards, source: str, mix: MixConfig, split: str) -> list[int]:
    """The episodes of a source that belong to a split, `train` or `holdout`."""
    share = mix.holdout_of(source)
    return [i for i, id_ in enumerate(shards.plan.ids) if held_out(f"{source}/{id_}", share) == (split == "holdout")]


def least_holdout(episode_ids: Sequence[str]) -> float:
    """The share at which a small source holds out four episodes, or as many as 40 % give, and at least one.

    Which episodes are held out is decided by their ids, and those of a small source may choose none.
    """
    ranks = sorted(holdout_rank(i) for i in episode_ids)
    wanted = min(0.4, math.nextafter(ranks[min(len(ranks) // 4, 4) - 1], 1)) if len(ranks) >= 4 else 0.0
    return max(wanted, math.nextafter(ranks[0], 1))


@dataclass(frozen=True)
class Sample:
    """One sample before it is built: what to read and which task to fill.

    offsets: in steps, one for each range of offsets of the task. visible: steps of its chunk that later tokens of the
    chunk see; None: all (`SequenceBuilder.build`).
    """

    moments: int
    task: int
    source: str
    episode: int
    now: int
    variant: int
    length: int
    offsets: tuple[int, ...] = ()
    visible: int | None = None


class Moments:
    """All moments of one task in one source, in an order that is permuted afresh each epoch.

    None when no episode holds the task whole; else those too at which a final chunk of actions ends after its episode.
    An episode whose texts change on the way counts as several pieces, each with the moments that lie in it.
    """

    def __init__(
        self,
        index: int,
        task_index: int,
        task: Task,
        source: str,
        plan: EpisodePlan,
        episodes: Sequence[int],
        builder: SequenceBuilder,
        parallel: float = 0.0,
    ):
        self.parallel = parallel
        self.index, self.task_index, self.task, self.source = index, task_index, task, source
        self._builder, self._plan = builder, plan
        pieces = plan.pieces_of(episodes)
        kinds, which = np.unique(plan.kind_ids[plan.first[pieces]], return_inverse=True)
        fits = np.array([not task.missing(self._visible(plan.kinds[k])) for k in kinds], dtype=bool)[which]

        def edge(name: str, *, pad: bool) -> np.ndarray:
            """The `start` of each episode's moments, or their `stop`, counted from its end."""
            of_kind = [getattr(task.moments(0, plan.kinds[k].rate_hz, pad=pad), name) for k in kinds]
            return np.array(of_kind, dtype=np.int64)[which]

        lengths, starts, stops = plan.lengths[plan.episodes[pieces]], plan.starts[pieces], plan.stops[pieces]
        first = np.maximum(edge("start", pad=True), starts)
        ends = [np.minimum(lengths + edge("stop", pad=pad), stops) for pad in (False, True)]
        whole, counts = (np.where(fits, end - first, 0) for end in ends)
        if not (whole > 0).any():
            counts[:] = 0  # the end of the chunk would never be learned
        used = counts > 0
        self._members, self._pieces, self._first = pieces, pieces[used], first[used]
        self._ends = np.cumsum(counts[used])
        self._lengths: dict[int, int] = {}  # by kind
        self._placed: dict[float, Any] = {}

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def episodes(self) -> int:
        return len(np.unique(self._plan.episodes[self._pieces]))

    @property
    def share_of_steps(self) -> float:
        """Of the steps of its episodes, those at which the task can be filled."""
        return len(self) / self._steps

    @property
    def left_out(self) -> tuple[float, float]:
        """Of the steps of its episodes, those before the first moments and those after the last."""
        early = int((self._first - self._plan.starts[self._pieces]).sum())
        return early / self._steps, (self._steps - len(self) - early) / self._steps

    @property
    def _steps(self) -> int:
        return int((self._plan.stops[self._pieces] - self._plan.starts[self._pieces]).sum())

    def sample(self, k: int, seed: int) -> Sample:
        """The k-th visit, k from 0 without end."""
        epoch, place = divmod(k, len(self))
        at = permute(place, len(self), seed ^ (self.index << 20) ^ (epoch * 0x9E3779B1))
        piece, now = self._at(at)
        variant = _mix64(seed + 0x51ED27 * (k + 1) + self.index) >> 33
        draw = lambda number: _mix64(seed ^ 0x632BE59B * (k + 1) ^ self.index << 40 ^ number << 8)
        return self._finish(piece, now, variant, self._visible_steps(piece, k, seed), draw)

    def moment(self, place: int) -> Sample:
        """The place-th moment in file order, first phrasing, the nearest of a range of offsets: for evaluation."""
        return self._finish(*self._at(place), 0)

    def longest(self) -> Sample:
        """A sample of the longest sequence."""
        plan = self._plan
        variants = np.diff(plan.first)[self._pieces]
        owner = np.repeat(np.arange(len(self._pieces)), variants)
        place = np.arange(len(owner)) - np.repeat(np.cumsum(variants) - variants, variants)
        kinds, found = np.unique(plan.kind_ids[plan.first[self._pieces][owner] + place], return_index=True)
        at = found[max(range(len(kinds)), key=lambda i: self._length(int(kinds[i])))]
        return self._finish(int(self._pieces[owner[at]]), int(self._first[owner[at]]), int(place[at]))

    def why_empty(self) -> str:
        """What the episodes lack to fill the task."""
        if not len(self._members):
            return "no episodes in this split"
        kinds = np.unique(self._plan.kind_ids[self._plan.first[self._members]])
        missing = [self.task.missing(self._visible(self._plan.kinds[k])) for k in kinds]
        if all(missing):
            there = {stream for k in kinds for stream in self._visible(self._plan.kinds[k])}
            return f"no {lacking(min(missing, key=len), there)}"
        found = f"episodes of at most {self._plan.lengths[self._plan.episodes[self._members]].max()} steps"
        cut = len(self._members) > len(np.unique(self._plan.episodes[self._members]))
        return found + (", with no room at the steps that their texts belong to" if cut else "")

    def _at(self, place: int) -> tuple[int, int]:
        """The piece and the step of the place-th moment."""
        slot = int(np.searchsorted(self._ends, place, side="right"))
        before = int(self._ends[slot - 1]) if slot else 0
        return int(self._pieces[slot]), int(self._first[slot]) + place - before

    def _visible_steps(self, piece: int, k: int, seed: int) -> int | None:
        """None for a sample that is learned token by token; else half begin to hide tokens with the first."""
        if not self.parallel:
            return None
        draw = _mix64(seed ^ 0x2545F491 * (k + 1) ^ self.index << 40)
        if (draw & 0xFFFFFF) >= self.parallel * 0x1000000:
            return None
        chunk = self.task.final_chunk
        assert chunk is not None
        assert chunk.length is not None
        first = draw >> 24 & 1
        rate = self._plan.kinds[self._plan.kind(piece)].rate_hz
        return 0 if first else (draw >> 32) % chunk.length.steps(rate)

    def _finish(
        self,
        piece: int,
        now: int,
        variant: int,
        visible: int | None = None,
        draw: Callable[[int], int] | None = None,
    ) -> Sample:
        """draw: a random number for the n-th range of offsets; None takes the nearest offset."""
        plan = self._plan
        episode, variant = int(plan.episodes[piece]), variant % plan.variants(piece)
        kind = plan.kind(piece, variant)
        offsets: tuple[int, ...] = ()
        if self.task.ranged:
            rate_hz, length = plan.kinds[kind].rate_hz, int(plan.lengths[episode])
            options = self.task.offsets_within(now, length, rate_hz, pad=True)
            offsets = tuple(o[draw(i) % len(o)] if draw is not None else min(o, key=abs) for i, o in enumerate(options))
        length = self._length(kind)
        return Sample(self.index, self.task_index, self.source, episode, now, variant, length, offsets, visible)

    def _length(self, number: int) -> int:
        if number not in self._lengths:
            kind = self._plan.kinds[number]
            if kind.rate_hz not in self._placed:
                self._placed[kind.rate_hz] = self.task.place(kind.rate_hz)
            self._lengths[number] = sequence_length(
                self._placed[kind.rate_hz],
                self._builder.layout,
                cameras=len(self._builder.views(kind.embodiment, kind.streams)),
                numbered=len(self._builder.numbered(kind.embodiment, kind.streams)) > 1,
                axes=dict(kind.axes),
                text_lengths=dict(kind.text_tokens),
            )
        return self._lengths[number]

    def _visible(self, kind: Kind) -> list[str]:
        return self._builder.visible(kind.embodiment, kind.streams)


def _mix64(x: int) -> int:
    """SplitMix64: a well-mixed 64-bit hash of an integer."""
    x = (x + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


def permute(place: int, size: int, key: int) -> int:
    """A bijection of 0 .. size - 1 chosen by `key`: a four-round Feistel network with cycle walking.

    Any element of the permutation costs the same and nothing is stored, so an epoch over a billion
    samples needs no shuffled list.
    """
    if size == 1:
        return 0
    half = ((size - 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for round_ in range(4):
            left, right = right, left ^ (_mix64(key * 4 + round_ + (right << 64 - half)) & mask)
        place = (left << half) | right
        if place < size:
            return place


class Mixture:
    """A mix over token shards: its moments, its samples and its rows."""

    def __init__(
        self,
        mix: MixConfig,
        tokens: str | Path,
        tokenizers: Tokenizers,
        *,
        row_tokens: int,
        seed: int,
        split: str = "train",
        opened: dict[str, TokenShards] | None = None,
    ):
        """tokens: the folder that `mmseq data tokenize` wrote, one folder per source.

        split: `train` or `holdout`. opened: its sources where they are open already.
        Raises: DataError when a source has no shards, ConfigError when a task can be filled by no episode.
        """
        mix.check()
        self.mix, self.tokenizers, self.row_tokens, self.seed = mix, tokenizers, row_tokens, seed
        self.tokens = Path(tokens)
        self.builder = tokenizers.builder()
        self.tasks = [Task.parse(t.task) for t in mix.tasks]
        self.task_names = [task_name(t) for t in mix.tasks]
        self.shards: dict[str, TokenShards] = {}
        # tasks with their offsets drawn, and where their segments lie at a rate
        self._placed: dict[tuple[int, float, tuple[int, ...]], tuple[Task, tuple[PlacedSegment, ...]]] = {}
        members: dict[str, list[int]] = {}
        cache = CACHE_BYTES // len(mix.sources)
        for name in mix.sources:
            directory = Path(tokens) / name
            if not directory.is_dir():
                raise DataError(
                    f"source {name!r} of mix {mix.name!r} has no token shards at {directory}",
                    fix="run `mmseq data tokenize` on the mix",
                )
            self.shards[name] = opened[name] if opened else TokenShards(directory, tokenizers, cache_bytes=cache)
            members[name] = members_of(self.shards[name], name, mix, split)
        self.moments: list[Moments] = []
        weights: list[float] = []
        for task_index, (config, task) in enumerate(zip(mix.tasks, self.tasks)):
            found, reasons = [], []
            for name in config.sources or mix.sources:
                # numbered by place in the mix, so that an empty one shifts nobody's order
                index = task_index * len(mix.sources) + list(mix.sources).index(name)
                moments = Moments(
                    index, task_index, task, name, self.shards[name].plan, members[name], self.builder, config.parallel
                )
                if not len(moments):
                    reasons.append(f"{name}: {moments.why_empty()}")
                elif mix.sources[name].weight <= 0:
                    reasons.append(f"{name}: its weight is 0")
                else:
                    found.append((moments, mix.sources[name].weight))
            if not found and config.weight > 0 and split == "train":
                raise ConfigError(f"no episode can fill the task {config.task!r} ({'; '.join(reasons)})")
            share = [w * (len(s) if mix.weighting == "frames" else 1) for s, w in found]
            for (moments, _), part in zip(found, share):
                self.moments.append(moments)
                weights.append(config.weight * (part / sum(share) if mix.weighting == "as_given" else part))
        total = sum(weights)
        if not math.isfinite(total):
            raise ConfigError(f"mix {mix.name!r}: the weights are too large", fix="their shares are what counts")
        if (self.moments or split == "train") and total <= 0:
            raise ConfigError(f"mix {mix.name!r}: all weights are zero, or no task with a weight can be filled")
        self.weights = [w / total for w in weights]

    def held_out(self) -> Mixture:
        """What training never sees, of the same shards."""
        mix, tokens, tokenizers, rows = self.mix, self.tokens, self.tokenizers, self.row_tokens
        return Mixture(mix, tokens, tokenizers, row_tokens=rows, seed=self.seed, split="holdout", opened=self.shards)

    def block(self, number: int) -> list[list[Sample]]:
        """The rows of one block."""
        samples: list[Sample] = []
        for moments, weight in zip(self.moments, self.weights):
            first, last = (int(n * BLOCK_SAMPLES * weight + 0.5) for n in (number, number + 1))
            samples += [moments.sample(k, self.seed) for k in range(first, last)]
        generator = np.random.Generator(np.random.Philox(key=[self.seed, number]))
        samples = [samples[i] for i in generator.permutation(len(samples))]
        rows = pack([s.length for s in samples], self.row_tokens)
        return [[samples[i] for i in rows[r]] for r in generator.permutation(len(rows))]

    def build(self, sample: Sample) -> TokenSequence:
        tokens = self.shards[sample.source][sample.episode]
        key = (sample.task, tokens.rate_hz, sample.offsets)
        if key not in self._placed:
            task = self.tasks[sample.task].with_offsets(sample.offsets)
            self._placed[key] = task, task.place(tokens.rate_hz)
        task, placed = self._placed[key]
        now, variant, visible = sample.now, sample.variant, sample.visible
        return self.builder.build(task, tokens, now, variant, placed=placed, visible=visible, pad=True)

    def provenance(self, sample: Sample) -> str:
        """Where a sample came from, for messages."""
        name = self.shards[sample.source].plan.ids[sample.episode]
        return f"{self.task_names[sample.task]} at step {sample.now} of {sample.source}/{name}"

    def shares(self) -> list[dict[str, Any]]:
        """Per task and source: the share of samples and of tokens, the moments and episodes it draws from."""
        rows = []
        for moments, weight in zip(self.moments, self.weights):
            probe = [moments.moment(int(i)) for i in np.linspace(0, len(moments) - 1, min(64, len(moments)))]
            tokens = float(np.mean([s.length for s in probe]))
            rows.append(
                {
                    "task": self.task_names[moments.task_index],
                    "source": moments.source,
                    "samples": weight,
                    "tokens": weight * tokens,
                    "tokens_per_sample": tokens,
                    "moments": len(moments),
                    "episodes": moments.episodes,
                }
            )
        total = sum(r["tokens"] for r in rows) or 1.0
        for row in rows:
            row["tokens"] /= total
        return rows


@dataclass
class DataState:
    """Where a run is in its data: the block, and the next row in it."""

    block: int = 0
    row: int = 0


class RowOrder:
    """Rows for ever, from a state on. `take(n)` returns the next n rows of the whole run."""

    def __init__(self, mixture: Mixture, state: DataState | None = None):
        self.mixture = mixture
        self.state = state or DataState()
        self._rows: list[list[Sample]] | None = None

    def take(self, count: int) -> list[list[Sample]]:
        out: list[list[Sample]] = []
        while len(out) < count:
            if self._rows is None:
                self._rows = self.mixture.block(self.state.block)
            if self.state.row >= len(self._rows):
                self.state, self._rows = DataState(self.state.block + 1, 0), None
                continue
            part = self._rows[self.state.row : self.state.row + count - len(out)]
            out += part
            self.state = DataState(self.state.block, self.state.row + len(part))
        return out

    def __iter__(self) -> Iterator[list[Sample]]:
        while True:
            yield self.take(1)[0]
