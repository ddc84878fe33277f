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
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from mmseq.config import load_config
from mmseq.data.moments import Moments, Sample
from mmseq.data.tokens import CACHE_BYTES, TokenShards
from mmseq.errors import ConfigError, DataError, MMSeqError, did_you_mean, raise_all
from mmseq.packing import pack
from mmseq.reading import Reading
from mmseq.sequence import TokenSequence
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
        """Raises: ConfigError or TaskError naming everything that is wrong."""
        raise_all(self.problems())

    def problems(self) -> Iterator[MMSeqError]:
        """Everything in the settings that cannot work, whatever the data."""
        wrong = lambda what, fix=None: ConfigError(f"mix {self.name!r}: {what}", fix=fix)
        if not self.sources:
            yield wrong("there are no sources")
        if not self.tasks:
            yield wrong("there are no tasks")
        if self.weighting not in ("as_given", "frames"):
            yield wrong(f"weighting is {self.weighting!r}", "use as_given or frames")
        if not 0 <= self.holdout < 1:
            yield wrong(f"holdout must be in [0, 1), got {self.holdout}")
        for key, source in self.sources.items():
            if not (math.isfinite(source.weight) and source.weight >= 0):
                yield wrong(f"sources.{key}.weight must not be negative, got {source.weight}")
            if source.holdout is not None and not 0 <= source.holdout < 1:
                yield wrong(f"sources.{key}.holdout must be in [0, 1), got {source.holdout}")
        names: Counter[str] = Counter()
        for task in self.tasks:
            try:
                names[task_name(task)] += 1
                final_chunk = Task.parse(task.task).final_chunk
            except MMSeqError as error:
                yield error
                continue
            if not 0 <= task.parallel <= 1:
                yield wrong(f"parallel of {task.task!r} must be in [0, 1], got {task.parallel}")
            if task.parallel and final_chunk is None:
                said = f"{task.task!r} has parallel={task.parallel:g}, but does not end with action[n]"
                yield wrong(said, "leave parallel out")
            if not (math.isfinite(task.weight) and task.weight >= 0):
                yield wrong(f"the weight of {task.task!r} must not be negative, got {task.weight}")
            if task.sources is not None and (not task.sources or len(set(task.sources)) < len(task.sources)):
                fix = "name each source once, or leave sources out for all that can fill it"
                yield wrong(f"task {task.task!r} has sources {task.sources}", fix)
            for source in (name for name in task.sources or () if name not in self.sources):
                meant = did_you_mean(source, self.sources)
                yield wrong(f"task {task.task!r} names an unknown source {source!r}: {meant}")
        for name in (name for name, count in names.items() if count > 1):
            yield wrong(f"two tasks are named {name!r}", "give one of them a name")


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
