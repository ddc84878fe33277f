"""Sources: any place that holds episodes, opened by what lies there, and named by what it holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from mmseq.data.changed import Successful
from mmseq.data.importing import BadEpisodes, EpisodeShardReader, open_episodes, survey
from mmseq.data.reader import EpisodeSource
from mmseq.data.shards import holds_shards
from mmseq.embodiment import Embodiment
from mmseq.errors import DataError
from mmseq.reading import AS_IT_IS, Reading
from mmseq.streams import TEXT, of_kind
from mmseq.tokenization.values import judged


def open_source(
    path: str | Path,
    reading: Reading = AS_IT_IS,
    *,
    rate_hz: float | None = None,
    embodiments: Mapping[str, Embodiment] | None = None,
) -> EpisodeSource:
    """Episode shards, a LeRobot dataset, HDF5 files or videos.

    reading: what the owner says of a dataset; shards have it since they were imported, save the outcome. embodiments:
    contracts to hold the data to, by name. A dataset is read by the contract of its robot's name; shards must have been
    written with the same one.
    Raises: DataError, EmbodimentError, or FingerprintError that names the fields that differ.
    """
    embodiments = embodiments or {}
    if holds_shards(path):
        if reading.map or reading.swap_colours:
            what = "map" if reading.map else "swap_colours"
            raise DataError(f"{path} holds shards, which {what} does not change", fix="give it when importing")
        reader = EpisodeShardReader(path)
        for name, robot in reader.embodiments.items():
            if name in embodiments:
                embodiments[name].require_same(robot, mine="the tokenizers", theirs=str(path))
        rates = {float(note["rate_hz"]) for note in reader.metadata}
        if rate_hz is not None and rates != {float(rate_hz)}:
            raise DataError(
                f"{path} holds episodes at {', '.join(f'{r:g}' for r in sorted(rates))} Hz, asked for {rate_hz:g}",
                fix="import it again with --rate-hz, or leave rate_hz out",
            )
        return Successful(reader) if reading.assume_success else reader  # type: ignore[return-value]
    open_as = partial(open_episodes, path, reading, rate_hz=rate_hz)
    source = open_as()
    robot = source.embodiment()
    if robot is not None and robot.name in embodiments and robot.fingerprint != embodiments[robot.name].fingerprint:
        source = open_as(embodiment=embodiments[robot.name])
    return source


class Budget(Protocol):
    """A source of a mix or a recipe, as far as its bad episodes go."""

    @property
    def path(self) -> str: ...
    @property
    def skip_bad(self) -> int: ...


def bad_episodes(source: EpisodeSource, config: Budget, where: str, say: Callable[[str], None]) -> BadEpisodes:
    """The episodes of a source that are bad, found as `mmseq data import` finds them; of shards none.

    Raises: DataError for more than `config.skip_bad`, all named, or a budget for shards.
    """
    if config.skip_bad < 0:
        raise DataError(f"{where}: skip_bad is {config.skip_bad}", fix="give how many bad episodes may be left out")
    if hasattr(source, "embodiments"):
        if config.skip_bad:
            raise DataError(f"{where} is shards, which hold no bad episodes", fix="give --skip-bad when importing")
        return BadEpisodes(len(source), 0, where, say)
    return survey(source, source.embodiment(), config.skip_bad, where, say, how="skip_bad: {count} in the source")[1]


def embodiments_of(source: EpisodeSource) -> list[Embodiment]:
    """Every contract that a source's episodes refer to."""
    if hasattr(source, "embodiments"):  # shards may hold several
        return list(source.embodiments.values())  # type: ignore[union-attr]
    robot = source.embodiment()
    return [robot] if robot is not None else []


def source_identity(path: str | Path, reading: Reading = AS_IT_IS, *, rate_hz: float | None = None) -> dict[str, Any]:
    """What changes when the data does: the manifest of shards, else how it is read, and the files, sizes and times."""
    path = Path(path)
    how = list(reading.said().values())
    if holds_shards(path):
        data = (path / "manifest.json").read_bytes() + (json.dumps(how).encode() if how else b"")
    else:
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        seen = [(p.relative_to(path).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        data = json.dumps([seen, *how] if how else seen).encode()
    return {"path": str(path), "rate_hz": rate_hz, "sha256": hashlib.sha256(data).hexdigest()}


def streams_of(notes: Iterable[Mapping[str, Any]]) -> list[str]:
    """Every stream that some episode has, of what an index of shards says of each."""
    found: set[str] = set()
    for note in notes:
        found |= {*note["streams"], *note.get("spans", ()), *judged(note["success"])}
        found |= {stream for stream in of_kind(TEXT) if note.get(f"{stream}s")}
    return sorted(found)
