"""Token shards: episodes whose streams are tokenizer codes. Vision is tokenized once, not every epoch.

One sample is one episode: `<key>.json` (texts as codes, success) and `<key>.<stream>.npy` per stream.
The index carries what packing needs (lengths in steps and tokens), so a plan never opens a tar.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmseq.data.shards import ShardReader, ShardWriter
from mmseq.episode import Episode
from mmseq.errors import DataError, TaskError
from mmseq.streams import IMAGE_PREFIX, TEXT, VISION, row_of
from mmseq.tokenization.bundle import EpisodeTokens, Tokenizers
from mmseq.tokenization.values import scalar_codes

FEATURES = "features."  # of the members that hold what an encoder gives of a camera, float16
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
    attempt: Callable[[int, Callable[[], None]], None] = lambda _, work: work(),
    on_progress: Callable[[int, int | None], None] | None = None,
) -> dict[str, Any]:
    """Tokenize every stream of every episode into shards; returns their manifest.

    source: what identifies the data that was read; kept in the manifest. total: of episodes, for
    on_progress(done, total). attempt(n, work): does the work on the n-th episode, or leaves it out when that fails.
    """
    manifest = {"kind": "tokens", "name": name, "source": source, **token_fingerprints(tokenizers)}
    with ShardWriter(directory, manifest, overwrite=overwrite) as writer:
        for index, episode in enumerate(episodes):
            if episode.embodiment is not None:
                tokenizers.embodiment(episode.embodiment)  # a robot without a contract is an error, not a video
            attempt(index, partial(_write_one, writer, index, episode, tokenizers))
            if on_progress is not None:
                on_progress(index + 1, total)
        return writer.close()


def _write_one(writer: ShardWriter, index: int, episode: Episode, tokenizers: Tokenizers) -> None:
    members, note = _tokenize(episode, tokenizers)
    writer.add(f"{index:08d}", members, metadata=note)


def token_fingerprints(tokenizers: Tokenizers) -> dict[str, dict[str, str]]:
    """`tokenizers` and `embodiments` of a manifest of token shards."""
    fingerprints = tokenizers.fingerprints()
    return {
        "tokenizers": {k: v for k, v in fingerprints.items() if not k.startswith("embodiment/")},
        "embodiments": {e.name: e.fingerprint for e in tokenizers.embodiments.values()},
    }


def _tokenize(episode: Episode, tokenizers: Tokenizers) -> tuple[dict[str, Any], dict[str, Any]]:
    source = EpisodeTokens(episode, tokenizers)
    note, texts = _note_and_texts(source)
    members: dict[str, Any] = {"json": {"id": episode.id, **texts}}
    for stream in (s for s in source.streams if s in episode):
        row = row_of(stream)
        codes = source.codes(stream, 0, len(episode))
        members[f"{stream}.npy"] = codes.astype(_code_type(tokenizers[row.range].size))
        if row.kind is VISION and tokenizers.encoder is not None:
            camera = stream.removeprefix(IMAGE_PREFIX)
            members[f"{FEATURES}{camera}.npy"] = source.features(camera, 0, len(episode)).astype(np.float16)
    return members, note


def planned_note(episode: Episode, tokenizers: Tokenizers) -> dict[str, Any]:
    """What the index will say of an episode, found without its pictures."""
    return _note_and_texts(EpisodeTokens(episode, tokenizers))[0]


def _note_and_texts(source: EpisodeTokens) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the index says of an episode, and the codes of its texts; where these change, of each piece."""
    episode = source.episode
    pieces = [
        {"start": start, "stop": stop, "texts": {s: _phrasings(source, s, start, len(t)) for s, t in texts.items()}}
        for start, stop, texts in episode.pieces()
    ]
    count = lambda found: {stream: [len(codes) for codes in variants] for stream, variants in found.items()}
    note = {
        "id": episode.id,
        "length": len(episode),
        "rate_hz": episode.rate_hz,
        "embodiment": source.embodiment,
        "streams": list(source.streams),
        "axes": {stream: len(axes) for stream in source.streams if (axes := source.axes(stream)) is not None},
        "text_tokens": count(pieces[0]["texts"]),
        "success": episode.success,
    }
    if len(pieces) == 1:
        return note, {"texts": pieces[0]["texts"]}
    note["pieces"] = [{**piece, "texts": count(piece["texts"])} for piece in pieces]
    return note, {"texts": pieces[0]["texts"], "pieces": pieces}


def _phrasings(source: EpisodeTokens, stream: str, step: int, count: int) -> list[list[int]]:
    return [source.codes(stream, step, step + 1, variant).tolist() for variant in range(count)]


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
        head = members["json"]
        self._pieces = head.get("pieces") or [{"start": 0, "stop": self._length, "texts": head["texts"]}]
        self._tokenizers = tokenizers

    def __len__(self) -> int:
        return self._length

    @property
    def bytes(self) -> int:
        return sum(v.nbytes for v in self._members.values() if isinstance(v, np.ndarray))

    def codes(self, stream: str, start: int, stop: int, variant: int = 0) -> np.ndarray:
        array = self._members.get(f"{stream}.npy")
        if array is not None:
            return array[start:stop]
        if stream not in self.streams:
            raise TaskError(f"episode {self.id!r} has no {stream!r}; it has {list(self.streams)}")
        if row_of(stream).kind is not TEXT:
            return scalar_codes(self._tokenizers, stream, start, stop, len(self), self._success)
        texts = next(piece["texts"] for piece in self._pieces if piece["start"] <= start < piece["stop"])
        variants = texts.get(stream)
        if not variants:
            raise TaskError(f"episode {self.id!r} has no {stream!r} at step {start}")
        return np.asarray(variants[variant % len(variants)], dtype=np.int64)

    def demonstration(self) -> TokenizedEpisode:
        return self

    def features(self, camera: str, start: int, stop: int) -> np.ndarray:
        return self._members[f"{FEATURES}{camera}.npy"][start:stop].astype(np.float32)


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

    ids, lengths int64 (E,) in steps. An episode whose texts change on the way has several pieces, others have one:
    episodes int32 (P,), of each piece, starts and stops int64 (P,), its steps; of_episode int64 (E + 1,), where the
    pieces of each begin. kinds; kind_ids int32 (V,), of every phrasing of every piece: those of piece p begin at
    first[p], int64 (P + 1,).
    """

    def __init__(self, notes: Iterable[dict[str, Any]]):
        self.ids: list[str] = []
        lengths, episodes, starts, stops, kind_ids, first, of_episode = [], [], [], [], [], [0], [0]
        numbers: dict[Kind, int] = {}
        for note in notes:
            rate, robot, axes = float(note["rate_hz"]), note["embodiment"], tuple(note["axes"].items())
            whole = {"start": 0, "stop": note["length"], "texts": note["text_tokens"]}
            for piece in note.get("pieces") or [whole]:
                texts = {s: v for s, v in piece["texts"].items() if v}
                streams = tuple(s for s in note["streams"] if row_of(s).kind is not TEXT or s in texts)
                for variant in range(_combinations([len(v) for v in texts.values()])):
                    kind = Kind(rate, robot, streams, axes, tuple((s, v[variant % len(v)]) for s, v in texts.items()))
                    kind_ids.append(numbers.setdefault(kind, len(numbers)))
                first.append(len(kind_ids))
                episodes.append(len(self.ids))
                starts.append(piece["start"])
                stops.append(piece["stop"])
            self.ids.append(note["id"])
            lengths.append(note["length"])
            of_episode.append(len(episodes))
        self.kinds = list(numbers)
        as_int64 = lambda values: np.array(values, dtype=np.int64)
        self.lengths, self.starts, self.stops = as_int64(lengths), as_int64(starts), as_int64(stops)
        self.first, self.of_episode = as_int64(first), as_int64(of_episode)
        self.episodes, self.kind_ids = np.array(episodes, dtype=np.int32), np.array(kind_ids, dtype=np.int32)

    def pieces_of(self, episodes: Sequence[int]) -> np.ndarray:
        """The pieces of some episodes, in order."""
        members = np.asarray(episodes, dtype=np.int64)
        starts, counts = self.of_episode[members], np.diff(self.of_episode)[members]
        return np.repeat(starts, counts) + np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)

    def variants(self, piece: int) -> int:
        """How many phrasings a piece has, at least one."""
        return int(self.first[piece + 1] - self.first[piece])

    def kind(self, piece: int, variant: int = 0) -> int:
        return int(self.kind_ids[self.first[piece] + variant])

    def robot(self, episode: int) -> str | None:
        """The name of the embodiment of an episode."""
        return self.kinds[self.kind(int(self.of_episode[episode]))].embodiment


def _combinations(counts: list[int]) -> int:
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
