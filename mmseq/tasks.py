"""Task: the parsed arrow. `text, image, proprio -> action[16]` says what is given and what is predicted.

    segment   stream[.camera][[length]][@offset]       image.wrist  action[16]  video[0.4s]  image@+16  image@end
    group     (segment, ... -> segment, ...) * n       the same segments again, each one time step later

Lengths and offsets are control steps, or seconds with an `s`. Everything is placed relative to
one moment, "now" (step t of the episode):

- a stream without length is what is observed at now; `@+n` moves it n steps into the future, `@-n` what is given
  into the past; from a range, `@+1..10`, each sample of training draws one;
- a *given* `video[n]`, and any other stream that is observed, is the past: the n frames that end with now; a
  *predicted* one is the future: the n frames after now;
- `action[n]` are the commands of the n steps that begin at now;
- a group advances now by the length of its commands (`action[n]`, `motion[n]`) each time.

Which streams there are says the table in `streams.py`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cached_property

from mmseq.errors import TaskError
from mmseq.streams import IMAGE_PREFIX, NAME, STREAMS, StreamRow, misspelt, stream_row

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

MAX_STEPS = 4096  # a longer segment is a typing error, not a task
MAX_REPEATS = 256


@dataclass(frozen=True)
class Duration:
    """A length of time: control steps, or seconds when `seconds` is true. Of an offset into the past it is negative."""

    value: float
    seconds: bool = False

    def steps(self, rate_hz: float) -> int:
        if not self.seconds:
            return int(self.value)
        steps = max(1, round(abs(self.value) * rate_hz))
        return steps if self.value > 0 else -steps

    def __str__(self) -> str:
        return f"{format(Decimal(repr(self.value)).normalize(), 'f')}s" if self.seconds else f"{int(self.value)}"


@dataclass(frozen=True)
class DurationRange:
    """Offsets of which each sample draws one, ends included; both lie ahead or both behind."""

    low: Duration
    high: Duration

    def steps(self, rate_hz: float) -> range:
        return range(self.low.steps(rate_hz), self.high.steps(rate_hz) + 1)

    def __str__(self) -> str:
        return f"{self.low}..{self.high}"


END = "end"
Offset = Duration | DurationRange | str | None


@dataclass(frozen=True)
class Segment:
    """One stream in an arrow. `repeat` counts its group's repetitions so far (0 outside a group)."""

    stream: str
    predicted: bool
    camera: str | None = None
    length: Duration | None = None
    offset: Offset = None
    repeat: int = 0

    @cached_property
    def row(self) -> StreamRow:
        return stream_row(self.stream)

    @property
    def at(self) -> str:
        """Its offset as an arrow writes it: ``, `@+16`, `@-0.4s`, `@+1..10`, `@end`."""
        if self.offset is None or isinstance(self.offset, str):
            return f"@{self.offset}" if self.offset else ""
        text = str(self.offset)
        return f"@{text}" if text.startswith("-") else f"@+{text}"

    def __str__(self) -> str:
        length = f"[{self.length}]" if self.length else ""
        return self.stream + (f".{self.camera}" if self.camera else "") + length + self.at


@dataclass(frozen=True)
class Group:
    """Segments that repeat, each time one length of their commands later."""

    segments: tuple[Segment, ...]
    count: int


@dataclass(frozen=True)
class PlacedSegment:
    """A segment in steps of one episode's clock, relative to now.

    start, stop: first step and one past the last; both None for streams without a time (text) and
    for `@end`. steps: how many it covers, also of one without a time. predicted: whether the model writes it.
    """

    segment: Segment
    start: int | None
    stop: int | None
    steps: int = 1

    @property
    def stream(self) -> str:
        return self.segment.stream

    @cached_property
    def row(self) -> StreamRow:
        return self.segment.row

    @cached_property
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
        """The chunk of commands that the task ends with, outside a group; None when it ends otherwise."""
        last = self.parts[-1]
        chunk = isinstance(last, Segment) and last.predicted and last.row.clock == "commanded" and last.length
        return last if chunk else None  # type: ignore[return-value]

    @property
    def group(self) -> Group | None:
        """What repeats in the task; None when nothing does."""
        return next((part for part in self.parts if isinstance(part, Group)), None)

    def with_count(self, count: int) -> Task:
        """The task with `count` repetitions of its group."""
        return Task(tuple(replace(p, count=count) if isinstance(p, Group) else p for p in self.parts))

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

    @property
    def ranged(self) -> tuple[Segment, ...]:
        """The segments whose offsets each sample draws."""
        return tuple(s for s in self.segments if isinstance(s.offset, DurationRange))

    def with_offsets(self, steps: Sequence[int]) -> Task:
        """The task with a drawn offset, in steps, in place of each range."""
        drawn = iter(steps)
        fixed = lambda s: replace(s, offset=Duration(float(next(drawn)))) if isinstance(s.offset, DurationRange) else s
        return Task(tuple(fixed(p) if isinstance(p, Segment) else p for p in self.parts))

    def nearest(self, rate_hz: float) -> Task:
        """The task with the offset nearest to now in place of each range."""
        return self.with_offsets([min(options, key=abs) for options in self._options(rate_hz)])

    def middle(self, rate_hz: float) -> Task:
        """The task with the offset in the middle of each range: the one to measure, where one has to stand for all."""
        return self.with_offsets([options[len(options) // 2] for options in self._options(rate_hz)])

    def _options(self, rate_hz: float) -> list[range]:
        """The steps of each range of offsets."""
        offsets = [s.offset for s in self.segments]
        return [offset.steps(rate_hz) for offset in offsets if isinstance(offset, DurationRange)]

    def require_fixed(self) -> None:
        """Raises: TaskError when an offset is a range, which only training draws from."""
        for segment in self.ranged:
            raise TaskError(
                f"{self} leaves open which offset {segment} means: only training draws one",
                fix=f"choose one, such as {replace(segment, offset=segment.offset.low)}",  # type: ignore[union-attr]
            )

    def covers(self, other: Task) -> bool:
        """Whether `other` is this task, with an offset out of each range or the same range."""
        if len(self.parts) != len(other.parts):
            return False
        return all(
            mine == theirs
            or (
                isinstance(mine, Segment)
                and isinstance(theirs, Segment)
                and isinstance(mine.offset, DurationRange)
                and isinstance(theirs.offset, Duration)
                and mine.offset.low.seconds == theirs.offset.seconds
                and mine.offset.low.value <= theirs.offset.value <= mine.offset.high.value
                and replace(mine, offset=theirs.offset) == theirs
            )
            for mine, theirs in zip(self.parts, other.parts)
        )

    def with_length(self, stream: str, steps: int) -> Task:
        """The task with `steps` control steps in place of every length of a stream."""
        sized = lambda s: replace(s, length=Duration(float(steps))) if s.stream == stream and s.length else s
        return Task(
            tuple(
                sized(p) if isinstance(p, Segment) else Group(tuple(sized(s) for s in p.segments), p.count)
                for p in self.parts
            )
        )

    def without(self, streams: Collection[str]) -> Task:
        """The task without given streams, where something else is left of its given side; groups stay as they are."""
        kept = [p for p in self.parts if isinstance(p, Group) or p.predicted or p.stream not in streams]
        left = any(isinstance(p, Group) or not p.predicted for p in kept)
        return Task(tuple(kept)) if left and not any(isinstance(p, Group) for p in self.parts) else self

    def names(self, stream: str, *, given: bool | None = None) -> bool:
        """Whether a stream stands in the task; given: on that side of the arrow only."""
        return any(s.stream == stream and (given is None or s.predicted != given) for s in self.segments)

    def place(self, rate_hz: float) -> tuple[PlacedSegment, ...]:
        """Where each segment lies relative to now, in steps of a clock of `rate_hz`. Of a range, the nearest offset."""
        if self.ranged:
            return self.nearest(rate_hz).place(rate_hz)
        stride = self.stride(rate_hz)
        placed = []
        for segment in self.segments:
            length = segment.length.steps(rate_hz) if segment.length else 1
            if not segment.row.timed or segment.offset == END:
                placed.append(PlacedSegment(segment, None, None, length))
                continue
            start = segment.repeat * stride
            if isinstance(segment.offset, Duration):
                start += segment.offset.steps(rate_hz)
            if segment.row.clock == "observed" and segment.length:
                start += 1 if segment.predicted else 1 - length
            placed.append(PlacedSegment(segment, start, start + length, length))
        return tuple(placed)

    def stride(self, rate_hz: float) -> int:
        """Steps from one repetition of the group to the next."""
        lengths = [
            s.length.steps(rate_hz)
            for part in self.parts
            if isinstance(part, Group)
            for s in part.segments
            if s.row.clock == "commanded" and s.length
        ]
        return max(lengths, default=1)

    def moments(self, length: int, rate_hz: float, *, pad: bool = False) -> range:
        """The steps t of an episode of `length` steps at which every segment lies inside it.

        Of a range of offsets the nearest one is enough. pad: of a chunk of commands that the task ends with, the first
        step is enough (`SequenceBuilder.build`).
        """
        chunk = len(self.segments) - 1 if pad and self.final_chunk is not None else None
        placed = enumerate(self.place(rate_hz))
        timed = [(i, p.start, p.stop) for i, p in placed if p.start is not None and p.stop is not None]
        stops = [start + 1 if i == chunk else stop for i, start, stop in timed]
        first = max((-start for _, start, _ in timed), default=0)
        last = length - max([1, *stops])
        return range(max(0, first), last + 1)

    def offsets_within(self, now: int, length: int, rate_hz: float, *, pad: bool = False) -> list[range]:
        """Of each range of offsets, in steps, those that stay inside an episode of `length` steps when it is `now`.

        pad: as for `moments`.
        """
        found = []
        for segment, placed in zip(self.segments, self.place(rate_hz)):
            if isinstance(segment.offset, DurationRange):
                options = segment.offset.steps(rate_hz)
                near = placed.segment.offset.steps(rate_hz)  # type: ignore[union-attr]
                start, stop = now + placed.start - near, now + placed.stop - near  # type: ignore[operator]
                stop = start + 1 if pad and segment is self.final_chunk else stop
                found.append(range(max(options.start, -start), min(options.stop, length - stop + 1)))
        return found

    def missing(self, streams: Collection[str], *, given_only: bool = False) -> list[str]:
        """What an episode with `streams` lacks for this task (`image` is there with any camera).

        given_only: a prediction needs no truth, so only the given side is asked for.
        """
        images = [name for name in streams if name.startswith(IMAGE_PREFIX)]
        lacking = []
        for segment in self.given if given_only else self.segments:
            if segment.row.kind.cameras:
                wanted = f"{IMAGE_PREFIX}{segment.camera}" if segment.camera else "image"
                present = wanted in streams if segment.camera else bool(images)
            else:
                wanted, present = segment.stream, segment.stream in streams
            if not present and wanted not in lacking:
                lacking.append(wanted)
        return lacking


def _shape(task: Task) -> tuple:
    return tuple(
        (s.stream, s.camera, s.predicted, s.offset if s.offset in (None, END) else s.at[1], s.repeat)
        for s in task.segments
    )


def parse_offset(text: str) -> Duration | str:
    """What follows the `@` of a segment: `+16`, `-0.8s` or `end`. Raises: TaskError."""
    parser = _Parser(text)
    offset = parser.offset()
    if parser.peek is not None or isinstance(offset, DurationRange):
        parser._fail(f"unexpected {parser.peek or '..'!r}", None, "write +16, -0.8s or end")
    return offset  # type: ignore[return-value]


_TOKEN = re.compile(r"\s*(->|\*|,|\(|\)|\[|\]|@|\+|-|\.\.|\.(?=[A-Za-z_])|[A-Za-z_][A-Za-z0-9_]*|\d+(?:\.\d+)?s?)")


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
        if any(isinstance(s, Segment) and isinstance(s.offset, DurationRange) for s in segments):
            self._fail("a range of offsets inside a group", None, "use one offset there")
        self.take("*")
        at = self.tokens[self.i][1] if self.peek else None
        count = self.take()
        if not count.isdigit() or not 1 <= int(count) <= MAX_REPEATS:
            self._fail(f"a repeat count is a whole number from 1 to {MAX_REPEATS}, got {count!r}", at)
        return Group(tuple(s for s in segments if isinstance(s, Segment)), int(count))

    def segment(self, predicted: bool) -> Segment:
        at = self.tokens[self.i][1] if self.peek else len(self.text)
        stream = self.take()
        if not NAME.fullmatch(stream):
            self._fail(f"expected a stream name, found {stream!r}", at)
        row, meant = stream_row(stream), misspelt(stream)
        if stream in ALIASES and stream not in STREAMS:
            self._fail(f"{stream!r} is the name of a whole task", at)
        if meant is not None:
            self._fail(f"unknown stream {stream!r}", at, f"did you mean {meant!r}")
        if predicted and not row.predicted:
            self._fail("a demonstration is given, not predicted", at, "predict a video instead: video[8]")
        camera = length = offset = None
        if self.peek == ".":
            if not row.kind.cameras:
                self._fail(f"{stream!r} has no cameras")
            self.take()
            camera = self.take()
        if self.peek == "[":
            if row.length == "no":
                hint = "for several frames write video[n]" if row.kind.cameras else "leave it out"
                self._fail(f"{stream!r} takes no length", None, hint)
            self.take()
            length = self.duration()
            self.take("]")
        elif row.length == "must":
            self._fail(f"{stream!r} needs a length", None, f"write {stream}[8] or {stream}[0.4s]")
        if self.peek == "@":
            if not row.timed:
                self._fail(f"{stream!r} has no time, so no offset")
            self.take()
            offset = self.offset()
            if offset == END and stream != "image":
                self._fail("only image can be taken at the end of the episode", at)
            low = offset.low if isinstance(offset, DurationRange) else offset
            if predicted and isinstance(low, Duration) and low.value < 0:
                self._fail("what is predicted does not lie in the past", at, f"write {stream}@+8, or give it")
        return Segment(stream, predicted, camera, length, offset)

    def offset(self) -> Duration | DurationRange | str:
        if self.peek == END:
            return self.take()
        at = self.tokens[self.i][1] if self.peek else None
        low = self.signed()
        if self.peek != "..":
            return low
        self.take()
        high = self.signed(plain=low.value > 0)
        if low.seconds != high.seconds or low.value >= high.value or (low.value < 0) != (high.value < 0):
            self._fail(
                f"{DurationRange(low, high)} is no range of offsets", at, "write +1..10, +0.1s..1s or -10..-1, in order"
            )
        return DurationRange(low, high)

    def signed(self, *, plain: bool = False) -> Duration:
        """A duration with its sign. plain: it may do without, as the second of a range ahead."""
        past = False
        if self.peek in ("+", "-"):
            past = self.take() == "-"
        elif not plain:
            self._fail(f"expected '+' or '-', found {self.peek or 'the end'!r}", None, "write @+8 or @-8")
        duration = self.duration()
        return Duration(-duration.value, duration.seconds) if past else duration

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
