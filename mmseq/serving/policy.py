"""What a server serves: the Policy protocol, its contract, and `ReplayPolicy`, which replays an episode."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from mmseq_client import rest_action

from mmseq.embodiment import Embodiment
from mmseq.episode import IMAGE_PREFIX, Episode
from mmseq.errors import MMSeqError, ServeError, TaskError
from mmseq.serving.chunking import Chunking
from mmseq.serving.errors import RequestError
from mmseq.serving.keys import STATE, image_keys
from mmseq.streams import SCALAR, TEXT
from mmseq.tasks import Task

log = logging.getLogger("mmseq.serving")


class Policy(Protocol):
    """A model as the server sees it. Called from one thread only, one call at a time.

    Optional, for batches of several robots: `infer_many(observations)`, which returns a list with a result, or the
    MMSeqError that it failed with, for each; and `batch_key(observation)`: observations with equal keys may share a
    batch. Optional: `warm_up()`, called once before the server says that it is ready; of a policy that is loaded
    anew beside this one, from another thread, unless `reloadable` is False.
    """

    def contract(self) -> dict[str, Any]:
        """JSON-able: `name`, `embodiments` {name: Embodiment.to_dict()}, `tasks` {alias: arrow},
        `horizon` in control steps; optionally `checkpoint`, `fingerprint`, `required_keys` by embodiment
        (default: every camera and the state), `history`, the last control steps that `infer` is given at most (default:
        1), `kept_keys` by embodiment, which are sent once and kept (default: none), `prefix` (whether `action_prefix`
        is understood, default False),
        `policy`, the arrow that `infer` runs, and `options`, the names of those that it knows (default: any)."""
        ...

    def infer(self, observation: dict[str, Any]) -> dict[str, Any]:
        """`{"actions": float32 (horizon, axes), ...}` for a checked observation.

        With `action_prefix` float32 (n, axes) the chunk begins with these n actions. `step`, if there, is how
        many control steps of the episode the robot has executed.
        """
        ...

    def predict(self, arrow: str, observation: dict[str, Any]) -> dict[str, Any]:
        """The predicted streams of any arrow: arrays, text and numbers by stream name."""
        ...


def prepare(policy: Policy) -> None:
    """Let a policy do once what is slow the first time."""
    warm_up = getattr(policy, "warm_up", None)
    if warm_up is not None:
        warm_up()


@dataclass(frozen=True, kw_only=True)
class Contract:
    """A policy's contract after checking, as every client receives it.

    Raises (from_policy): ServeError that names what is missing or wrong.
    """

    name: str
    embodiments: dict[str, Embodiment]
    tasks: dict[str, str]
    horizon: int
    required_keys: dict[str, tuple[str, ...]] | None = None
    history: int = 1
    kept_keys: dict[str, tuple[str, ...]] = field(default_factory=dict)
    prefix: bool = False
    checkpoint: str | None = None
    fingerprint: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_policy(cls, policy: Policy) -> Contract:
        data = dict(policy.contract())
        missing = sorted({"name", "embodiments", "tasks", "horizon"} - set(data))
        if missing:
            raise ServeError(f"the contract of {type(policy).__name__} lacks {', '.join(missing)}")
        for derived in ("fingerprints", "image_keys", "protocol", "chunking", "hold", "reads_prompt"):
            data.pop(derived, None)
        try:
            embodiments = {name: Embodiment.from_dict(body) for name, body in dict(data.pop("embodiments")).items()}
            json.dumps(data, allow_nan=False)
        except (MMSeqError, TypeError, ValueError, AttributeError) as error:
            raise ServeError(f"the contract of {type(policy).__name__} is not valid: {error}") from error
        for name, embodiment in embodiments.items():
            if name != embodiment.name:
                raise ServeError(f"the contract lists embodiment {embodiment.name!r} as {name!r}")
            if embodiment.action is None:
                raise ServeError(f"embodiment {name!r} has no action axes", fix="serve an embodiment that acts")
        horizon, required = data.pop("horizon"), data.pop("required_keys", None)
        kept, history = data.pop("kept_keys", {}), data.get("history", 1)
        if type(history) is not int or not 1 <= history <= MAX_HISTORY:
            raise ServeError(f"a contract's history is 1 to {MAX_HISTORY} control steps, got {history!r}")
        if not embodiments or type(horizon) is not int or horizon < 1:
            raise ServeError(f"a contract needs an embodiment and a horizon of at least 1, got {horizon!r}")
        return cls(
            embodiments=embodiments,
            horizon=horizon,
            required_keys=None if required is None else {name: tuple(keys) for name, keys in required.items()},
            kept_keys={name: tuple(keys) for name, keys in kept.items()},
            **{key: data.pop(key) for key in list(data) if key in cls.__dataclass_fields__ and key != "extra"},
            extra=data,
        )

    def chunked(self, chunking: Chunking) -> Contract:
        return replace(self, extra={**self.extra, "chunking": asdict(chunking)})

    def to_dict(self) -> dict[str, Any]:
        """What clients are sent on connecting and by `GET /v1/contract`."""
        return {
            "protocol": "mmseq/1",
            "name": self.name,
            "checkpoint": self.checkpoint,
            "fingerprint": self.fingerprint,
            "embodiments": {name: body.to_dict() for name, body in self.embodiments.items()},
            "fingerprints": {name: body.fingerprint for name, body in self.embodiments.items()},
            "tasks": self.tasks,
            "horizon": self.horizon,
            "image_keys": sorted({key for body in self.embodiments.values() for key in image_keys(body)}),
            "required_keys": {name: list(self.required(body)) for name, body in self.embodiments.items()},
            "kept_keys": {name: list(keys) for name, keys in self.kept_keys.items()},
            "history": self.history,
            "reads_prompt": self.reads_prompt,
            "prefix": self.prefix,
            "hold": {
                n: "position" if body.action_form == "absolute" else "zero" for n, body in self.embodiments.items()
            },
            **self.extra,
        }

    def differences(self, other: Contract) -> list[str]:
        """What clients would notice of another policy in this one's place: fields, `robot.field: mine, theirs`."""
        mine, theirs = self.to_dict(), other.to_dict()
        named = {"name", "checkpoint", "embodiments", "fingerprints"}
        found = sorted(key for key in {*mine, *theirs} - named if mine.get(key) != theirs.get(key))
        for name in sorted({*self.embodiments, *other.embodiments}):
            one, another = self.embodiments.get(name), other.embodiments.get(name)
            if one is None or another is None:
                found.append(f"robot {name!r} is {'new' if one is None else 'gone'}")
            else:
                found += [f"{name}.{line}" for line in one.differences(another)]
        return found

    @cached_property
    def reads_prompt(self) -> bool:
        """Whether the policy's arrow, where it says it, is given text; clients are told."""
        arrow = self.extra.get("policy")
        return isinstance(arrow, str) and any(segment.stream == "text" for segment in Task.parse(arrow).given)

    def required(self, embodiment: Embodiment) -> tuple[str, ...]:
        """The keys without which `embodiment` cannot be served."""
        if self.required_keys is not None:
            return self.required_keys[embodiment.name]
        return (*image_keys(embodiment), *([STATE] if embodiment.proprio else []))


MAX_HISTORY = 1024  # control steps that a policy may look back
MAX_REPLAYED = 4096  # control steps of one answer
MAX_STEP = 1 << 53


class ReplayPolicy:
    """Replays the actions of one episode: a dry run of a robot's whole loop without a model.

    horizon, execute: control steps of a chunk, and of it until the client asks again (default: all), by
    which each `infer` moves on. A client that says how far it is is given the actions from there, and
    `options: {"step": t}` replays from step t. After the last action an absolute robot holds it and any other
    gets zeros, the gripper as it was; the reply says `episode_over` when nothing else is left.
    """

    def __init__(self, episode: Episode, embodiment: Embodiment, *, horizon: int = 16, execute: int | None = None):
        if embodiment.action is None or "action" not in episode:
            raise ServeError(
                f"episode {episode.id!r} and embodiment {embodiment.name!r} need actions to replay",
                fix="name an episode of a robot; videos have none",
            )
        self.execute = horizon if execute is None else execute
        if not 1 <= self.execute <= horizon:
            raise ServeError(f"execute is {self.execute}, outside 1..{horizon}", fix="execute at most one chunk")
        self.actions = embodiment.action.check(episode["action"], what="action", where=f"episode {episode.id!r}")
        self.episode, self.embodiment, self.horizon, self.step = episode, embodiment, horizon, 0
        self._rest = rest_action(embodiment.to_dict(), self.actions[-1])
        self._over = False

    def contract(self) -> dict[str, Any]:
        return {
            "name": f"replay of {self.episode.id}",
            "embodiments": {self.embodiment.name: self.embodiment.to_dict()},
            "tasks": {"policy": f"text, image, proprio -> action[{self.horizon}]"},
            "horizon": self.horizon,
            "prefix": True,
            "fingerprint": hashlib.sha256(self.actions.tobytes()).hexdigest()[:16],  # another episode is another policy
        }

    def chunk(self, step: int, length: int) -> np.ndarray:
        """The actions from `step` on, float32 (length, axes), padded after the episode's end."""
        actions = self.actions[step : step + length]
        return np.concatenate([actions, np.tile(self._rest, (length - len(actions), 1))]).astype(np.float32)

    def _start(self, observation: dict[str, Any]) -> int:
        step = observation.get("options", {}).get("step", observation.get("step", self.step))
        if type(step) is not int or not 0 <= step <= MAX_STEP:
            raise RequestError(
                "out_of_range", f"options.step is {step!r:.40}, expected a step from 0 to {MAX_STEP}", key="options"
            )
        return step

    def infer(self, observation: dict[str, Any]) -> dict[str, Any]:
        step = self._start(observation)
        actions = self.chunk(step, self.horizon)
        prefix = observation.get("action_prefix")
        if prefix is not None:
            actions[: len(prefix)] = prefix
        self.step = step + self.execute
        over = step >= len(self.actions)
        if over and not self._over:
            log.info("the episode is over: robots keep still after its %d steps", len(self.actions))
        self._over = over
        return {"actions": actions, "step": step, "episode_over": over}

    def predict(self, arrow: str, observation: dict[str, Any]) -> dict[str, Any]:
        """The recorded streams on the right of the arrow, e.g. `image -> action[8], image@+8`."""
        step, last = self._start(observation), len(self.episode) - 1
        prediction: dict[str, Any] = {}
        try:
            task = Task.parse(self.contract()["tasks"].get(arrow, arrow))
            task.require_fixed()
        except TaskError as error:
            raise RequestError("refused", f"cannot replay {arrow[:80]!r}: {error}", key="arrow") from error
        for placed in (p for p in task.place(self.embodiment.rate_hz) if p.predicted):
            segment, row = placed.segment, placed.row
            if placed.steps > MAX_REPLAYED:
                raise RequestError("too_large", f"'{segment}' is longer than {MAX_REPLAYED} steps", key="arrow")
            first = step + placed.start if placed.start is not None else last
            if row.name == "action":
                prediction[row.name] = self.chunk(first, placed.steps)
            elif row.kind is TEXT and self.episode.texts_of(row.name, min(step, last)):
                prediction[row.name] = self.episode.texts_of(row.name, min(step, last))[0]
            elif row.kind is SCALAR:
                prediction[row.name] = min(first, last) / max(last, 1)
            else:
                cameras = [segment.camera] if segment.camera else self.episode.cameras
                for stream in [IMAGE_PREFIX + camera for camera in cameras] if row.kind.cameras else [row.name]:
                    if stream not in self.episode:
                        raise RequestError("refused", f"the episode has no stream {stream!r}", key="arrow")
                    values = self.episode[stream][np.minimum(np.arange(first, first + placed.steps), last)]
                    prediction[stream] = values if segment.length else values[0]
        return prediction
