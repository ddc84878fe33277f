"""Task: the parsed arrow. `text, image, proprio -> action[16]` says what is given and what is predicted.

    segment   stream[.camera][[length]][@offset]       image.wrist  action[16]  video[0.4s]  image@+16  image@end
    group     (segment, ... -> segment, ...) * n       the same segments again, each one time step later

Lengths and offsets are control steps, or seconds with an `s`. Everything is placed relative to
one moment, "now" (step t of the episode):

- a stream without length is what is observed at now; `@+n` moves it n steps into the future;
- a *given* `video[n]` is the past: the n frames that end with now; a *predicted* one is the
  future: the n frames after now;
- `action[n]` are the commands of the n steps that begin at now;
- a group advances now by its action length each time.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from decimal import Decimal

from mmseq.errors import TaskError, did_you_mean

ALIASES: dict[str, str] = {
    "policy": "text, image, proprio -> action[16]",
    "forward_dynamics": "image, action[16] -> image@+16",
    "inverse_dynamics": "image, image@+16 -> action[16]",
    "video_prediction": "text, image -> video[8]",
    "subgoal": "text, image -> image@+16",
    "goal_policy": "image, proprio, image@+16 -> action[16]",
    "chain": "text, image, proprio -> plan, image@+16, action[16]",
    "caption": "video[8] -> text",
    "question": "video[8], question -> answer",
    "plan": "text, image -> plan",
    "value": "text, image -> progress",
    "success": "text, video[8] -> success",
    "latent_action": "image, image@+16 -> latent",
    "latent_policy": "text, image -> latent",
    "latent_decoder": "image, proprio, latent -> action[16]",
    "imitation": "demo[8], image, proprio -> action[16]",
    "history": "text, (image, proprio -> action[1]) * 8",
    "language": "-> text",
}

TEXT_STREAMS = ("text", "plan", "question", "answer")
VISION_STREAMS = ("image", "video", "demo")
VECTOR_STREAMS = ("proprio", "action")
SCALAR_STREAMS = ("progress", "success")
STREAMS = (*TEXT_STREAMS, *VISION_STREAMS, *VECTOR_STREAMS, *SCALAR_STREAMS, "latent")
NEEDS_LENGTH = ("video", "demo", "action")

MAX_STEPS = 4096  # a longer segment is a typing error, not a task
MAX_REPEATS = 256


@dataclass(frozen=True)
class Duration:
    """A length of time: control steps, or seconds when `seconds` is true."""

    value: float
    seconds: bool = False

    def steps(self, rate_hz: float) -> int:
        return max(1, round(self.value * rate_hz)) if self.seconds else int(self.value)

    def __str__(self) -> str:
        return f"{format(Decimal(repr(self.value)).normalize(), 'f')}s" if self.seconds else f"{int(self.value)}"


END = "end"


@dataclass(frozen=True)
class Segment:
    """One stream in an arrow. `repeat` counts its group's repetitions so far (0 outside a group)."""

    stream: str
    predicted: bool
    camera: str | None = None
    length: Duration | None = None
    offset: Duration | str | None = None
    repeat: int = 0

    def __str__(self) -> str:
        text = self.stream + (f".{self.camera}" if self.camera else "")
        if self.length:
            text += f"[{self.length}]"
        if self.offset == END:
            text += "@end"
        elif self.offset is not None:
            text += f"@+{self.offset}"
        return text


@dataclass(frozen=True)
class Group:
    """Segments that repeat, each time one action length later."""

    segments: tuple[Segment, ...]
    count: int


@dataclass(frozen=True)
class PlacedSegment:
    """A segment in steps of one episode's clock, relative to now.

    start, stop: first step and one past the last; both None for streams without a time (text) and
    for `@end`. predicted: whether the model writes it.
    """

    segment: Segment
    start: int | None
    stop: int | None

    @property
    def stream(self) -> str:
        return self.segment.stream

    @property
    def predicted(self) -> bool:
        return self.segment.predicted


@dataclass(frozen=True)
class Task:
    """A parsed arrow. Equal arrows are equal tasks, whatever their spacing or name."""

    parts: tuple[Segment | Group, ...]

    @classmethod
    def parse(cls, text: str) -> Task:
        """Parse an arrow or the name of a built-in one.

        Raises: TaskError that shows the place, when the text is not a task.
        """
        if not isinstance(text, str):
            raise TaskError(f"a task is a line of text, got {type(text).__name__}")
        return cls(_Parser(ALIASES.get(text.strip(), text)).parse())

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Every segment in order, groups written out."""
        out: list[Segment] = []
        for part in self.parts:
            if isinstance(part, Segment):
                out.append(part)
            else:
                out.extend(replace(s, repeat=i) for i in range(part.count) for s in part.segments)
        return tuple(out)

    @property
    def given(self) -> tuple[Segment, ...]:
        return tuple(s for s in self.segments if not s.predicted)

    @property
    def predicted(self) -> tuple[Segment, ...]:
        return tuple(s for s in self.segments if s.predicted)

    @property
    def final_chunk(self) -> Segment | None:
        """The chunk of actions that the task ends with, outside a group; None when it ends otherwise."""
        last = self.parts[-1]
        return last if isinstance(last, Segment) and last.predicted and last.stream == "action" else None

    @property
    def alias(self) -> str | None:
        """The built-in name of an arrow with this shape, lengths and offsets aside."""
        return next((name for name, arrow in ALIASES.items() if _shape(Task.parse(arrow)) == _shape(self)), None)

    def __str__(self) -> str:
        def side(segments: tuple[Segment, ...]) -> str:
            given = ", ".join(str(s) for s in segments if not s.predicted)
            predicted = ", ".join(str(s) for s in segments if s.predicted)
            return (f"{given} -> {predicted}" if given else f"-> {predicted}") if predicted else given

        if all(isinstance(part, Segment) for part in self.parts):
            return side(tuple(p for p in self.parts if isinstance(p, Segment)))
        items = [str(p) if isinstance(p, Segment) else f"({side(p.segments)}) * {p.count}" for p in self.parts]
        return ", ".join(items)

    def place(self, rate_hz: float) -> tuple[PlacedSegment, ...]:
        """Where each segment lies relative to now, in steps of a clock of `rate_hz`."""
        stride = self._group_stride(rate_hz)
        placed = []
        for segment in self.segments:
            now = segment.repeat * stride
            if segment.stream in TEXT_STREAMS or segment.stream == "demo" or segment.offset == END:
                placed.append(PlacedSegment(segment, None, None))
                continue
            length = segment.length.steps(rate_hz) if segment.length else 1
            shift = segment.offset.steps(rate_hz) if isinstance(segment.offset, Duration) else 0
            start = now + shift
            if segment.stream in ("video", "success"):
                start += 1 if segment.predicted and segment.stream == "video" else 1 - length
            placed.append(PlacedSegment(segment, start, start + length))
        return tuple(placed)

    def _group_stride(self, rate_hz: float) -> int:
        lengths = [
            s.length.steps(rate_hz)
            for part in self.parts
            if isinstance(part, Group)
            for s in part.segments
            if s.stream == "action" and s.length
        ]
        return max(lengths, default=1)

    def moments(self, length: int, rate_hz: float, *, pad: bool = False) -> range:
        """The steps t of an episode of `length` steps at which every segment lies inside it.

        pad: of a chunk of actions that the task ends with, the first step is enough (`SequenceBuilder.build`).
        """
        timed = [(p, p.start, p.stop) for p in self.place(rate_hz) if p.start is not None and p.stop is not None]
        stops = [start + 1 if pad and p.segment is self.final_chunk else stop for p, start, stop in timed]
        first = max((-start for _, start, _ in timed), default=0)
        last = length - max(stops, default=1)
        return range(max(0, first), last + 1)

    def missing(self, streams: Collection[str], *, given_only: bool = False) -> list[str]:
        """What an episode with `streams` lacks for this task (`image` is there with any camera).

        given_only: a prediction needs no truth, so only the given side is asked for.
        """
        images = [name for name in streams if name.startswith("image.")]
        lacking = []
        for segment in self.given if given_only else self.segments:
            if segment.stream in VISION_STREAMS:
                wanted = f"image.{segment.camera}" if segment.camera else "image"
                present = wanted in streams if segment.camera else bool(images)
            else:
                wanted, present = segment.stream, segment.stream in streams
            if not present and wanted not in lacking:
                lacking.append(wanted)
        return lacking


def _shape(task: Task) -> tuple:
    return tuple(
        (s.stream, s.camera, s.predicted, s.offset if s.offset in (None, END) else "+", s.repeat) for s in task.segments
    )


def parse_offset(text: str) -> Duration | str:
    """What follows the `@` of a segment: `+16`, `+0.8s` or `end`. Raises: TaskError."""
    parser = _Parser(text)
    offset = parser.offset()
    if parser.peek is not None:
        parser._fail(f"unexpected {parser.peek!r}", None, "write +16, +0.8s or end")
    return offset


_TOKEN = re.compile(r"\s*(->|\*|,|\(|\)|\[|\]|@|\+|\.(?=[A-Za-z_])|[A-Za-z_][A-Za-z0-9_]*|\d+(?:\.\d+)?s?)")


class _Parser:
    def __init__(self, text: str):
        self.text = text
        self.tokens: list[tuple[str, int]] = []
        at = 0
        while text[at:].strip():
            match = _TOKEN.match(text, at)
            if not match:
                start = at + len(text[at:]) - len(text[at:].lstrip())
                self._fail(f"unexpected {text[start]!r}", start)
            self.tokens.append((match[1], match.start(1)))
            at = match.end()
        self.i = 0

    def _fail(self, message: str, at: int | None = None, fix: str | None = None):
        if at is None:
            at = self.tokens[self.i][1] if self.i < len(self.tokens) else len(self.text)
        raise TaskError(
            f"task {self.text!r}, column {at + 1}: {message}",
            fix=fix or "write it like 'text, image, proprio -> action[16]'",
        )

    @property
    def peek(self) -> str | None:
        return self.tokens[self.i][0] if self.i < len(self.tokens) else None

    def take(self, expected: str | None = None) -> str:
        token = self.peek
        if token is None or (expected is not None and token != expected):
            self._fail(f"expected {expected or 'more'!r}, found {token if token is not None else 'the end'!r}")
        self.i += 1
        return token  # type: ignore[return-value]

    def parse(self) -> tuple[Segment | Group, ...]:
        parts = self.items(inside_group=False)
        if self.peek is not None:
            self._fail(f"unexpected {self.peek!r}")
        segments = [s for p in parts for s in ([p] if isinstance(p, Segment) else p.segments)]
        if not any(s.predicted for s in segments):
            self._fail("nothing is predicted", 0, "put an arrow '->' before what the model shall predict")
        return parts

    def items(self, *, inside_group: bool) -> tuple[Segment | Group, ...]:
        parts: list[Segment | Group] = []
        predicted = False
        if self.peek == "->":
            self.take()
            predicted = True
        while True:
            if self.peek == "(":
                if inside_group:
                    self._fail("a group inside a group")
                if predicted:
                    self._fail("a group after the arrow: its own arrow says what it predicts")
                if any(isinstance(p, Group) for p in parts):
                    self._fail("a second group")
                parts.append(self.group())
            else:
                parts.append(self.segment(predicted))
            if self.peek == ",":
                self.take()
            elif self.peek == "->":
                at = self.tokens[self.i][1]
                if predicted:
                    self._fail("a second arrow", at)
                if any(isinstance(p, Group) for p in parts):
                    self._fail("an arrow after a group", at, "put the arrow inside the group")
                self.take()
                predicted = True
            else:
                return tuple(parts)

    def group(self) -> Group:
        self.take("(")
        segments = self.items(inside_group=True)
        self.take(")")
        if not any(isinstance(s, Segment) and s.predicted for s in segments):
            self._fail("the group predicts nothing", None, "put an arrow inside it: (image -> action[1]) * 8")
        self.take("*")
        at = self.tokens[self.i][1] if self.peek else None
        count = self.take()
        if not count.isdigit() or not 1 <= int(count) <= MAX_REPEATS:
            self._fail(f"a repeat count is a whole number from 1 to {MAX_REPEATS}, got {count!r}", at)
        return Group(tuple(s for s in segments if isinstance(s, Segment)), int(count))

    def segment(self, predicted: bool) -> Segment:
        at = self.tokens[self.i][1] if self.peek else len(self.text)
        stream = self.take()
        if not re.match(r"[A-Za-z_]", stream):
            self._fail(f"expected a stream name, found {stream!r}", at)
        if stream not in STREAMS:
            if stream in ALIASES:
                self._fail(f"{stream!r} is the name of a whole task", at)
            self._fail(f"unknown stream {stream!r}", at, did_you_mean(stream, STREAMS).rstrip("?"))
        if stream == "demo" and predicted:
            self._fail("a demonstration is given, not predicted", at, "predict a video instead: video[8]")
        camera = length = offset = None
        if self.peek == ".":
            if stream not in VISION_STREAMS:
                self._fail(f"{stream!r} has no cameras")
            self.take()
            camera = self.take()
        if self.peek == "[":
            if stream not in NEEDS_LENGTH:
                hint = "for several frames write video[n]" if stream == "image" else "leave it out"
                self._fail(f"{stream!r} takes no length", None, hint)
            self.take()
            length = self.duration()
            self.take("]")
        elif stream in NEEDS_LENGTH:
            self._fail(f"{stream!r} needs a length", None, f"write {stream}[8] or {stream}[0.4s]")
        if self.peek == "@":
            if stream in TEXT_STREAMS or stream == "demo":
                self._fail(f"{stream!r} has no time, so no offset")
            self.take()
            offset = self.offset()
            if offset == END and stream != "image":
                self._fail("only image can be taken at the end of the episode", at)
        return Segment(stream, predicted, camera, length, offset)

    def offset(self) -> Duration | str:
        if self.peek == END:
            return self.take()
        self.take("+")
        return self.duration()

    def duration(self) -> Duration:
        at = self.tokens[self.i][1] if self.peek else None
        token = self.take()
        seconds = token.endswith("s") and token[:-1].replace(".", "", 1).isdigit()
        if not seconds and not token.isdigit():
            self._fail(f"expected a number of steps or seconds, found {token!r}", at, "write 16 or 0.8s")
        value = float(token.rstrip("s"))
        if not 0 < value <= MAX_STEPS:
            self._fail(f"{token} is outside 1 to {MAX_STEPS}", at)
        return Duration(value, seconds)
