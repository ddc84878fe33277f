"""Grammar: the text of an arrow, and what it is made of once it is read.

    segment   stream[.camera][[length]][@offset]       image.wrist  action[16]  video[0.4s]  image@+16  image@end
    group     (segment, ... -> segment, ...) * n       the same segments again, each one time step later

What an arrow means is `tasks.py`, and for people `docs/grammar.md`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property

from mmseq.errors import TaskError
from mmseq.streams import NAME, STREAMS, StreamRow, misspelt, stream_row

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


def parse_offset(text: str) -> Duration | str:
    """What follows the `@` of a segment: `+16`, `-0.8s` or `end`. Raises: TaskError."""
    parser = Parser(text)
    offset = parser.offset()
    if parser.peek is not None or isinstance(offset, DurationRange):
        parser._fail(f"unexpected {parser.peek or '..'!r}", None, "write +16, -0.8s or end")
    return offset  # type: ignore[return-value]


_TOKEN = re.compile(r"\s*(->|\*|,|\(|\)|\[|\]|@|\+|-|\.\.|\.(?=[A-Za-z_])|[A-Za-z_][A-Za-z0-9_]*|\d+(?:\.\d+)?s?)")


class Parser:
    """Reads one arrow. Raises: TaskError that shows the place, when the text is not one."""

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
