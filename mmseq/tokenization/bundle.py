"""Tokenizers: the tokenizers of one model together, their vocabulary, and the way from an episode to its tokens.

On disk a folder: `tokenizers.json`, the files of each tokenizer (`text.model` or `text.tokenizer.json`, `vision.json`
and `vision.safetensors`, ...), `embodiments/<name>.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmseq.embodiment import Axes, Embodiment
from mmseq.episode import Episode
from mmseq.errors import CheckpointError, ConfigError, EpisodeError, FingerprintError, TaskError, did_you_mean
from mmseq.layout import Layout
from mmseq.plugins import find
from mmseq.sequence import SequenceBuilder
from mmseq.streams import (
    IMAGE_PREFIX,
    OUTCOME,
    OWN_VECTORS,
    RESERVED_IDS,
    STREAMS,
    TEXT,
    VECTOR,
    kind_of_range,
    of_kind,
    row_of,
    stream_row,
)
from mmseq.tokenization.base import READOUTS, Encoder, Tokenizer, tokenizer_class
from mmseq.tokenization.continuous import BinTokenizer, ScalarTokenizer
from mmseq.tokenization.text import TextTokenizer
from mmseq.tokenization.values import episode_streams, values_of
from mmseq.tokenization.vision import VisionTokenizer
from mmseq.vocabulary import Vocabulary

FILE = "tokenizers.json"
FORMAT = 2
SPARE_BINS = 64  # of a further vector stream for which nobody names a tokenizer


class Tokenizers(Mapping[str, Tokenizer]):
    """Everything between episodes and vocabulary ids: a tokenizer for each range of the vocabulary.

    tokenizers: by range, `text` and `vision` among them. embodiments: the robots; each further vector stream that one
    of them declares gets a `BinTokenizer` where it has no tokenizer yet. merge: given vision joins merge x merge tokens
    into one position. encoder: gives features of given vision in place of merged codes. flat_slots: as in `Layout`, of
    tokenizers from before. streams: names that have header tokens already, in their order; those of the robots and
    tokenizers follow. `vectors` names the ranges of vectors.
    """

    def __init__(
        self,
        tokenizers: Mapping[str, Tokenizer],
        *,
        embodiments: Sequence[Embodiment] = (),
        merge: int = 2,
        encoder: Encoder | None = None,
        flat_slots: bool = False,
        streams: Sequence[str] = (),
    ):
        # of ranges that every vocabulary has, and that nothing is trained for
        outcomes = [row.range for row in STREAMS.values() if row.kind is OUTCOME]
        self._reserved = {name: ScalarTokenizer(RESERVED_IDS[name]) for name in outcomes}
        self.embodiments = {e.name: e for e in embodiments}
        declared = {name for e in embodiments for name in e.vectors}
        self._tokenizers = dict(tokenizers)
        for name in sorted({stream_row(name).range for name in declared} - set(tokenizers)):
            self._tokenizers[name] = BinTokenizer(SPARE_BINS)
        for name, tokenizer in self._tokenizers.items():
            if not isinstance(tokenizer, Tokenizer):
                raise ConfigError(f"the tokenizer of {name!r} is {type(tokenizer).__name__}, which lacks what one has")
            if tokenizer.readout not in READOUTS:
                raise ConfigError(f"the tokenizer of {name!r} has readout={tokenizer.readout!r}, not one of {READOUTS}")
            if tokenizer.readout == "medoid" and tokenizer.code_features() is None:
                raise ConfigError(f"the tokenizer of {name!r} has readout='medoid', which takes code_features")
        sizes = {name: tokenizer.size for name, tokenizer in self._tokenizers.items()}
        self.vectors = tuple(name for name in self._tokenizers if kind_of_range(name) is VECTOR)
        self.encoder = encoder
        soft = encoder.positions if encoder else 0
        self.layout = Layout(self.vision.grid, merge, self.vectors, soft, flat=flat_slots)
        further = sorted({*declared, *self.vectors} - set(streams))
        self.vocabulary = Vocabulary(sizes, embodiments=list(self.embodiments), streams=[*streams, *further])

    def __getitem__(self, name: str) -> Any:
        """The tokenizer of a range. Raises: TaskError when this model has none."""
        if name in self._reserved:
            return self._reserved[name]
        if name not in self._tokenizers:
            raise TaskError(f"this model has no tokenizer of {name!r}; it has {', '.join(self._tokenizers)}")
        return self._tokenizers[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tokenizers

    def __iter__(self) -> Iterator[str]:
        return iter(self._tokenizers)

    def __len__(self) -> int:
        return len(self._tokenizers)

    @property
    def soft_features(self) -> int:
        """Numbers of a position that an encoder gives; 0 without one."""
        return self.encoder.features if self.encoder else 0

    def features_of(self, frames: np.ndarray) -> np.ndarray:
        """Features float32 (N, positions, F) of frames. Raises: TaskError when there is no encoder, or it is wrong."""
        if self.encoder is None:
            raise TaskError("these tokenizers have no encoder")
        found = np.asarray(self.encoder.encode(frames))
        wanted = (len(frames), self.encoder.positions, self.encoder.features)
        if found.shape != wanted or found.dtype.kind != "f" or not np.isfinite(found).all():
            raise TaskError(f"the encoder {self.encoder.kind!r} gives {found.shape}, expected finite {wanted}")
        return found.astype(np.float32)

    @property
    def text(self) -> TextTokenizer:
        return self["text"]

    @property
    def vision(self) -> VisionTokenizer:
        return self["vision"]

    def readout(self, range_name: str) -> str:
        """What the model answers with in a range at temperature 0."""
        return self[range_name].readout

    def code_features(self) -> np.ndarray:
        """float32 (C, F): what the last C ids of the vocabulary, from the first vision code on, are made of.

        Each tokenizer has columns of its own; rows are zero for ids without a feature.
        """
        ranges = self.vocabulary.ranges
        first = ranges["vision"].start
        parts = {name: self[name].code_features() for name in ranges if name in self and ranges[name].start >= first}
        found = {name: features for name, features in parts.items() if features is not None}
        out = np.zeros((len(self.vocabulary) - first, sum(p.shape[1] for p in found.values())), np.float32)
        column = 0
        for name, features in found.items():
            ids = ranges[name]
            out[ids.start - first : ids.stop - first, column : column + features.shape[1]] = features
            column += features.shape[1]
        return out

    def builder(self) -> SequenceBuilder:
        robots = self.embodiments.values()
        cameras = {e.name: [c.name for c in e.cameras] for e in robots}
        axes = {e.name: {stream: len(axes) for stream, axes in e.vectors.items()} for e in robots}
        return SequenceBuilder(self.vocabulary, self.layout, cameras, axes)

    def axes(self, embodiment: str | None, stream: str) -> Axes:
        """The axes of a vector stream of a robot.

        Raises: EpisodeError, TaskError when there is no such robot or stream.
        """
        found = self.embodiment(embodiment).vectors.get(stream)
        if found is None:
            raise TaskError(f"embodiment {embodiment!r} has no {stream}")
        return found

    def embodiment(self, name: str | None) -> Embodiment:
        if name is None or name not in self.embodiments:
            raise EpisodeError(
                f"embodiment {name!r} is unknown to this model: {did_you_mean(name or '', self.embodiments)}"
            )
        return self.embodiments[name]

    def encode_vector(
        self, stream: str, embodiment: str | None, values: Any, *, what: str | None = None, where: str = "predict"
    ) -> np.ndarray:
        """Codes (steps, axes) of values in a robot's units. what, where: for messages.

        Raises: EpisodeError naming the axis of a value that cannot be, TaskError when there is no such stream.
        """
        axes = self.axes(embodiment, stream)
        checked = axes.check(np.asarray(values), what=what or stream, where=where)
        tokenizer = self[stream_row(stream).range]
        codes = np.asarray(tokenizer.encode(checked, axes))
        if codes.shape != checked.shape or codes.dtype.kind not in "iu":
            raise TaskError(
                f"the tokenizer {tokenizer.kind!r} of {stream} gives {codes.dtype} {codes.shape}, "
                f"expected whole numbers {checked.shape}"
            )
        if codes.size and not (codes.min() >= 0 and codes.max() < tokenizer.size):
            raise TaskError(
                f"the tokenizer {tokenizer.kind!r} of {stream} gives codes {codes.min()}..{codes.max()}, "
                f"expected 0..{tokenizer.size - 1}"
            )
        return codes

    def with_embodiments(self, embodiments: Sequence[Embodiment]) -> Tokenizers:
        """The same tokenizers for other robots; those that are here should come first, in their order.

        A further stream of a new robot gets a range of its own.
        """
        layout, streams = self.layout, self.vocabulary.streams
        same = {"merge": layout.merge, "encoder": self.encoder, "flat_slots": layout.flat, "streams": streams}
        return Tokenizers(self._tokenizers, embodiments=embodiments, **same)

    def fingerprints(self) -> dict[str, str]:
        """Of every part that token shards depend on; embodiments as `embodiment/<name>`."""
        robots = {f"embodiment/{e.name}": e.fingerprint for e in self.embodiments.values()}
        encoder = {"encoder": self.encoder.fingerprint} if self.encoder else {}
        return {name: tokenizer.fingerprint for name, tokenizer in self._tokenizers.items()} | encoder | robots

    def require_fingerprints(
        self, theirs: dict[str, str], *, what: str, fix: str = "tokenize again with `mmseq data tokenize`"
    ) -> None:
        """Raises: FingerprintError naming each tokenizer or embodiment that differs."""
        mine = self.fingerprints()
        wrong = [f"{k}: {v} there, {mine.get(k, 'absent')} here" for k, v in sorted(theirs.items()) if mine.get(k) != v]
        if wrong:
            raise FingerprintError(
                f"{what} was made with other tokenizers ({'; '.join(wrong)})",
                fix=fix,
            )

    def save(self, directory: str | Path) -> None:
        directory = Path(directory)
        (directory / "embodiments").mkdir(parents=True, exist_ok=True)
        for embodiment in self.embodiments.values():
            embodiment.save(directory / "embodiments" / f"{embodiment.name}.json")
        settings = {
            "format": FORMAT,
            "tokenizers": {name: {"kind": t.kind, **t.save(directory)} for name, t in self._tokenizers.items()},
            "encoder": {"kind": self.encoder.kind, **self.encoder.save(directory)} if self.encoder else None,
            "merge": self.layout.merge,
            "flat_slots": self.layout.flat,
            "streams": self.vocabulary.streams,
            "embodiments": list(self.embodiments),
            "fingerprints": self.fingerprints(),
        }
        (directory / FILE).write_text(json.dumps(settings, indent=2) + "\n")

    @classmethod
    def load(cls, directory: str | Path, *, device: str | torch.device = "cpu") -> Tokenizers:
        """device: of the vision tokenizer's network.

        Raises: CheckpointError when the folder is not complete, FingerprintError when a part was exchanged.
        """
        directory = Path(directory)
        try:
            settings = json.loads((directory / FILE).read_text())
            names, fingerprints, merge = settings["embodiments"], settings["fingerprints"], int(settings["merge"])
            parts = settings["tokenizers"] if settings["format"] == FORMAT else _first_format(settings)
            kinds = {str(name): (tokenizer_class(part["kind"]), dict(part)) for name, part in parts.items()}
            seen = settings.get("encoder")
            encoder = find("encoders", seen["kind"]).load(directory, dict(seen), device=device) if seen else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{directory} holds no tokenizers ({FILE}: {error})", fix="train them with `mmseq tokenizer train`"
            ) from error
        bundle = cls(
            {name: kind.load(directory, part, device=device) for name, (kind, part) in kinds.items()},
            embodiments=[Embodiment.load(directory / "embodiments" / f"{name}.json") for name in names],
            merge=merge,
            encoder=encoder,
            flat_slots=bool(settings.get("flat_slots", True)),
            streams=[str(name) for name in settings.get("streams", ())],
        )
        bundle.require_fingerprints(fingerprints, what=f"{directory / FILE}")
        return bundle


def _first_format(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The tokenizers of a folder from before each had settings of its own."""
    found: dict[str, dict[str, Any]] = {"text": {"kind": "text"}, "vision": {"kind": "fsq"}}
    for name in reversed(OWN_VECTORS):
        found[name] = {"kind": "bins", "bins": int(settings[f"{name}_bins"])}
    return found | {"progress": {"kind": "scalar", "bins": int(settings["progress_bins"])}}


class EpisodeTokens:
    """The tokens of an `Episode`, made when they are asked for. Implements `TokenSource`."""

    def __init__(self, episode: Episode, tokenizers: Tokenizers, *, texts: dict[str, str] | None = None):
        """texts: replaces or adds text streams (`text`, `plan`, `question`)."""
        self.episode = episode
        self.tokenizers = tokenizers
        self.rate_hz = episode.rate_hz
        self.embodiment = episode.embodiment if episode.embodiment in tokenizers.embodiments else None
        self._texts = texts or {}

    def __len__(self) -> int:
        return len(self.episode)

    def texts_of(self, stream: str, step: int) -> list[str]:
        """The phrasings of a text stream at a step."""
        return [self._texts[stream]] if stream in self._texts else self.episode.texts_of(stream, step)

    @property
    def streams(self) -> list[str]:
        spans = {span.stream for span in self.episode.spans}
        texts = {name: name in spans or self.texts_of(name, 0) for name in of_kind(TEXT)}
        return episode_streams(self.episode, self.tokenizers, texts)

    def pieces(self) -> list[tuple[int, int, list[str]]]:
        """The episode cut where texts change: first step, one past the last, and the streams that a sequence has there.

        These leave out cameras that the robot's contract does not name.
        """
        every = self.tokenizers.builder().visible(self.embodiment, self.streams)
        here = lambda stream, step: row_of(stream).kind is not TEXT or bool(self.texts_of(stream, step))
        cut = [(start, stop) for start, stop, _ in self.episode.pieces()]
        return [(start, stop, [s for s in every if here(s, start)]) for start, stop in cut]

    def axes(self, stream: str) -> Axes | None:
        """The axes of a vector stream; None where its robot is unknown or has no such stream."""
        return self.tokenizers.embodiments[self.embodiment].vectors.get(stream) if self.embodiment else None

    def codes(self, stream: str, start: int, stop: int, variant: int = 0) -> np.ndarray:
        return values_of(stream).encode(self, stream, start, stop, variant)

    def demonstration(self) -> EpisodeTokens:
        return self

    def features(self, camera: str, start: int, stop: int) -> np.ndarray:
        return self.tokenizers.features_of(self.episode[f"{IMAGE_PREFIX}{camera}"][start:stop])
