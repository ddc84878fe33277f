"""Chunks: how long the policy of a checkpoint takes for its chunks of actions, on this machine and its own episodes.

    mmseq bench chunks checkpoint=runs/demo/checkpoint data=runs/demo/data/episodes/robot batch=8 device=cuda

What a server does by default, guessing chunks and checking the guesses, takes turns with one pass per token, and with
`passes` where the policy was trained for them. Every turn decodes the same moments of the episodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mmseq.bench.rows import BenchRow, require_positive, row, take_turns
from mmseq.bench.worker import milliseconds
from mmseq.data.sources import open_source
from mmseq.errors import ConfigError, DataError
from mmseq.inference.decoding import Decoder, Request
from mmseq.inference.predict import require_parallel
from mmseq.inference.prefixes import Prefixes
from mmseq.model.device import default_device
from mmseq.model.sequence_model import SequenceModel
from mmseq.reading import Reading
from mmseq.tasks import Task
from mmseq.tokenization.bundle import EpisodeTokens


@dataclass(frozen=True, kw_only=True)
class Config(Reading):
    """What `mmseq bench chunks` measures, and how its episodes are read."""

    checkpoint: str = "???"  # its directory
    data: str = "???"  # episodes of the robot
    policy: str = "policy"  # the arrow, or the name of a trained task
    passes: int = 0  # also decode in so many; 0: do not
    batch: int = 1  # robots at once
    moments: int = 8  # requests of each robot in a turn
    device: str | None = None  # default: a GPU where there is one
    seconds: float = 60.0  # of all turns together
    seed: int = 0  # of what is drawn

    def check(self) -> None:
        """Raises: ConfigError naming the option."""
        require_positive(self, "batch", "moments", "seconds")


def bench(config: Config) -> tuple[list[BenchRow], list[str]]:
    """Rows, and what else there is to say. Raises: ConfigError, or what reading the checkpoint or the data raises."""
    config.check()
    model = SequenceModel.from_pretrained(config.checkpoint, device=config.device or default_device())
    task = Task.parse(model.tasks.get(config.policy, config.policy))
    if task.final_chunk is None:
        raise ConfigError(f"{task} does not end with a chunk of actions", fix="name another with policy=")
    if config.passes:
        require_parallel(model, task)
    requests = _requests(config, model, task)
    sides = {"one pass per token": Side(model, task, requests), "guessed": Side(model, task, requests, speculate=True)}
    if config.passes:
        sides[f"{config.passes} passes"] = Side(model, task, requests, passes=config.passes)
    found = {name: side() for name, side in sides.items()}  # warm
    timed = take_turns(
        {name: lambda side=side: milliseconds(side) / len(requests) for name, side in sides.items()},
        seconds=config.seconds,
    )
    slow = "one pass per token"
    rows = [
        row(f"chunks.{name}", "ms/call", timed[name], slow, timed[slow], better="lower", seed=config.seed)
        for name in sides
        if name != slow
    ]
    notes = []
    for name, side in sides.items():
        other = float(np.mean([(a != b).mean() for a, b in zip(found[name], found[slow])]))
        passes = f"{np.mean(side.passes):.1f} passes in the mean, {max(side.passes)} at most"
        notes.append(f"{name}: {passes}, {other:.2%} of the codes are others than with one pass per token")
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    notes.append(f"{task}, {model.parameters_count / 1e6:.1f} M parameters in {dtype}, {config.batch} robots in a call")
    return rows, notes


class Side:
    """Decodes all requests, a batch in each call. passes: of each call so far."""

    def __init__(self, model: SequenceModel, task: Task, requests: list[list[Request]], **how: int | bool):
        self.model, self.task, self.requests, self.how = model, task, requests, how
        self.prefixes, self.passes = Prefixes(), list[int]()

    def __call__(self) -> list[np.ndarray]:
        """The codes of every chunk (steps, axes)."""
        codes = []
        for batch in self.requests:
            decoder = Decoder(self.model, prefixes=self.prefixes, **self.how)  # type: ignore[arg-type]
            codes += [segments[-1].codes for segments in decoder.decode(self.task, batch)]
            self.passes.append(decoder.stats.passes)
        return codes


def _requests(config: Config, model: SequenceModel, task: Task) -> list[list[Request]]:
    """Batches of requests: each robot goes through an episode of its own, `moments` steps evenly over it."""
    assert model.tokenizers is not None
    source, robots = open_source(config.data, config), []
    for i in np.random.default_rng(config.seed).permutation(len(source)):
        tokens = EpisodeTokens(source[int(i)], model.tokenizers)
        if task.missing(tokens.streams, given_only=True) or tokens.embodiment is None:
            continue
        past = max((-p.start for p in task.place(tokens.rate_hz) if p.start is not None and not p.predicted), default=0)
        nows = np.linspace(past, len(tokens) - 1, config.moments).round().astype(int)
        robots.append([Request(tokens, int(now)) for now in nows])
        if len(robots) == config.batch:
            return [list(batch) for batch in zip(*robots)]
    raise DataError(f"{config.data} has {len(robots)} episodes that fill {task}, {config.batch} are wanted")
