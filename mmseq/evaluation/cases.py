"""Which moments of which held-out episodes are measured, and what the model predicts at them.

Everything follows from the seed: episodes are visited in turn, so that a few samples still cover
many episodes, and each visit takes another moment and another phrasing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmseq.episode import Episode
from mmseq.errors import EpisodeError
from mmseq.grammar import Duration
from mmseq.inference.decoding import Decoder, Request
from mmseq.inference.predict import to_streams
from mmseq.model.sequence_model import SequenceModel
from mmseq.sequence import TokenSource
from mmseq.streams import TEXT
from mmseq.tasks import PlacedSegment, Task
from mmseq.tokenization.bundle import EpisodeTokens, Tokenizers
from mmseq.tokenization.values import by_name

BATCH = 64  # requests that decode together
FULL_COUNT_PASSES = 512  # a task that decodes more tokens than this gets fewer samples
TYPICAL_TEXT_TOKENS = 20
CURVE_MOMENTS = 12  # of one episode, for measures over its whole length


@dataclass(frozen=True)
class Case:
    """One sample: an episode, the moment that is now, and which phrasing is given."""

    episode: Episode
    tokens: EpisodeTokens
    now: int
    variant: int


def readable(episodes: Iterable[Episode], tokenizers: Tokenizers) -> tuple[list[EpisodeTokens], dict[str, str]]:
    """Episodes ready for the model, and why others are left out: their vectors leave the robot's limits."""
    kept, excluded = [], {}
    for episode in episodes:
        tokens = EpisodeTokens(episode, tokenizers)
        try:
            for stream in episode.streams:
                axes = tokens.axes(stream)
                if axes is not None:
                    axes.check(episode[stream], what=stream, where=f"episode {episode.id!r}")
        except EpisodeError as error:
            excluded[episode.id] = str(error)
        else:
            kept.append(tokens)
    return kept, excluded


def passes(task: Task, tokens: EpisodeTokens, tokenizers: Tokenizers) -> int:
    """Tokens that one sample decodes, one pass through the model each."""
    builder, total = tokenizers.builder(), 0
    for p in task.place(tokens.rate_hz):
        if p.predicted:
            shape = builder.shape(p, tokens.embodiment)
            one = TYPICAL_TEXT_TOKENS if shape is None else int(np.prod(shape))
            total += one * (1 if p.segment.camera else len(builder.expand(p, tokens)))
    return total


def moments_of(task: Task, tokens: EpisodeTokens) -> np.ndarray:
    """The steps (n,) of an episode at which the task can be filled whole, in order.

    As in training, a text counts only at its own steps; the other segments may reach beyond these.
    """
    inside = task.moments(len(tokens), tokens.rate_hz)
    found = [
        range(max(inside.start, start), min(inside.stop, stop))
        for start, stop, streams in tokens.pieces()
        if not task.missing(streams)
    ]
    return np.array([step for steps in found for step in steps], dtype=np.int64)


def why_not(task: Task, episodes: Sequence[EpisodeTokens]) -> str | None:
    """Why none of the episodes can fill the task; None when one can."""
    if not episodes:
        return "there are no held-out episodes of this kind"
    if any(len(moments_of(task, tokens)) for tokens in episodes):
        return None
    lacking = [task.missing(t.tokenizers.builder().visible(t.embodiment, t.streams)) for t in episodes]
    if all(lacking):
        reason = f"no episode has {', '.join(min(lacking, key=len))}"
        if "latent" in reason:
            return "this model has no latent-action tokenizer"
        unknown = sorted({str(t.episode.embodiment) for t in episodes if t.episode.embodiment and t.embodiment is None})
        return reason + (f" (the model does not know the embodiment {', '.join(unknown)})" if unknown else "")
    able = [tokens for tokens, missing in zip(episodes, lacking) if not missing]
    if any(len(task.moments(len(t), t.rate_hz)) for t in able):
        texts = dict.fromkeys(s.stream for s in task.segments if s.row.kind is TEXT)
        return f"no step with room for it has {' and '.join(texts)}"
    return f"the longest episode has {max(map(len, able))} steps, which is too short for it"


def draw(task: Task, episodes: Sequence[EpisodeTokens], count: int, rng: np.random.Generator) -> list[Case]:
    """`count` cases, or all there are: one moment of each episode, then another of each, and so on."""
    order = [episodes[i] for i in rng.permutation(len(episodes))]
    moments = [rng.permutation(moments_of(task, tokens)) for tokens in order]
    return _take_in_turn(order, moments, count, rng)


def draw_curves(task: Task, episodes: Sequence[EpisodeTokens], count: int, rng: np.random.Generator) -> list[Case]:
    """Evenly spaced moments from the beginning to the end of some episodes, about `count` in all."""
    cases: list[Case] = []
    for tokens in (episodes[i] for i in rng.permutation(len(episodes))):
        moments = moments_of(task, tokens)
        if len(moments) < 3:
            continue
        if len(cases) >= count:
            break
        variant = int(rng.integers(1 << 20))
        places = np.unique(np.linspace(0, len(moments) - 1, CURVE_MOMENTS).round().astype(int))
        cases += [Case(tokens.episode, tokens, int(t), variant) for t in moments[places]]
    return cases


def draw_balanced(
    task: Task, episodes: Sequence[EpisodeTokens], stream: str, count: int, rng: np.random.Generator
) -> list[Case]:
    """As many moments at which a yes/no stream is yes as moments at which it is no; [] when one is absent."""
    order = [episodes[i] for i in rng.permutation(len(episodes))]
    sides: list[list[np.ndarray]] = [[], []]
    for tokens in order:
        moments = rng.permutation(moments_of(task, tokens))
        stop = next(p.stop for p in task.place(tokens.rate_hz) if p.stream == stream and p.predicted)
        shift = 0 if stop is None else stop - 1
        truth = np.array([tokens.codes(stream, t + shift, t + shift + 1)[0] for t in map(int, moments)], dtype=np.int64)
        for outcome in (0, 1):
            sides[outcome].append(moments[truth == outcome])
    half = min(count // 2, *(sum(map(len, side)) for side in sides))
    return [case for side in sides for case in _take_in_turn(order, side, half, rng)]


def _take_in_turn(
    order: Sequence[EpisodeTokens], moments: Sequence[np.ndarray], count: int, rng: np.random.Generator
) -> list[Case]:
    cases: list[Case] = []
    for visit in range(max(map(len, moments), default=0)):
        for tokens, of_episode in zip(order, moments):
            if visit < len(of_episode) and len(cases) < count:
                cases.append(Case(tokens.episode, tokens, int(of_episode[visit]), int(rng.integers(1 << 20))))
    return cases


def predict_cases(
    model: SequenceModel, task: Task, cases: Sequence[Case], sources: Sequence[TokenSource] | None = None
) -> list[dict[str, Any]]:
    """The predicted streams of each case (see `Prediction.streams`), greedily decoded, many at once.

    sources: tokens to read in place of the cases' own, one per case.
    """
    assert model.tokenizers is not None
    decoder = Decoder(model)
    out: list[dict[str, Any]] = [{} for _ in cases]
    for members in groups(cases):
        for first in range(0, len(members), BATCH):
            part = members[first : first + BATCH]
            read = lambda i: cases[i].tokens if sources is None else sources[i]
            requests = [Request(read(i), cases[i].now, cases[i].variant) for i in part]
            for i, decoded in zip(part, decoder.decode(task, requests)):
                out[i] = to_streams(decoded, model.tokenizers, cases[i].tokens)
    return out


def groups(cases: Sequence[Case]) -> list[list[int]]:
    """Cases that can share a batch: of one robot, rate and set of cameras."""
    found: dict[tuple, list[int]] = {}
    for i, case in enumerate(cases):
        key = (case.tokens.rate_hz, case.tokens.embodiment, tuple(sorted(case.episode.cameras)))
        found.setdefault(key, []).append(i)
    return list(found.values())


class OtherActions:
    """The tokens of one case with the actions of another. Implements `TokenSource`."""

    def __init__(self, case: Case, other: Case):
        self._case, self._other = case, other

    def __getattr__(self, name: str) -> Any:
        return getattr(self._case.tokens, name)

    def __len__(self) -> int:
        return len(self._case.tokens)

    def codes(self, stream: str, start: int, stop: int, variant: int = 0) -> np.ndarray:
        if stream != "action":
            return self._case.tokens.codes(stream, start, stop, variant)
        shift = self._other.now - self._case.now
        return self._other.tokens.codes(stream, start + shift, stop + shift)


def shuffle_actions(cases: Sequence[Case], rng: np.random.Generator) -> list[TokenSource] | None:
    """Each case with the actions of another one of its robot; None when a case stands alone."""
    sources: list[Any] = [None] * len(cases)
    for members in groups(cases):
        if len(members) < 2:
            return None
        ring = rng.permutation(members)
        for mine, theirs in zip(ring, np.roll(ring, 1)):
            sources[mine] = OtherActions(cases[mine], cases[theirs])
    return sources


def keys_of(task: Task, case: Case, tokenizers: Tokenizers) -> dict[str, list[tuple[PlacedSegment, str | None]]]:
    """Per predicted stream, named as in a prediction, its placed segments and their cameras."""
    builder, tokens = tokenizers.builder(), case.tokens
    predicted = [p for p in task.place(tokens.rate_hz) if p.predicted]
    return by_name((p, camera, (p, camera)) for p in predicted for camera in builder.expand(p, tokens))


def last_seen(placed: PlacedSegment, case: Case) -> int:
    """The step of the last frame before a predicted picture or video."""
    segment = placed.segment
    if placed.start is None:
        return case.now
    shift = segment.offset.steps(case.tokens.rate_hz) if isinstance(segment.offset, Duration) else 0
    return case.now + placed.start - shift - (segment.stream == "video")
