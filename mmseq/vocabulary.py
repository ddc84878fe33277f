"""Vocabulary: one id space for every modality, a contiguous range per tokenizer.

Text comes first, so that a pretrained language model keeps its ids. Structural tokens, embodiment
tokens and latent actions have spare ids, so that a new embodiment or stream needs no resize.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmseq.errors import ConfigError, FingerprintError, TaskError, did_you_mean
from mmseq.streams import RANGE_ORDER, RESERVED_IDS, STREAMS

# Times are written as one token each, in seconds on a logarithmic scale: 10 ms to 100 s.
TIME_TOKENS = 128
TIME_MIN_S, TIME_MAX_S = 0.01, 100.0
CAMERA_TOKENS = 16
STRUCTURE_SIZE, EMBODIMENT_SLOTS = RESERVED_IDS["structure"], RESERVED_IDS["embodiment"]

STRUCTURE = (
    "<pad>",
    "<bos>",
    "<eos>",
    "<patch>",  # a position that carries several merged vision codes, or features
    "<no_embodiment>",
    "<at_end>",
    *(f"<{row.name}>" for row in STREAMS.values() if row.header == "first"),
    *(f"<camera_{i}>" for i in range(CAMERA_TOKENS)),
    *(f"<time_{i}>" for i in range(TIME_TOKENS)),
    "<mask>",  # stands in a predicted chunk for a token that is not known yet
    "<past>",  # before a time: so long ago
)


@dataclass(frozen=True)
class Range:
    """Ids start .. start + size - 1 belong to one tokenizer."""

    name: str
    start: int
    size: int

    @property
    def stop(self) -> int:
        return self.start + self.size


class Vocabulary:
    """The ranges in order, and the ids of structural and embodiment tokens.

    sizes: codes of each tokenizer by the name of its range: `text` pieces, `vision` codes, `action` and `proprio`
    bins, `progress` bins, and those of further streams. embodiments, streams: names of robots, and of streams beside
    those that every vocabulary has header tokens of, in the order in which they were added.
    """

    def __init__(self, sizes: Mapping[str, int], *, embodiments: Sequence[str] = (), streams: Sequence[str] = ()):
        self.sizes = dict(sizes)
        for name, size in self.sizes.items():
            if size < 1:
                raise ConfigError(f"vocabulary: the range {name!r} has {size} ids")
            if name in RESERVED_IDS:
                raise ConfigError(f"vocabulary: {name!r} is a range that every vocabulary has")
        self.ranges: dict[str, Range] = {}
        start = 0
        for name in (*RANGE_ORDER, *(n for n in self.sizes if n not in RANGE_ORDER)):
            size = self.sizes.get(name, RESERVED_IDS.get(name))
            if size is not None:
                self.ranges[name] = Range(name, start, size)
                start += size
        self.size = math.ceil(start / 64) * 64  # a multiple of 64 keeps matrix products fast
        self._structure = {token: index for index, token in enumerate(STRUCTURE)}
        self.streams = [name for name in streams if f"<{name}>" not in self._structure]
        self._structure |= {f"<{name}>": len(STRUCTURE) + i for i, name in enumerate(self.streams)}
        if len(self._structure) > STRUCTURE_SIZE:
            raise ConfigError(f"{len(self.streams)} further streams, {STRUCTURE_SIZE - len(STRUCTURE)} fit")
        self.embodiments: list[str] = []
        for name in embodiments:
            self.add_embodiment(name)

    def __len__(self) -> int:
        return self.size

    def layout(self) -> dict[str, list[int]]:
        """First id and size of every range."""
        return {r.name: [r.start, r.size] for r in self.ranges.values()}

    def structure(self, token: str) -> int:
        """The id of a structural token such as `<image>`."""
        try:
            return self.ranges["structure"].start + self._structure[token]
        except KeyError:
            raise ConfigError(f"unknown structural token {token!r}: {did_you_mean(token, self._structure)}") from None

    @property
    def structural(self) -> list[str]:
        """The structural tokens in the order of their ids."""
        return list(self._structure)

    def header(self, stream: str) -> int:
        if f"<{stream}>" not in self._structure:
            known = [name for name, row in STREAMS.items() if row.header == "first"] + self.streams
            raise TaskError(
                f"this model has no stream {stream!r}: {did_you_mean(stream, known)}",
                fix="train tokenizers with a robot whose contract declares it",
            )
        return self.structure(f"<{stream}>")

    def time(self, seconds: float) -> int:
        """The id for an offset of `seconds`, to the nearest 8 %."""
        share = math.log(min(max(seconds, TIME_MIN_S), TIME_MAX_S) / TIME_MIN_S) / math.log(TIME_MAX_S / TIME_MIN_S)
        return self.structure(f"<time_{round(share * (TIME_TOKENS - 1))}>")

    def camera(self, index: int) -> int:
        if index >= CAMERA_TOKENS:
            raise ConfigError(f"camera number {index}: at most {CAMERA_TOKENS} cameras per embodiment")
        return self.structure(f"<camera_{index}>")

    def add_embodiment(self, name: str) -> int:
        """Give `name` the next spare embodiment token (or return the one it has)."""
        if name not in self.embodiments:
            if len(self.embodiments) == EMBODIMENT_SLOTS:
                raise ConfigError(f"no embodiment token is left for {name!r}: all {EMBODIMENT_SLOTS} are taken")
            self.embodiments.append(name)
        return self.embodiment(name)

    def embodiment(self, name: str | None) -> int:
        if name is None:
            return self.structure("<no_embodiment>")
        if name not in self.embodiments:
            raise ConfigError(
                f"embodiment {name!r} is not in the vocabulary: {did_you_mean(name, self.embodiments)}",
                fix="train or fine-tune with a mix that contains it",
            )
        return self.ranges["embodiment"].start + self.embodiments.index(name)

    def encode(self, range_name: str, codes: np.ndarray) -> np.ndarray:
        """Ids of a tokenizer's own codes. Raises: ConfigError when a code is outside its range."""
        ids = self.ranges[range_name]
        codes = np.asarray(codes)
        if codes.size and (codes.max() >= ids.size or (codes.dtype.kind != "u" and codes.min() < 0)):  # shards: uint16
            raise ConfigError(
                f"{range_name} code {int(codes.max() if codes.max() >= ids.size else codes.min())} is outside "
                f"0..{ids.size - 1}: tokens and vocabulary do not belong together"
            )
        return codes.astype(np.int64) + ids.start

    def decode(self, range_name: str, ids: np.ndarray) -> np.ndarray:
        """The tokenizer's own codes of ids. Raises: ConfigError when an id is of another range."""
        ids = np.asarray(ids, dtype=np.int64)
        codes = ids - self.ranges[range_name].start
        if codes.size and (codes.min() < 0 or codes.max() >= self.ranges[range_name].size):
            raise ConfigError(f"an id outside the {range_name} range: {int(ids.min())}..{int(ids.max())}")
        return codes

    def range_of(self, token_id: int) -> str | None:
        """The name of the range an id belongs to; None for padding at the end."""
        return next((r.name for r in self.ranges.values() if r.start <= token_id < r.stop), None)

    def describe(self, token_id: int) -> str:
        """A readable name of one id, for `preview` and `inspect`."""
        name = self.range_of(token_id)
        if name is None:
            return f"<unused {token_id}>"
        index = token_id - self.ranges[name].start
        if name == "structure":
            return self.structural[index] if index < len(self.structural) else f"<spare {index}>"
        if name == "embodiment":
            return f"<{self.embodiments[index]}>" if index < len(self.embodiments) else f"<spare embodiment {index}>"
        return f"{name}:{index}"

    @property
    def fingerprint(self) -> str:
        later = [name for name in self.sizes if name not in RANGE_ORDER]  # which come in the order given
        data = self.to_dict() | ({"order": later} if later else {})
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]

    def to_dict(self) -> dict:
        data = {**self.sizes, "embodiments": list(self.embodiments)}
        return data | ({"streams": list(self.streams)} if self.streams else {})

    @classmethod
    def from_dict(cls, data: dict) -> Vocabulary:
        try:
            sizes = {name: int(size) for name, size in data.items() if name not in ("embodiments", "streams")}
            return cls(sizes, embodiments=data["embodiments"], streams=data.get("streams", ()))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"not a valid vocabulary: {error}") from error

    def require_same_ranges(self, other: Vocabulary, *, mine: str, theirs: str) -> None:
        """Raises: FingerprintError naming the ranges whose sizes differ."""
        names = sorted({*self.sizes, *other.sizes})
        pairs = [(n, self.sizes.get(n, "absent"), other.sizes.get(n, "absent")) for n in names]
        wrong = [f"{name}: {here} against {there}" for name, here, there in pairs if here != there]
        if wrong:
            raise FingerprintError(f"the vocabulary of {mine} differs from that of {theirs}: {'; '.join(wrong)}")
