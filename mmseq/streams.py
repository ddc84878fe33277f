"""The table of streams: what arrows may name, and where each comes from.

A stream is one row. Its kind says how long it is (here), and how it is tokenized, decoded, measured and drawn
(`tokenization/values.py`); its range is the tokenizer in whose part of the vocabulary its codes lie. A name that stands
in no row is a further vector stream that a robot's contract declares (`force`, `tactile`, ...): its range has its name.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

IMAGE_PREFIX = "image."  # of the streams of an episode: image.<camera>
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MISSPELT = 0.75  # so similar to a known name (difflib's ratio), an unknown one is a typing error


@dataclass(frozen=True)
class Kind:
    """What streams have in common.

    shape: of a segment's codes (of one camera), given its steps, the tokens of a frame and the axes of the robot; None
    where a segment has the length that its text has. cameras: it has a segment for each camera.
    """

    name: str
    shape: Callable[[int, int, int], tuple[int, ...] | None]
    cameras: bool = False


TEXT = Kind("text", lambda steps, frame, axes: None)
VISION = Kind("vision", lambda steps, frame, axes: (steps, frame), cameras=True)
VECTOR = Kind("vector", lambda steps, frame, axes: (steps, axes))
SCALAR = Kind("scalar", lambda steps, frame, axes: (1,))  # a number of 0 to 1
OUTCOME = Kind("outcome", lambda steps, frame, axes: (1,))  # yes or no
LATENT = Kind("latent", lambda steps, frame, axes: (1,))


@dataclass(frozen=True, kw_only=True)
class StreamRow:
    """One stream.

    range: of the vocabulary. timed: it lies at steps of the episode, so that it takes an offset. length: whether it
    takes one. clock: where it lies; `observed`: what is given ends with now, and what is predicted with a length
    follows it; `commanded`: it begins with now. predicted: whether the model may write it. wire: its key in an
    observation. column: in a LeRobot dataset. header: `first` for those whose header tokens every vocabulary has at the
    same ids, `spare` for those that came later.
    """

    name: str
    kind: Kind
    range: str
    timed: bool = True
    length: Literal["no", "may", "must"] = "no"
    clock: Literal["observed", "commanded"] = "observed"
    predicted: bool = True
    wire: str | None = None
    column: str | None = None
    header: Literal["first", "spare"] = "first"


_ROWS = (  # in the order of their header tokens, which checkpoints rely on
    StreamRow(name="text", kind=TEXT, range="text", timed=False, wire="prompt", column="task"),
    StreamRow(name="plan", kind=TEXT, range="text", timed=False, wire="plan", column="subtask"),
    StreamRow(name="question", kind=TEXT, range="text", timed=False, wire="question"),
    StreamRow(name="answer", kind=TEXT, range="text", timed=False),
    StreamRow(name="image", kind=VISION, range="vision", wire="observation.images.", column="observation.images."),
    StreamRow(name="video", kind=VISION, range="vision", length="must", wire="observation.images."),
    StreamRow(
        name="demo", kind=VISION, range="vision", timed=False, length="must", predicted=False, wire="demo.images."
    ),
    StreamRow(
        name="proprio",
        kind=VECTOR,
        range="proprio",
        length="may",
        wire="observation.state",
        column="observation.state",
    ),
    StreamRow(
        name="action",
        kind=VECTOR,
        range="action",
        length="must",
        clock="commanded",
        wire="action",
        column="action",
    ),
    StreamRow(name="progress", kind=SCALAR, range="progress"),
    StreamRow(name="success", kind=OUTCOME, range="success", column="next.success"),
    StreamRow(name="latent", kind=LATENT, range="latent"),
    # what a hand and a gripper have in common, from now on
    StreamRow(
        name="motion",
        kind=VECTOR,
        range="motion",
        length="may",
        clock="commanded",
        wire="motion",
        column="motion",
        header="spare",
    ),
)
STREAMS = {row.name: row for row in _ROWS}

# The vectors that every contract has a field for; further ones are declared.
OWN_VECTORS = tuple(row.name for row in STREAMS.values() if row.kind is VECTOR and row.header == "first")
# The ranges of every vocabulary in their order, and how many ids those have that belong to no tokenizer.
RANGE_ORDER = ("text", "structure", "embodiment", "vision", "action", "proprio", "latent", "progress", "success")
RESERVED_IDS = {"structure": 256, "embodiment": 64, "latent": 256, "success": 2}


def stream_row(name: str) -> StreamRow:
    """The row of a stream; of a name that no row has, that of a vector stream which a contract declares."""
    found = STREAMS.get(name)
    if found is not None:
        return found
    key = f"observation.{name}"
    return StreamRow(name=name, kind=VECTOR, range=name, length="may", wire=key, column=key, header="spare")


def row_of(key: str) -> StreamRow:
    """The row of a stream of an episode, where cameras are streams of their own: `image.front`."""
    return STREAMS["image"] if key.startswith(IMAGE_PREFIX) else stream_row(key)


def misspelt(name: str) -> str | None:
    """The known stream that an unknown name was probably meant to be."""
    if name in STREAMS:
        return None
    return next(iter(difflib.get_close_matches(name, STREAMS, n=1, cutoff=_MISSPELT)), None)


def lacking(missing: Sequence[str], there: Iterable[str]) -> str:
    """Streams that are not there, with the one that was probably meant and what there is, for messages.

    `forse (did you mean 'force'? There is action, force, image.front)`
    """
    there = sorted(set(there))
    close = lambda name: [] if name in STREAMS else difflib.get_close_matches(name, there, n=1, cutoff=_MISSPELT)
    meant = dict.fromkeys(found for name in missing for found in close(name))
    hint = f"did you mean {', '.join(map(repr, meant))}? There" if meant else "there"
    return f"{', '.join(missing)} ({hint} is {', '.join(there) or 'nothing'})"


def kind_of_range(name: str) -> Kind:
    """The kind of the streams whose codes lie in a range."""
    return next((row.kind for row in STREAMS.values() if row.range == name), VECTOR)


def of_kind(kind: Kind) -> tuple[str, ...]:
    """The names of the table's streams of one kind, in order."""
    return tuple(name for name, row in STREAMS.items() if row.kind is kind)
