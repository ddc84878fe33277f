"""Embodiment: the contract of one robot, held by training, checkpoint, server and client alike.

It says, in order and with units, what each number of a proprio or action vector means, its
range (which its bins cover) and its hard limits (which the safety gate enforces), the control
rate, the cameras and the gripper convention. Two contracts with the same fingerprint are
interchangeable; two with different ones are refused with the names of the fields that differ.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmseq.errors import EmbodimentError, EpisodeError, FingerprintError
from mmseq.grammar import ALIASES
from mmseq.statistics import extent
from mmseq.streams import NAME, OWN_VECTORS, RANGE_ORDER, STREAMS, VECTOR, misspelt
from mmseq.vocabulary import STRUCTURE

_NAME = re.compile(r"[A-Za-z0-9][\w .-]{0,99}")

FLOAT32_MAX = float(np.finfo(np.float32).max)
# What names of further streams would be taken for: ranges and fields of the vocabulary, structural tokens, arrows that
# have names, and openpi's spellings of what a robot sends.
_NO_STREAMS = {*RANGE_ORDER, "streams", "embodiments", *ALIASES, "state", "image", "images", "prompt"}
_NO_STREAMS |= {token.strip("<>") for token in STRUCTURE} - {*STREAMS}
ACTION_FORMS = ("absolute", "delta", "velocity")


@dataclass(frozen=True, kw_only=True)
class Camera:
    """One camera: its name in the dataset and the size of its frames in pixels."""

    name: str
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Axes:
    """A named vector: what each of its numbers is, in order.

    low, high: the least and the greatest value of the training data, faults aside (`mmseq/statistics.py`); values are
    scaled so that these meet the first and the last bin. minimum, maximum: limits that no valid value leaves.
    max_step: the largest change of an axis from one control step to the next, in its unit; None where nobody has said.
    """

    names: tuple[str, ...]
    units: tuple[str, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    minimum: tuple[float, ...]
    maximum: tuple[float, ...]
    max_step: tuple[float, ...] | None = None

    def __post_init__(self):
        stated = () if self.max_step is None else ("max_step",)
        for name in ("names", "units", "low", "high", "minimum", "maximum", *stated):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if len(getattr(self, name)) != len(self.names):
                raise EmbodimentError(
                    f"{name} has {len(getattr(self, name))} entries for {len(self.names)} axes {list(self.names)}",
                    fix=f"give one entry of {name} per axis",
                )
        for name in ("low", "high", "minimum", "maximum"):
            if not all(abs(v) <= FLOAT32_MAX for v in getattr(self, name)):
                raise EmbodimentError(f"{name} holds a number that is not finite as float32: {getattr(self, name)}")
        for low, high, name in zip(self.low, self.high, self.names, strict=True):
            if high < low:
                raise EmbodimentError(f"axis {name!r}: the high quantile {high} is below the low one {low}")
        for least, most, name in zip(self.minimum, self.maximum, self.names, strict=True):
            if most < least:
                raise EmbodimentError(f"axis {name!r}: the maximum {most} is below the minimum {least}")
        for step, name in zip(self.max_step or (), self.names):
            if not 0 < step <= FLOAT32_MAX:
                raise EmbodimentError(
                    f"axis {name!r}: max_step is {step}", fix="give a positive change per control step"
                )

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def from_values(
        cls,
        values: np.ndarray,
        names: Sequence[str] | None = None,
        units: Sequence[str] | None = None,
        margin: float = 0.1,
    ) -> Axes:
        """Axes with the statistics of `values` (steps, axes): low and high are their range, without wild values.

        margin: how far beyond that range, as a share of it, a value is still valid.
        """
        values = np.asarray(values, dtype=np.float64)
        if values.ndim != 2 or len(values) == 0:
            raise EpisodeError(f"statistics need values of shape (steps, axes), got {values.shape}")
        width = values.shape[1]
        names = tuple(names) if names else tuple(f"axis_{i}" for i in range(width))
        units = tuple(units) if units else ("unitless",) * width
        extents = [extent(axis) for axis in values.T]
        low, high = np.array([e.low for e in extents]), np.array([e.high for e in extents])
        slack = margin * np.maximum(high - low, 1e-6)
        clean = lambda v: tuple(float(np.float32(x)) for x in v)
        return cls(
            names=names,
            units=units,
            low=clean(low),
            high=clean(high),
            minimum=clean(low - slack),
            maximum=clean(high + slack),
        )

    def check(self, values: np.ndarray, *, what: str, where: str) -> np.ndarray:
        """Return `values` as float32 (steps, axes) after checking shape, finiteness and limits.

        Raises: EpisodeError that names the axis, the step and the value.
        """
        values = np.asarray(values)
        if values.ndim != 2 or values.shape[1] != len(self):
            raise EpisodeError(
                f"{where}: {what} has shape {values.shape}, expected (steps, {len(self)}) for axes {list(self.names)}"
            )
        if not np.issubdtype(values.dtype, np.number):
            raise EpisodeError(f"{where}: {what} has dtype {values.dtype}, expected numbers")
        bad = ~np.isfinite(values)
        if bad.any():
            step, axis = np.argwhere(bad)[0]
            raise EpisodeError(f"{where}: {what} axis {self.names[axis]!r} is {values[step, axis]} at step {step}")
        low, high = np.asarray(self.minimum) - 1e-5, np.asarray(self.maximum) + 1e-5
        outside = (values < low) | (values > high)
        if outside.any():
            step, axis = np.argwhere(outside)[0]
            raise EpisodeError(
                f"{where}: {what} axis {self.names[axis]!r} is {values[step, axis]:.5g} at step {step}, outside "
                f"[{self.minimum[axis]:.5g}, {self.maximum[axis]:.5g}] {self.units[axis]}",
                fix="correct the data, or widen minimum/maximum in the embodiment if the value is real",
            )
        return values.astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Gripper:
    """Which action axis is the gripper and which of its values mean open and closed."""

    axis: str
    open: float
    closed: float


@dataclass(frozen=True, kw_only=True)
class Embodiment:
    """The contract of one robot. Arrays that travel with it:

    ==========================  ===================  ====================================
    `observation.images.<cam>`  uint8 (H, W, 3)      RGB, one per camera, in `cameras` order
    `observation.state`         float32 (proprio,)   proprio, in `proprio.names` order
    `action`                    float32 (action,)    command of one control step
    `observation.<stream>`      float32 (axes,)      each of `streams`, such as `force` or `tactile`
    ==========================  ===================  ====================================
    """

    name: str
    rate_hz: float
    cameras: tuple[Camera, ...] = ()
    proprio: Axes | None = None
    action: Axes | None = None
    action_form: str = "absolute"
    grippers: tuple[Gripper, ...] = ()
    streams: Mapping[str, Axes] = field(default_factory=dict, hash=False)

    def __post_init__(self):
        object.__setattr__(self, "cameras", tuple(self.cameras))
        object.__setattr__(self, "streams", dict(self.streams))
        if not self.name:
            raise EmbodimentError("an embodiment needs a name")
        for stream in self.streams:
            row, meant = STREAMS.get(stream), misspelt(stream)
            taken = row is not None and (row.kind is not VECTOR or row.header == "first")
            taken |= stream in _NO_STREAMS
            taken |= any(stream in (c.name, f"{c.name}_image") for c in self.cameras)  # spellings of its pictures
            if not NAME.fullmatch(stream) or taken or meant:
                why = f"arrows would take it for a misspelt {meant!r}" if meant else "that is no free name of a stream"
                raise EmbodimentError(
                    f"{self.name}: the further stream {stream!r}: {why}", fix="name it like force, tactile or hand_pose"
                )
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise EmbodimentError(
                f"the embodiment's name {self.name!r:.100} is also that of files",
                fix="use letters, digits, spaces, dots, dashes and underscores, at most 100, a letter or digit first",
            )
        if not (math.isfinite(self.rate_hz) and self.rate_hz > 0):
            raise EmbodimentError(f"{self.name}: rate_hz must be positive, got {self.rate_hz}")
        if self.action_form not in ACTION_FORMS:
            raise EmbodimentError(f"{self.name}: action_form is {self.action_form!r}", fix=f"use one of {ACTION_FORMS}")
        object.__setattr__(self, "grippers", tuple(self.grippers))
        for gripper in self.grippers:
            self._check_gripper(gripper)
        named = [gripper.axis for gripper in self.grippers]
        if len(set(named)) < len(named):
            raise EmbodimentError(f"{self.name}: an axis is a gripper twice: {named}", fix="name each gripper once")

    def _check_gripper(self, gripper: Gripper) -> None:
        if not (math.isfinite(gripper.open) and math.isfinite(gripper.closed)):
            raise EmbodimentError(f"{self.name}: the gripper's open and closed must be finite, got {gripper}")
        if self.action is None or gripper.axis not in self.action.names:
            raise EmbodimentError(f"{self.name}: the gripper axis {gripper.axis!r} is not an action axis")
        at, slack = self.action.names.index(gripper.axis), 0.1 * abs(gripper.closed - gripper.open)
        least, most = self.action.minimum[at], self.action.maximum[at]
        for which, value in (("open", gripper.open), ("closed", gripper.closed)):
            if not least - slack <= value <= most + slack:  # the data's range may lack what is never quite reached
                raise EmbodimentError(
                    f"{self.name}: the gripper's {which} is {value:g}, axis {gripper.axis!r} is limited to "
                    f"{least:g}..{most:g}",
                    fix="give the value that the robot is sent, or wider limits",
                )

    @property
    def vectors(self) -> dict[str, Axes]:
        """The axes of every vector stream that this robot has: `proprio`, `action`, and its further ones."""
        own = {name: getattr(self, name) for name in OWN_VECTORS}
        return {name: axes for name, axes in own.items() if axes is not None} | dict(self.streams)

    def with_vectors(self, vectors: Mapping[str, Axes]) -> Embodiment:
        """The contract with other axes of some vector streams, which it may lack so far."""
        own = {name: axes for name, axes in vectors.items() if name in OWN_VECTORS}
        further = {name: axes for name, axes in vectors.items() if name not in OWN_VECTORS}
        return replace(self, **own, streams={**self.streams, **further})

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the SHA-256 of the canonical JSON of every field."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        data = json.loads(json.dumps(asdict(self)))
        for axes in (*(data[name] for name in OWN_VECTORS), *data["streams"].values()):
            if axes is not None and axes["max_step"] is None:
                del axes["max_step"]
        if not data["streams"]:  # contracts from before there were such fields keep their fingerprints
            del data["streams"]
        grippers = data.pop("grippers")  # written as null, one object, or several
        return data | {"gripper": grippers if len(grippers) > 1 else grippers[0] if grippers else None}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Embodiment:
        """Raises: EmbodimentError for missing or unknown fields."""
        try:
            data = dict(data)
            data["cameras"] = tuple(Camera(**camera) for camera in data.get("cameras") or ())
            for part in OWN_VECTORS:
                if data.get(part) is not None:
                    data[part] = Axes(**data[part])
            if data.get("gripper") and data.get("grippers"):
                raise EmbodimentError("a contract has both gripper and grippers", fix="write one of the two")
            given = data.pop("gripper", None) or data.pop("grippers", None) or ()
            data["grippers"] = tuple(Gripper(**one) for one in ([given] if isinstance(given, Mapping) else given))
            data["streams"] = {name: Axes(**axes) for name, axes in (data.get("streams") or {}).items()}
            return cls(**data)
        except (TypeError, AttributeError, ValueError) as error:
            raise EmbodimentError(f"not a valid embodiment: {error}") from error

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Embodiment:
        try:
            data = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise EmbodimentError(f"cannot read the embodiment {path}: {error}") from error
        return cls.from_dict(data)

    def differences(self, other: Embodiment) -> list[str]:
        """The fields in which two contracts differ, as `field: mine, theirs`."""

        def walk(prefix: str, mine: Any, theirs: Any) -> list[str]:
            if isinstance(mine, dict) and isinstance(theirs, dict):
                keys = sorted(set(mine) | set(theirs))
                return [line for key in keys for line in walk(f"{prefix}{key}.", mine.get(key), theirs.get(key))]
            return [] if mine == theirs else [f"{prefix[:-1]}: {mine} against {theirs}"]

        return walk("", self.to_dict(), other.to_dict())

    def require_same(self, other: Embodiment, *, mine: str, theirs: str) -> None:
        """Raises: FingerprintError that names each differing field, when the contracts differ."""
        if self.fingerprint != other.fingerprint:
            lines = "; ".join(self.differences(other))
            raise FingerprintError(f"embodiment {self.name!r} differs between {mine} and {theirs}: {lines}")
