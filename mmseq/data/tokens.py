"""Token shards: episodes whose streams are tokenizer codes. Vision is tokenized once, not every epoch.

One sample is one episode: `<key>.json` (texts as codes, success) and `<key>.<stream>.npy` per stream.
The index carries what packing needs (lengths in steps and tokens), so a plan never opens a tar.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmseq.data.shards import ShardReader, ShardWriter
from mmseq.episode import IMAGE_PREFIX, Episode
from mmseq.errors import DataError, TaskError
from mmseq.tasks import TEXT_STREAMS, VECTOR_STREAMS
from mmseq.tokenization.bundle import EpisodeTokens, Tokenizers, scalar_code

CACHE_BYTES = 512 << 20  # of the opened episodes of a mixture, in each process


def write_token_shards(
    episodes: Iterable[Episode],
    directory: str | Path,
    tokenizers: Tokenizers,
    *,
    name: str,
    source: dict[str, Any] | None = None,
    total: int | None = None,
    overwrite: bool = False,
    on_progress: Callable[[int, int | None], None] | None = None,
) -> dict[str, Any]:
    """Tokenize every stream of every episode into shards; returns their manifest.

    source: what identifies the data that was read; kept in the manifest. total: of episodes, for
    on_progress(done, total).
    """
    manifest = {"kind": "tokens", "name": name, "source": source, **token_fingerprints(tokenizers)}
    with ShardWriter(directory, manifest, overwrite=overwrite) as writer:
        for index, episode in enumerate(episodes):
            if episode.embodiment is not None:
                tokenizers.embodiment(episode.embodiment)  # a robot without a contract is an error, not a video
            members, note = _tokenize(episode, tokenizers)
            writer.add(f"{index:08d}", members, metadata=note)
            if on_progress is not None:
                on_progress(index + 1, total)
        return writer.close()


def token_fingerprints(tokenizers: Tokenizers) -> dict[str, dict[str, str]]:
    """`tokenizers` and `embodiments` of a manifest of token shards."""
    fingerprints = tokenizers.fingerprints()
    return {
        "tokenizers": {k: v for k, v in fingerprints.items() if not k.startswith("embodiment/")},
        "embodiments": {e.name: e.fingerprint for e in tokenizers.embodiments.values()},
    }


def _tokenize(episode: Episode, tokenizers: Tokenizers) -> tuple[dict[str, Any], dict[str, Any]]:
    source = EpisodeTokens(episode, tokenizers)
    texts = _texts(source)
    members: dict[str, Any] = {"json": {"id": episode.id, "texts": texts}}
    for stream in source.streams:
        if stream.startswith(IMAGE_PREFIX):
            codes = source.vision(stream.removeprefix(IMAGE_PREFIX), 0, len(episode))
            members[f"{stream}.npy"] = codes.astype(_code_type(tokenizers.vision.codebook_size))
        elif stream in VECTOR_STREAMS:
            codes = source.vector(stream, 0, len(episode))
            members[f"{stream}.npy"] = codes.astype(_code_type(getattr(tokenizers, stream).bins))
    return members, _note(source, texts)


def planned_note(episode: Episode, tokenizers: Tokenizers) -> dict[str, Any]:
    """What the index will say of an episode, found without its pictures."""
    source = EpisodeTokens(episode, tokenizers)
    return _note(source, _texts(source))


def _texts(source: EpisodeTokens) -> dict[str, list[list[int]]]:
    """Codes of every phrasing of the text streams."""
    texts: dict[str, list[list[int]]] = {}
    for stream in TEXT_STREAMS:
        if stream in source.streams:
            variants = {"text": source.episode.texts, "plan": source.episode.plans}.get(stream, [""])
            texts[stream] = [source.text(stream, i).tolist() for i in range(len(variants))]
    return texts


def _note(source: EpisodeTokens, texts: dict[str, list[list[int]]]) -> dict[str, Any]:
    vectors = [stream for stream in source.streams if stream in VECTOR_STREAMS]
    robot = source.tokenizers.embodiments[source.embodiment] if source.embodiment is not None else None
    return {
        "id": source.episode.id,
        "length": len(source.episode),
        "rate_hz": source.rate_hz,
        "embodiment": source.embodiment,
        "streams": list(source.streams),
        "axes": {stream: len(robot.vectors[stream]) for stream in vectors} if robot else {},
        "text_tokens": {stream: [len(v) for v in variants] for stream, variants in texts.items()},
        "success": source.episode.success,
    }


def _code_type(codes: int) -> type:
    """The smallest type that holds every code."""
    return np.uint16 if codes <= 1 << 16 else np.uint32


class TokenizedEpisode:
    """One episode of a token shard, read when it is needed. Implements `TokenSource`."""

    def __init__(self, note: dict[str, Any], members: dict[str, Any], tokenizers: Tokenizers):
        self.id = note["id"]
        self.rate_hz = float(note["rate_hz"])
        self.embodiment = note["embodiment"]
        self.streams = note["streams"]
        self._length = int(note["length"])
        self._success = note["success"]
        self._members = members
        self._texts = members["json"]["texts"]
        self._progress = tokenizers.progress

    def __len__(self) -> int:
        return self._length

    @property
    def bytes(self) -> int:
        return sum(v.nbytes for v in self._members.values() if isinstance(v, np.ndarray))

    def _array(self, stream: str) -> np.ndarray:
        try:
            return self._members[f"{stream}.npy"]
        except KeyError:
            raise TaskError(f"episode {self.id!r} has no {stream!r}; it has {list(self.streams)}") from None

    def text(self, stream: str, variant: int) -> np.ndarray:
        variants = self._texts.get(stream)
        if not variants:
            raise TaskError(f"episode {self.id!r} has no {stream!r}; it has {list(self.streams)}")
        return np.asarray(variants[variant % len(variants)], dtype=np.int64)

    def vision(self, camera: str, start: int, stop: int) -> np.ndarray:
        return self._array(f"{IMAGE_PREFIX}{camera}")[start:stop]

    def vector(self, stream: str, start: int, stop: int) -> np.ndarray:
        return self._array(stream)[start:stop]

    def scalar(self, stream: str, step: int) -> int:
        return scalar_code(stream, step, len(self), self._success, self._progress)


class Kind(NamedTuple):
    """What, besides the task, decides the length of a sequence. Many episodes and phrasings share one.

    text_tokens: tokens of each text stream in this phrasing.
    """

    rate_hz: float
    embodiment: str | None
    streams: tuple[str, ...]
    axes: tuple[tuple[str, int], ...]
    text_tokens: tuple[tuple[str, int], ...]


class EpisodePlan:
    """What planning wants of the episodes of a source, in arrays: a mixture may have millions of them.

    ids, lengths int64 (E,) in steps; kinds; kind_ids int32 (V,), of every phrasing of every episode: those of
    episode e begin at first[e], int64 (E + 1,).
    """

    def __init__(self, notes: Iterable[dict[str, Any]]):
        self.ids: list[str] = []
        lengths: list[int] = []
        numbers: dict[Kind, int] = {}
        kind_ids: list[int] = []
        first = [0]
        for note in notes:
            self.ids.append(note["id"])
            lengths.append(note["length"])
            texts = {s: v for s, v in note["text_tokens"].items() if v}
            what = (float(note["rate_hz"]), note["embodiment"], tuple(note["streams"]), tuple(note["axes"].items()))
            for variant in range(_phrasings([len(v) for v in texts.values()])):
                kind = Kind(*what, tuple((s, v[variant % len(v)]) for s, v in texts.items()))
                kind_ids.append(numbers.setdefault(kind, len(numbers)))
            first.append(len(kind_ids))
        self.kinds = list(numbers)
        self.lengths = np.array(lengths, dtype=np.int64)
        self.kind_ids, self.first = np.array(kind_ids, dtype=np.int32), np.array(first, dtype=np.int64)

    def variants(self, episode: int) -> int:
        """How many phrasings an episode has, at least one."""
        return int(self.first[episode + 1] - self.first[episode])

    def kind(self, episode: int, variant: int = 0) -> int:
        return int(self.kind_ids[self.first[episode] + variant])


def _phrasings(counts: list[int]) -> int:
    """So many combinations of the texts of an episode are used: all, or where they are many each text at least once."""
    return min(int(np.lcm.reduce(counts)), max(256, *counts)) if counts else 1


class TokenShards:
    """The token shards of one source, with a bounded cache of opened episodes."""

    def __init__(self, directory: str | Path, tokenizers: Tokenizers, *, cache_bytes: int = CACHE_BYTES):
        """Raises: FingerprintError when the shards were made with other tokenizers."""
        self.reader = ShardReader(directory, kind="tokens")
        stored = self.reader.manifest
        theirs = dict(stored.get("tokenizers", {}))
        theirs |= {f"embodiment/{name}": print_ for name, print_ in stored.get("embodiments", {}).items()}
        tokenizers.require_fingerprints(theirs, what=str(directory))
        self.tokenizers = tokenizers
        try:
            self.plan = EpisodePlan(self.reader.note(i) for i in range(len(self.reader)))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"the index of {directory} lacks {error}", fix="tokenize again") from error
        self._cache: OrderedDict[int, TokenizedEpisode] = OrderedDict()
        self._cached = 0
        self._limit = cache_bytes
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> TokenizedEpisode:
        with self._lock:
            if index in self._cache:
                self._cache.move_to_end(index)
                return self._cache[index]
        try:
            episode = TokenizedEpisode(self.reader.note(index), self.reader.read(index), self.tokenizers)
        except (KeyError, TypeError) as error:
            raise DataError(f"{self.reader.directory}: sample {index} is damaged: {error}") from error
        with self._lock:
            self._cache[index] = episode
            self._cached += episode.bytes
            while self._cached > self._limit and len(self._cache) > 1:
                _, old = self._cache.popitem(last=False)
                self._cached -= old.bytes
        return episode
