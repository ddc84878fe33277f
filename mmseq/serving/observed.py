"""What a robot sends, as the model reads it: the tokens of an observation, and which keys an arrow needs of it.

An observation holds what is known now: `observation.images.<camera>` uint8 (H, W, 3), or (n, H, W, 3)
with the past frames that end now; `observation.state` float32 (axes,), or (n, axes) likewise; `prompt`. For other
arrows also `past_actions` float32 (n, axes), executed until now; `action` float32 (n, axes) from now on;
`observation.images.<camera>@+16` (the offset as the arrow writes it, also `@end`: what a given `image@+16` shows, and
(n, H, W, 3) what a given `video[n]@+16` does); `observation.state@+16` and further vectors in the same way;
`demo.images.<camera>` (n, H, W, 3), a demonstration; `question`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from mmseq_client import Rules, holds_position
from mmseq_client.rules import resting_action

from mmseq.embodiment import Embodiment
from mmseq.episode import Episode
from mmseq.errors import ConfigError, TaskError
from mmseq.grammar import END, Duration, Segment, parse_offset
from mmseq.serving.keys import DEMO, IMAGES, STATE
from mmseq.streams import IMAGE_PREFIX, STREAMS, VECTOR, VISION, StreamRow, of_kind, row_of, stream_row
from mmseq.tasks import Task
from mmseq.tokenization.bundle import EpisodeTokens, Tokenizers

_FUTURE = 1 << 20  # an observation has no end
ACTION = "action"  # the key of what the motors are sent


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
        did = observation.get("past_actions")
        self._did = np.zeros((0, 0)) if did is None else np.asarray(did)
        self.now = max(stacks, default=1 if observed_now(observation) else 1 + len(self._did)) - 1
        # what is not of now or before it: by camera, or key of a vector, and step the values that end there
        self._elsewhere: dict[tuple[str, int], np.ndarray] = {}
        keys: dict[tuple[str, int], str] = {}
        for key in (key for key in observation if key.startswith("observation.") and "@" in key):
            base, _, at = key.partition("@")
            try:
                offset = parse_offset(at)
            except TaskError as error:
                fix = f"write it as the arrow does: {base}@+16, @+0.8s or @end"
                raise TaskError(f"{key!r} has no readable offset", fix=fix) from error
            step = self.now + (_FUTURE - 1 if isinstance(offset, str) else offset.steps(self.rate_hz))
            known = keys.setdefault((base, step), key)
            if known != key:
                raise TaskError(
                    f"{key!r} is given a second time: at {self.rate_hz:g} Hz {known!r} is the same step",
                    fix="send one of the two",
                )
            value, many = np.asarray(observation[key]), 4 if base.startswith(IMAGES) else 2
            value = value[None] if value.ndim < many else value
            self._elsewhere[base.removeprefix(IMAGES), step] = value

    def __len__(self) -> int:
        return self.now + _FUTURE

    @property
    def streams(self) -> list[str]:
        elsewhere = {where for where, _ in self._elsewhere}
        cameras = (where for where in elsewhere if not where.startswith("observation."))
        present = [f"{IMAGE_PREFIX}{c}" for c in dict.fromkeys([*self._frames, *sorted(cameras)])]
        rows = [*STREAMS.values(), *map(stream_row, self._vectors)]
        known = {row.name: row.wire for row in rows if row.wire and row.kind is not VISION}
        here = {key for key, value in self._observation.items() if value is not None} | elsewhere
        here |= {ACTION} if "past_actions" in here else set()
        return present + [name for name, key in known.items() if key in here]

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
        shown, wanted = self._elsewhere.get((camera, stop - 1)), stop - start
        if shown is not None and len(shown) >= wanted:
            return shown[len(shown) - wanted :]
        if stop > self.now + 1:
            what = "image" if wanted == 1 else f"video of {wanted} frames"
            form = "(H, W, 3)" if wanted == 1 else f"({wanted}, H, W, 3)"
            raise TaskError(
                f"this arrow is given a future {what} of camera {camera!r} that the observation lacks"
                + (f": there it has {len(shown)}" if shown is not None else ""),
                fix=f"send {IMAGES}{camera}@... with the offset as the arrow writes it, uint8 {form}",
            )
        if camera not in self._frames:
            raise TaskError(f"the observation has no image of camera {camera!r}", fix=f"send {IMAGES}{camera}")
        frames = self._frames[camera]
        first = start - (self.now + 1 - len(frames))
        if first < 0:
            raise TaskError(f"camera {camera!r} has {len(frames)} frames, fewer than other cameras")
        return frames[first : first + stop - start]

    def _vector(self, row: StreamRow, start: int, stop: int) -> np.ndarray:
        key, wanted = row.wire or row.name, stop - start
        shown, values = self._elsewhere.get((key, stop - 1)), self._observation.get(key)
        if shown is not None and len(shown) >= wanted:
            shown = shown[len(shown) - wanted :]
            return self.tokenizers.encode_vector(row.name, self.embodiment, shown, what=key, where="observation")
        values = np.zeros((0, 0)) if values is None else np.atleast_2d(np.asarray(values))
        # what is observed ends with now, commands begin with it, and what was commanded ends before it
        first = start - (self.now + 1 - len(values)) if row.clock == "observed" else start - self.now
        if row.wire == ACTION and start < self.now:
            first, values = first + len(self._did), self._did if stop <= self.now else _joined(self._did, values)
        if first < 0 or first + wanted > len(values):
            raise TaskError(
                f"this arrow needs {key!r} of steps {start - self.now} to {stop - 1 - self.now} from now, "
                f"the observation has {len(values)}"
            )
        values = values[first : first + wanted]
        return self.tokenizers.encode_vector(row.name, self.embodiment, values, what=key, where="observation")


def _frames_of(observation: dict[str, Any], prefix: str) -> dict[str, np.ndarray]:
    """Frames (n, H, W, 3) by camera, of the keys that begin with a prefix."""
    found = {key.removeprefix(prefix): np.asarray(v) for key, v in observation.items() if key.startswith(prefix)}
    return {camera: v[None] if v.ndim == 3 else v for camera, v in found.items()}


def observed_now(observation: dict[str, Any]) -> bool:
    """Whether a camera or a vector of now is there."""
    return any(key.startswith("observation.") and "@" not in key for key in observation)


def _joined(did: np.ndarray, will: np.ndarray) -> np.ndarray:
    """Commands before now and from now on."""
    return np.concatenate([did, will]) if len(did) and len(will) else did if len(did) else will


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


def check_servable(task: Task, rate_hz: float) -> None:
    """Raises: ConfigError when no observation of a robot at `rate_hz` can fill what the arrow is given."""
    task.require_fixed()
    for placed in (p for p in task.place(rate_hz) if not p.predicted):
        segment, why = placed.segment, "which nobody sends"
        unknown = placed.row.wire is None
        if placed.row.clock == "commanded" and isinstance(segment.offset, Duration):
            # what a robot was sent is known; what it will be, or what was planned for it, is not
            unknown |= placed.row.wire != ACTION or placed.start is None or placed.stop is None
            if not unknown and placed.stop - placed.segment.repeat * task.stride(rate_hz) > 0:  # type: ignore[operator]
                unknown, why = True, "which is not over by now, so nobody knows it"
        if unknown:
            raise ConfigError(
                f"the arrow {task} cannot be served as the policy: it is given {segment}, {why}",
                fix="use an arrow that is given what a robot sees, states, has done, or is told",
            )


def past_commands(task: Task, rate_hz: float) -> int:
    """Of how many control steps before now a task is given the commands."""
    given = (p for p in task.place(rate_hz) if not p.predicted and p.row.wire == ACTION and p.start is not None)
    return max([0, *(p.segment.repeat * task.stride(rate_hz) - p.start for p in given)])  # type: ignore[operator]


def commands_before(body: Embodiment, observation: dict[str, Any], steps: int) -> np.ndarray:
    """Float32 (steps, axes): what a robot did before anybody commanded it, so that it stood where it is seen first."""
    state = observation.get(STATE)
    first = None if state is None else np.atleast_2d(np.asarray(state))[0]
    return np.tile(resting_action(body.to_dict(), first), (steps, 1))


def check_rest(task: Task, body: Embodiment) -> None:
    """Raises: ConfigError when a task looks back at commands, and nobody knows what they were as an episode begins."""
    if not past_commands(task, body.rate_hz) or body.action is None or not holds_position(body.to_dict()):
        return
    rules = Rules(body.to_dict())
    at = rules.stands(np.zeros(rules.state_width, np.float32))
    unknown = [n for i, n in enumerate(body.action.names) if np.isnan(at[i]) and i not in rules.grippers]
    if unknown:
        raise ConfigError(
            f"the arrow {task} cannot be served as the policy: it is given past commands, and as an episode begins "
            f"nobody knows those of {', '.join(unknown)} of robot {body.name!r}, whose state has no such axes",
            fix="give the state instead (proprio[2]), or name the axes of proprio and action alike",
        )


def _base_keys(segment: Segment, body: Embodiment) -> list[str]:
    """The keys of a segment, offsets aside; of vision one for each camera."""
    if segment.row.kind is VECTOR:
        done = segment.row.wire == ACTION and isinstance(segment.offset, Duration)  # known as `past_actions`
        return [segment.row.wire] if segment.row.wire and not done else []
    if segment.row.kind is not VISION:
        return []
    cameras = [c.name for c in body.cameras]
    if segment.camera and segment.camera not in cameras:
        raise ConfigError(f"the policy is given {segment}; robot {body.name!r} has the cameras {cameras}")
    prefix = DEMO if segment.stream == "demo" else IMAGES
    return [f"{prefix}{camera}" for camera in ([segment.camera] if segment.camera else cameras)]


def required_keys(task: Task, body: Embodiment) -> list[str]:
    """The keys of an observation that the given side of a task reads, the prompt aside.

    What lies behind is what was seen and done; of two offsets that are one step of this robot the first counts.
    """
    keys: dict[tuple[str, int | str | None], str] = {}
    for segment in task.given:
        ahead = segment.offset if isinstance(segment.offset, Duration) and segment.offset.value > 0 else None
        place = ahead.steps(body.rate_hz) if ahead else segment.offset if segment.offset == END else None
        for key in _base_keys(segment, body):
            keys.setdefault((key, place), key + (segment.at if place is not None else ""))  # type: ignore[arg-type]
    if past_commands(task, body.rate_hz) and holds_position(body.to_dict()):
        keys.setdefault((STATE, None), STATE)  # where it stood before it was commanded
    return list(keys.values())


def kept_keys(task: Task, body: Embodiment) -> list[str]:
    """Those of the required keys that are sent once and kept: a demonstration, and a goal at the end."""
    return [key for key in required_keys(task, body) if key.startswith(DEMO) or key.endswith("@end")]
