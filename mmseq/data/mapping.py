"""Mapping: which columns of a dataset fill which streams, where its names are not the usual ones.

    --map action=actions,proprio=joint_position+gripper_position,image.front=rgb,force=observation.ft_sensor
    --map hand=observation.state[14:26]       numbers 14 to 25 of a vector
    --map names.yaml                          the same as YAML: {action: actions, proprio: [a, b], image: {front: rgb}}

A reader lists its `Column`s and what it takes by itself; `fill` lays what the owner says over that, and `left_out`
names every column that is still unused, with the option that would take it. `image.left=` (nothing) leaves one out.

    self.streams = fill(found, map, columns, str(path))       # map: what `read_map` gave, an argument of every reader
    self.left_out = left_out(columns, self.streams)           # goes into the manifest of the shards
    self.notes = describe(columns, self.left_out)             # goes to the console; a reader adds its own remarks
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mmseq.episode import IMAGE_PREFIX
from mmseq.errors import ConfigError, DataError, did_you_mean
from mmseq.streams import OUTCOME, STREAMS, TEXT, VECTOR, VISION, row_of

type Streams = dict[str, tuple[str, ...]]  # a stream, and the columns that fill it, joined in this order

KINDS = ("picture", "vector", "text", "flag", "depth", "other")
_OF_KIND = {VISION.name: "picture", VECTOR.name: "vector", TEXT.name: "text", OUTCOME.name: "flag"}
_CAMERA = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_VECTOR = re.compile(r"[a-z][a-z0-9_]{0,39}")
_FORM = "write STREAM=COLUMN, such as action=actions or proprio=joints+gripper, or name a YAML file"


@dataclass(frozen=True)
class Column:
    """One column of a dataset. kind: one of KINDS; a flag is one number or truth value per step. detail: its form."""

    kind: str
    detail: str = ""


class Slice(str):
    """The name of a column of which numbers start .. stop - 1 are taken; equal to that, so that it is found by it."""

    start: int = 0
    stop: int | None = None

    @property
    def said(self) -> str:
        """As a map writes it."""
        return f"{self}[{self.start or ''}:{'' if self.stop is None else self.stop}]"


_SLICE = re.compile(r"(?P<column>.+)\[(?P<start>\d*):(?P<stop>\d*)\]")


def taken(name: str, width: int) -> slice:
    """Which numbers of a column that has `width` fill a stream. Raises: DataError when it has not so many."""
    if not isinstance(name, Slice):
        return slice(0, width)
    stop = width if name.stop is None else name.stop
    if not name.start < stop <= width:
        raise DataError(f"the map takes {name.said}, and {name!s} has {width} numbers", fix="take as many as there are")
    return slice(name.start, stop)


def base_of(name: str, columns: Collection[str]) -> str:
    """The column that a map's entry names, whole or a slice of it."""
    found = None if name in columns else _SLICE.fullmatch(name)
    return found["column"] if found else name


def _column(name: str, columns: Mapping[str, Column], stream: str, where: str) -> str:
    """The column that a map names, or a slice of it. Raises: DataError."""
    found = None if name in columns else _SLICE.fullmatch(name)
    column = base_of(name, columns)
    if column not in columns:
        raise DataError(f"{where}: the map names the column {column!r}: {did_you_mean(column, columns)}")
    if found is None:
        return name
    part = Slice(column)
    part.start, part.stop = int(found["start"] or 0), int(found["stop"]) if found["stop"] else None
    if columns[column].kind != "vector" or kind_of(stream) != "vector":
        raise DataError(f"{where}: the map takes {name} for {stream}", fix="take a part of a vector, for a vector")
    if part.stop is not None and part.start >= part.stop:
        raise DataError(f"{where}: {name} of the map takes nothing", fix=f"write {column}[0:3] for the first three")
    return part


def read_map(given: str | Mapping[str, Any] | None) -> Streams:
    """What `--map` or the `map:` of a source says. Raises: ConfigError naming the part that is wrong."""
    if given is None:
        return {}
    if isinstance(given, str) and "=" not in given and given.strip():
        try:
            given = yaml.safe_load(Path(given).read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read the map {given!r}: {error}", fix=_FORM) from error
    if isinstance(given, str):
        parts = [part.partition("=") for part in given.split(",") if part.strip()]
        if missing := [name for name, equals, _ in parts if not equals]:
            raise ConfigError(f"--map: {missing[0]!r} names no column", fix=_FORM)
        names = [name.strip() for name, _, _ in parts]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"--map names {twice[0]!r} twice", fix=f"join its columns: {twice[0]}=COLUMN+COLUMN")
        given = dict(zip(names, (columns for _, _, columns in parts)))
    if not isinstance(given, Mapping):
        raise ConfigError(f"the map holds {given!r:.80}", fix=_FORM)
    return dict(_entry(name, columns) for name, columns in _flat(given))


def _flat(given: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """`image: {front: rgb}` is `image.front: rgb`."""
    found: list[tuple[str, Any]] = []
    for name, value in given.items():
        found += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
    return found


# The streams of the table that a column may fill, cameras aside.
_TARGETS = [row.name for row in STREAMS.values() if row.kind is VECTOR or (row.column and row.kind is not VISION)]


def _entry(stream: str, columns: Any) -> tuple[str, tuple[str, ...]]:
    if columns is None:
        columns = ""
    names = columns.split("+") if isinstance(columns, str) else columns
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"the map gives {stream} {columns!r:.80}", fix="name a column, or several as a+b or [a, b]")
    names = tuple(name.strip() for name in names if name.strip())
    camera = stream.removeprefix(IMAGE_PREFIX)
    if stream == "image" or (stream.startswith(IMAGE_PREFIX) and not _CAMERA.fullmatch(camera)):
        raise ConfigError(f"the map has {stream!r}", fix="name the camera: image.NAME, of letters, digits, '_' and '-'")
    known = stream.startswith(IMAGE_PREFIX) or stream in _TARGETS
    if not known and (stream in STREAMS or not _VECTOR.fullmatch(stream)):
        raise ConfigError(
            f"the map fills {stream!r}, which no column can",
            fix=f"fill image.NAME, {', '.join(_TARGETS)} or a vector stream of your own, as force",
        )
    if len(names) > 1 and kind_of(stream) != "vector":
        raise ConfigError(f"the map joins {'+'.join(names)} to {stream}", fix="only vectors can be joined")
    return stream, names


def kind_of(stream: str) -> str:
    """The kind of column that a stream takes."""
    return _OF_KIND.get(row_of(stream).kind.name, "other")


def fill(found: Streams, given: Streams, columns: Mapping[str, Column], where: str) -> Streams:
    """What fills each stream: what the reader found by itself, with what the owner says laid over it.

    A camera's column that is given another name leaves the one it had; a vector may fill several streams.
    Raises: DataError naming a column that is not there, or not of the kind that the stream takes, or a stream that is
    left out though nothing fills it.
    """
    given = {s: tuple(_column(name, columns, s, where) for name in names) for s, names in given.items()}
    for stream, names in given.items():
        if not names and stream not in found:
            raise DataError(
                f"{where}: the map leaves out {stream!r}, which nothing fills",
                fix=f"name its column, {stream}=COLUMN, or leave out one of {', '.join(found) or 'none'}",
            )
        kind = kind_of(stream)
        for name in names:
            if columns[name].kind != kind and not (kind == "vector" and columns[name].kind == "flag"):
                article = {"picture": "pictures", "vector": "numbers", "text": "a text", "flag": "a truth value"}[kind]
                raise DataError(
                    f"{where}: the map fills {stream} from {name!r}, which is {columns[name].detail or 'of no use'}",
                    fix=f"name a column that holds {article}",
                )
    renamed = {name for stream, names in given.items() if kind_of(stream) == "picture" for name in names}
    kept = {s: names for s, names in found.items() if not (kind_of(s) == "picture" and renamed & set(names))}
    return {stream: names for stream, names in (kept | given).items() if names}


def left_out(columns: Mapping[str, Column], streams: Streams) -> dict[str, str]:
    """Every column that fills no stream, with the entry of `--map` that would make use of it, or "" for none."""
    used = {name for names in streams.values() for name in names}
    return {name: _advice(name, column, streams) for name, column in columns.items() if name not in used}


def describe(columns: Mapping[str, Column], unused: Mapping[str, str]) -> list[str]:
    """What is left out, as notes for people: one for each kind of column."""
    notes = []
    for kind, what in zip(KINDS, ("cameras", "vectors", "texts", "flags", "depth cameras", "others")):
        names = [name for name in unused if columns[name].kind == kind]
        if names:
            listed = ", ".join(f"{n} ({columns[n].detail})" if columns[n].detail else n for n in names)
            advice = [unused[name] for name in names if unused[name]]
            example = f"; to use: --map {','.join(advice[:4])}" if advice else ""
            notes.append(f"left out, {what}: {listed}{example}")
    return notes


def _advice(name: str, column: Column, streams: Streams) -> str:
    """The entry that a person would most likely want."""
    last = re.sub(r"[^A-Za-z0-9_-]+", "_", name.rpartition(".")[2].rpartition("/")[2]).strip("_-") or "x"
    if column.kind == "picture":
        taken = f"image.{last}" in streams
        return f"image.{re.sub(r'[^A-Za-z0-9_-]+', '_', name) if taken else last}={name}"
    if column.kind == "vector":
        of = "action" if "action" in name.lower() else "proprio"
        if of not in streams and (of == "action" or re.search(r"state|pos|joint|proprio", name.lower())):
            return f"{of}={name}"
        if of == "action":
            return f"action={'+'.join((*streams['action'], name))}"
        own = re.sub(r"^[^a-z]+", "", last.lower().replace("-", "_")) or "vector"
        return f"{own if own not in STREAMS and own not in streams else f'{own}_2'}={name}"
    if column.kind == "text":
        return f"{'plan' if 'subtask' in name.lower() or 'plan' in name.lower() else 'text'}={name}"
    return f"success={name}" if column.kind == "flag" and "success" in name.lower() else ""
