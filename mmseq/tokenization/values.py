"""What the codes of each kind of stream mean: from an episode to codes, from codes to values, and how far off they are.

=======  ==============================  =============================  ==========================================
kind     an episode's value              a predicted value              how far off it is
=======  ==============================  =============================  ==========================================
text     its phrasings at a step         str                            bits per token, exact match
vision   uint8 (N, H, W, 3) of a camera  uint8 (N, height, width, 3)    PSNR in dB
vector   float32 (steps, axes)           the same, in the axes' units   mean absolute error by group of axes
scalar   share of the episode            float in 0..1                  absolute error
outcome  success and near its end        probability of yes             share of right answers
=======  ==============================  =============================  ==========================================
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mmseq.embodiment import Axes, Embodiment
from mmseq.episode import Episode
from mmseq.errors import TaskError
from mmseq.streams import (
    IMAGE_PREFIX,
    LATENT,
    OUTCOME,
    SCALAR,
    STREAMS,
    TEXT,
    VECTOR,
    VISION,
    StreamRow,
    row_of,
    stream_row,
)
from mmseq.tasks import PlacedSegment
from mmseq.tokenization.pictures import psnr, strip

if TYPE_CHECKING:
    from mmseq.tokenization.bundle import EpisodeTokens, Tokenizers

Sums = dict[str, tuple[float, int]]  # measure -> its sum and how many it was taken over


@dataclass(kw_only=True)
class Span:
    """A predicted segment: the true codes (n,), the predicted ones (n,) and the nats (n,) of the true ones.

    embodiment: the name of the robot's; None for none.
    """

    stream: str
    embodiment: str | None
    true: np.ndarray
    predicted: np.ndarray
    nats: np.ndarray


class Values:
    """The values of one kind. Methods take a stream's row, since streams of a kind share everything else."""

    def encode(self, source: EpisodeTokens, key: str, start: int, stop: int, variant: int) -> np.ndarray:
        """The codes of a stream of an episode (`TokenSource.codes`)."""
        raise TaskError(f"{key!r} has no tokenizer here: train a latent-action tokenizer first")

    def decode(self, tokenizers: Tokenizers, row: StreamRow, codes: np.ndarray, robot: str | None, mean: float) -> Any:
        """The value of codes. robot: the name of an embodiment. mean: of a number, the mean code under the model."""
        raise TaskError(f"{row.name!r} has no decoder")

    def truth(self, source: EpisodeTokens, key: str, start: int, stop: int) -> Any:
        """What the episode has, as `decode` would give it but for what tokenizing costs; None where it has nothing."""
        raise TaskError(f"{key!r} is in no episode")

    def measure(self, span: Span, tokenizers: Tokenizers) -> Sums:
        """How far off a prediction is. Both sides are decoded, so what tokenizing itself costs is left out."""
        return {}

    def draw(self, span: Span, tokenizers: Tokenizers) -> np.ndarray | None:
        """uint8 (H, W, 3): the truth above the prediction; None for what is no picture."""
        return None


class TextValues(Values):
    def encode(self, source: EpisodeTokens, key: str, start: int, stop: int, variant: int) -> np.ndarray:
        texts = source.texts_of(key, start)
        if not texts:
            where = f" at step {start}" if source.episode.spans else ""
            raise TaskError(f"episode {source.episode.id!r} has no {key!r}{where}", fix=f"pass {key}=... to predict")
        return source.tokenizers[stream_row(key).range].encode(texts[variant % len(texts)])

    def decode(self, tokenizers: Tokenizers, row: StreamRow, codes: np.ndarray, robot: str | None, mean: float) -> str:
        return tokenizers[row.range].decode(codes)

    def truth(self, source: EpisodeTokens, key: str, start: int, stop: int) -> str | None:
        return next(iter(source.texts_of(key, start)), None)  # a text may belong to other steps only

    def measure(self, span: Span, tokenizers: Tokenizers) -> Sums:
        same = (span.true == span.predicted).all()
        return {
            f"{span.stream}_bits_per_token": (float(span.nats.sum()) / math.log(2), len(span.nats)),
            f"{span.stream}_exact_match": (float(same), 1),
        }


class VisionValues(Values):
    def encode(self, source: EpisodeTokens, key: str, start: int, stop: int, variant: int) -> np.ndarray:
        return source.tokenizers["vision"].encode(source.episode[key][start:stop])

    def decode(
        self, tokenizers: Tokenizers, row: StreamRow, codes: np.ndarray, robot: str | None, mean: float
    ) -> np.ndarray:
        return tokenizers[row.range].decode(codes)

    def truth(self, source: EpisodeTokens, key: str, start: int, stop: int) -> np.ndarray:
        return source.tokenizers.vision.fit(source.episode[key][start:stop])

    def measure(self, span: Span, tokenizers: Tokenizers) -> Sums:
        values = psnr(*self._frames(span, tokenizers))
        return {"psnr_db": (float(values.sum()), len(values))}

    def draw(self, span: Span, tokenizers: Tokenizers) -> np.ndarray:
        return strip(*self._frames(span, tokenizers))

    def _frames(self, span: Span, tokenizers: Tokenizers) -> tuple[np.ndarray, np.ndarray]:
        codes = np.stack([span.true, span.predicted]).astype(np.int64)
        true, predicted = np.split(tokenizers.vision.decode(codes.reshape(-1, tokenizers.layout.frame_tokens)), 2)
        return true, predicted


class VectorValues(Values):
    def encode(self, source: EpisodeTokens, key: str, start: int, stop: int, variant: int) -> np.ndarray:
        axes, where = source.axes(key), f"episode {source.episode.id!r}"
        if axes is None:
            raise TaskError(f"{where} of embodiment {source.episode.embodiment!r} has no {key!r} here")
        values = source.episode[key][start:stop]
        return source.tokenizers.encode_vector(key, source.embodiment, values, where=where)

    def decode(
        self, tokenizers: Tokenizers, row: StreamRow, codes: np.ndarray, robot: str | None, mean: float
    ) -> np.ndarray:
        return tokenizers[row.range].decode(codes, tokenizers.axes(robot, row.name))

    def truth(self, source: EpisodeTokens, key: str, start: int, stop: int) -> np.ndarray:
        return source.episode[key][start:stop]

    def measure(self, span: Span, tokenizers: Tokenizers) -> Sums:
        robot, axes = tokenizers.embodiment(span.embodiment), tokenizers.axes(span.embodiment, span.stream)
        tokenizer = tokenizers[stream_row(span.stream).range]
        true, predicted = (
            tokenizer.decode(codes.astype(np.int64).reshape(-1, len(axes)), axes).astype(np.float64)
            for codes in (span.true, span.predicted)
        )
        error = np.abs(predicted - true)
        return {
            f"{span.stream}_error.{robot.name}.{group}": (float(error[:, at].sum()), error[:, at].size)
            for group, at in axis_groups(axes, robot).items()
        }


class ScalarValues(Values):
    """Progress: the share of a successful episode that is over."""

    def encode(self, source: EpisodeTokens, key: str, start: int, stop: int, variant: int) -> np.ndarray:
        return scalar_codes(source.tokenizers, key, start, stop, len(source), source.episode.success)

    def decode(
        self, tokenizers: Tokenizers, row: StreamRow, codes: np.ndarray, robot: str | None, mean: float
    ) -> float:
        return tokenizers[row.range].decode(mean)

    def truth(self, source: EpisodeTokens, key: str, start: int, stop: int) -> float:
        return (stop - 1) / max(1, len(source) - 1)

    def measure(self, span: Span, tokenizers: Tokenizers) -> Sums:
        tokenizer = tokenizers[stream_row(span.stream).range]
        true, predicted = (tokenizer.decode(float(codes[0])) for codes in (span.true, span.predicted))
        return {f"{span.stream}_error": (abs(predicted - true), 1)}


class OutcomeValues(ScalarValues):
    """Success: whether the episode reaches its goal, and this is its end."""

    def truth(self, source: EpisodeTokens, key: str, start: int, stop: int) -> float:
        return float(self.encode(source, key, stop - 1, stop, 0)[0])

    def measure(self, span: Span, tokenizers: Tokenizers) -> Sums:
        return {f"{span.stream}_accuracy": (float((span.predicted[0] > 0.5) == bool(span.true[0])), 1)}


_VALUES: dict[str, Values] = {
    TEXT.name: TextValues(),
    VISION.name: VisionValues(),
    VECTOR.name: VectorValues(),
    SCALAR.name: ScalarValues(),
    OUTCOME.name: OutcomeValues(),
    LATENT.name: Values(),
}


def values_of(stream: str) -> Values:
    """The values of a stream, or of a camera's `image.<camera>`."""
    return _VALUES[row_of(stream).kind.name]


def scalar_codes(
    tokenizers: Mapping[str, Any], stream: str, start: int, stop: int, length: int, success: bool | None
) -> np.ndarray:
    """The codes (steps,) of `progress` or `success` in an episode of `length` steps."""
    row, last = stream_row(stream), length - 1
    if row.kind is OUTCOME:
        return np.array([int(bool(success) and step >= 0.9 * last) for step in range(start, stop)])
    return np.array([tokenizers[row.range].encode(step / max(1, last)) for step in range(start, stop)])


def axis_groups(axes: Axes, robot: Embodiment) -> dict[str, list[int]]:
    """Which axes are averaged: those of one unit, named by it; grippers by themselves."""
    groups: dict[str, list[int]] = {}
    grippers = {gripper.axis for gripper in robot.grippers}
    for i, (name, unit) in enumerate(zip(axes.names, axes.units)):
        groups.setdefault(f"gripper_{unit}" if name in grippers else unit, []).append(i)
    return groups


def by_name[T](parts: Iterable[tuple[PlacedSegment, str | None, T]]) -> dict[str, list[T]]:
    """What belongs to each predicted segment of a camera, in order, under the names of a prediction.

    A name says the camera where there are several, or where the arrow names it.
    """
    parts = list(parts)
    several = len({camera for _, camera, _ in parts if camera}) > 1
    found: dict[str, list[T]] = {}
    for p, camera, value in parts:
        named = camera and (several or p.segment.camera is not None)
        found.setdefault(f"{p.stream}.{camera}" if named else p.stream, []).append(value)
    return found


def join(key: str, values: list[Any]) -> Any:
    """The values of a stream's segments, in time: arrays one after the other, others as they are or as a list.

    A single picture is (H, W, 3).
    """
    if isinstance(values[0], np.ndarray):
        joined = np.concatenate(values)
        return joined[0] if key.startswith("image") and len(joined) == 1 else joined
    return values[0] if len(values) == 1 else values


def episode_streams(episode: Episode, tokenizers: Tokenizers, texts: Mapping[str, Any]) -> list[str]:
    """What an episode can fill. texts: by text stream."""
    names = [name for name, found in texts.items() if found] + judged(episode.success)
    robot = tokenizers.embodiments.get(episode.embodiment or "")
    vectors = robot.vectors if robot is not None else {}
    return names + [name for name in episode.streams if name.startswith(IMAGE_PREFIX) or name in vectors]


def judged(success: bool | None) -> list[str]:
    """The streams that an episode has by its outcome.

    One whose outcome nobody knows is neither success nor failure: it has no `success`, and no `progress`, which is the
    share of a successful one.
    """
    known = {SCALAR: success is True, OUTCOME: success is not None}
    return [name for name, row in STREAMS.items() if known.get(row.kind)]
