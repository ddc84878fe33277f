"""What a robot sends, as the model reads it: the tokens of an observation, and which keys an arrow needs of it.

An observation holds what is known now: `observation.images.<camera>` uint8 (H, W, 3), or (n, H, W, 3)
with the past frames that end now; `observation.state` float32 (axes,), or (n, axes) likewise; `prompt`. For other
arrows also `past_actions` float32 (n, axes), executed until now; `action` float32 (n, axes) from now on;
`observation.images.<camera>@+16` (the offset as the arrow writes it, also `@end`: what a given `image@+16` shows);
`demo.images.<camera>` (n, H, W, 3), a demonstration; `question`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mmseq.embodiment import Embodiment
from mmseq.episode import Episode
from mmseq.errors import ConfigError, TaskError
from mmseq.grammar import Duration, Segment, parse_offset
from mmseq.serving.keys import DEMO, IMAGES
from mmseq.streams import IMAGE_PREFIX, STREAMS, VECTOR, VISION, StreamRow, of_kind, row_of, stream_row
from mmseq.tasks import Task
from mmseq.tokenization.bundle import EpisodeTokens, Tokenizers

_FUTURE = 1 << 20  # an observation has no end


class ObservationTokens:
    """The tokens of what is known now. Implements `TokenSource`; step `now` is the present."""

    def __init__(self, observation: dict[str, Any], tokenizers: Tokenizers, embodiment: str | None):
        self.tokenizers, self.embodiment = tokenizers, embodiment
        self.rate_hz = (
            tokenizers.embodiments[embodiment].rate_hz if embodiment else float(observation.get("rate_hz", 20.0))
        )
        self._observation = observation
        images = _frames_of(observation, IMAGES)
        self._demo = _frames_of(observation, DEMO)
        self._frames = {camera: frames for camera, frames in images.items() if "@" not in camera}
        stacks = [len(f) for f in self._frames.values()]
        rows = [stream_row(name) for name in dict.fromkeys([*of_kind(VECTOR), *self._vectors])]
        observed = [observation.get(row.wire) for row in rows if row.wire and row.clock == "observed"]
        stacks += [len(values) for values in map(np.asarray, observed) if values.ndim == 2]
        self.now = max(stacks, default=1) - 1
        self._elsewhere: dict[tuple[str, int], np.ndarray] = {}  # single frames by camera and step
        for name in (name for name in images if "@" in name):
            camera, _, at = name.partition("@")
            try:
                offset = parse_offset(at)
            except TaskError as error:
                fix = f"write it as the arrow does: {IMAGES}{camera}@+16, @+0.8s or @end"
                raise TaskError(f"'{IMAGES}{name}' has no readable offset", fix=fix) from error
            step = self.now + (_FUTURE - 1 if isinstance(offset, str) else offset.steps(self.rate_hz))
            if (camera, step) in self._elsewhere:
                raise TaskError(f"'{IMAGES}{name}' is given a second time, under another offset of the same step")
            self._elsewhere[camera, step] = images[name]

    def __len__(self) -> int:
        return self.now + _FUTURE

    @property
    def streams(self) -> list[str]:
        present = [f"{IMAGE_PREFIX}{c}" for c in dict.fromkeys([*self._frames, *(c for c, _ in self._elsewhere)])]
        rows = [*STREAMS.values(), *map(stream_row, self._vectors)]
        known = {row.name: row.wire for row in rows if row.wire and row.kind is not VISION}
        return present + [name for name, key in known.items() if self._observation.get(key) is not None]

    @property
    def _vectors(self) -> list[str]:
        robot = self.tokenizers.embodiments.get(self.embodiment or "")
        return list(robot.vectors) if robot is not None else []

    def codes(self, stream: str, start: int, stop: int, variant: int = 0) -> np.ndarray:
        row = row_of(stream)
        if row.kind is VISION:
            return self.tokenizers.vision.encode(self._pictures(stream.removeprefix(IMAGE_PREFIX), start, stop))
        if row.kind is VECTOR:
            return self._vector(row, start, stop)
        if row.wire is None:
            raise TaskError(f"{stream} is predicted, it cannot be given in an observation")
        if not isinstance(self._observation.get(row.wire), str):
            raise TaskError(f"the observation has no {row.wire!r}", fix=f"send {row.wire} as a string")
        return self.tokenizers[row.range].encode(self._observation[row.wire])

    def demonstration(self) -> EpisodeTokens:
        if not self._demo:
            raise TaskError("this arrow is given a demonstration", fix=f"send its frames as {DEMO}CAMERA")
        frames = {f"{IMAGE_PREFIX}{camera}": shown for camera, shown in self._demo.items()}
        return EpisodeTokens(Episode.from_arrays("demonstration", self.rate_hz, frames), self.tokenizers)  # type: ignore[arg-type]

    def features(self, camera: str, start: int, stop: int) -> np.ndarray:
        return self.tokenizers.features_of(self._pictures(camera, start, stop))

    def _pictures(self, camera: str, start: int, stop: int) -> np.ndarray:
        lone = self._elsewhere.get((camera, start)) if stop - start == 1 else None
        if lone is not None:
            return lone[-1:]
        if stop > self.now + 1:
            raise TaskError(
                f"this arrow is given a future image of camera {camera!r} that the observation lacks",
                fix=f"send {IMAGES}{camera}@... with the offset as the arrow writes it, uint8 (H, W, 3)",
            )
        if camera not in self._frames:
            raise TaskError(f"the observation has no image of camera {camera!r}", fix=f"send {IMAGES}{camera}")
        frames = self._frames[camera]
        first = start - (self.now + 1 - len(frames))
        if first < 0:
            raise TaskError(f"camera {camera!r} has {len(frames)} frames, fewer than other cameras")
        return frames[first : first + stop - start]

    def _vector(self, row: StreamRow, start: int, stop: int) -> np.ndarray:
        key = row.wire or row.name
        values = np.atleast_2d(np.asarray(self._observation[key]))
        # what is observed ends with now, commands begin with it
        first = start - (self.now + 1 - len(values)) if row.clock == "observed" else start - self.now
        if first < 0 or first + stop - start > len(values):
            raise TaskError(
                f"this arrow needs {key!r} of steps {start - self.now} to {stop - 1 - self.now} from now, "
                f"the observation has {len(values)}"
            )
        values = values[first : first + stop - start]
        return self.tokenizers.encode_vector(row.name, self.embodiment, values, what=key, where="observation")


def _frames_of(observation: dict[str, Any], prefix: str) -> dict[str, np.ndarray]:
    """Frames (n, H, W, 3) by camera, of the keys that begin with a prefix."""
    found = {key.removeprefix(prefix): np.asarray(v) for key, v in observation.items() if key.startswith(prefix)}
    return {camera: v[None] if v.ndim == 3 else v for camera, v in found.items()}


def prolonged(observation: dict[str, Any], steps: int) -> dict[str, Any]:
    """An observation whose frames and states reach `steps` back: the first ones again."""
    longer: dict[str, Any] = {}
    for key, value in observation.items():
        many = 4 if key.startswith(IMAGES) and "@" not in key else 2
        if key.startswith("observation.") and isinstance(value, np.ndarray) and "@" not in key:
            value = value[None] if value.ndim < many else value
            longer[key] = np.concatenate([np.repeat(value[:1], max(0, steps - len(value)), axis=0), value])
    return {**observation, **longer}


def lookback(task: Task, rate_hz: float) -> int:
    """How many control steps, now included, an observation must reach back for what a task is given."""
    count = task.group.count if task.group else 1
    starts = [p.start for p in task.place(rate_hz) if not p.predicted and p.start is not None]
    return 1 + max([0, *(-start for start in starts)]) + (count - 1) * task.stride(rate_hz)


def check_servable(task: Task) -> None:
    """Raises: ConfigError when no observation can fill what the arrow is given."""
    task.require_fixed()
    for segment in task.given:
        ahead = isinstance(segment.offset, Duration) and segment.offset.value > 0
        clip = segment.row.kind is VISION and segment.length is not None and segment.row.timed
        clip_ahead = clip and segment.offset is not None and (ahead or not isinstance(segment.offset, Duration))
        # nobody remembers a command from before an episode began, which a policy that looks back at one asks for first
        behind = isinstance(segment.offset, Duration) and segment.offset.value < 0 and segment.row.clock == "commanded"
        if segment.row.wire is None or behind or clip_ahead or (ahead and segment.row.kind is VECTOR):
            raise ConfigError(
                f"the arrow {task} cannot be served as the policy: it is given {segment}, which nobody sends",
                fix="use an arrow that is given what a robot sees, states, or is told",
            )


def _camera_keys(segment: Segment, body: Embodiment) -> list[str]:
    """The keys of a vision segment's cameras."""
    cameras = [c.name for c in body.cameras]
    if segment.camera and segment.camera not in cameras:
        raise ConfigError(f"the policy is given {segment}; robot {body.name!r} has the cameras {cameras}")
    behind = isinstance(segment.offset, Duration) and segment.offset.value < 0
    at = "" if behind else segment.at  # what lies behind is what was seen
    prefix = DEMO if segment.stream == "demo" else IMAGES
    return [f"{prefix}{camera}{at}" for camera in ([segment.camera] if segment.camera else cameras)]


def required_keys(task: Task, body: Embodiment) -> list[str]:
    """The keys of an observation that the given side of a task reads, the prompt aside."""
    keys: dict[str, None] = {}
    for segment in task.given:
        if segment.row.kind is VISION:
            keys |= dict.fromkeys(_camera_keys(segment, body))
        elif segment.row.kind is VECTOR and segment.row.wire:
            keys[segment.row.wire] = None
    return list(keys)


def kept_keys(task: Task, body: Embodiment) -> list[str]:
    """Those of the required keys that are sent once and kept: a demonstration, and a goal at the end."""
    return [key for key in required_keys(task, body) if key.startswith(DEMO) or key.endswith("@end")]
