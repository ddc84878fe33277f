"""The keys of an observation: those of the table of streams, openpi's spellings, and a client's own names for them.

openpi's: `/` for `.`, `state`, nested `images`, `observation/image` (the only or the first camera),
`observation/<camera>_image`, and a state in parts (`PARTS`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mmseq.embodiment import Axes, Embodiment
from mmseq.errors import ConfigError, did_you_mean
from mmseq.serving.chunking import TURN_KEYS
from mmseq.serving.errors import RequestError
from mmseq.streams import STREAMS, stream_row

if TYPE_CHECKING:
    from mmseq.serving.policy import Contract

IMAGES = str(STREAMS["image"].wire)
DEMO = str(STREAMS["demo"].wire)  # frames of a demonstration, kept for the episode
STATE = str(STREAMS["proprio"].wire)
PARTS = ("observation.joint_position", "observation.gripper_position")  # of the state, as openpi's DROID client has it
OTHER_KEYS = ("prompt", "embodiment", "embodiment_fingerprint", "action_prefix", "options")
# that a `predict` may have as well: what the table gives a key of its own
PREDICT_KEYS = ("rate_hz", "step", *(row.wire for row in STREAMS.values() if row.wire and row.wire == row.name))


def image_keys(embodiment: Embodiment) -> list[str]:
    return [IMAGES + camera.name for camera in embodiment.cameras]


def vector_keys(embodiment: Embodiment, clock: str = "observed") -> dict[str, Axes]:
    """The keys of the vectors that are observed, or `commanded` from now on, and their axes."""
    rows = [(stream_row(name), axes) for name, axes in embodiment.vectors.items()]
    return {str(row.wire): axes for row, axes in rows if row.clock == clock}


def canonical_keys(
    observation: Mapping[str, Any], embodiment: Embodiment, aliases: Mapping[str, str]
) -> dict[str, Any]:
    """The observation under our keys; openpi's spellings and `aliases` renamed, vectors that come in parts joined.

    Raises: RequestError when two keys mean the same thing, or a part is missing.
    """
    cameras = [camera.name for camera in embodiment.cameras]
    flat: dict[str, Any] = {}
    parts: dict[str, list[str]] = {}  # by key of ours, in order
    for theirs, ours in aliases.items():
        parts.setdefault(ours, []).append(theirs)
    parts = {ours: theirs for ours, theirs in parts.items() if len(theirs) > 1}
    joined = {key: key for theirs in parts.values() for key in theirs}  # stay apart until all are there

    def put(key: str, value: Any) -> None:
        ours = joined.get(key) or aliases.get(key) or _ours(key, cameras)
        if ours in ("observation", "images", "observation.images") and isinstance(value, Mapping):
            prefix = "observation." if ours == "observation" else IMAGES
            for name, item in value.items():
                put(prefix + str(name), item)
        elif ours in flat:
            raise RequestError("unknown_key", f"{key!r} gives {ours!r} a second time", key=key)
        else:
            flat[ours] = value

    for key, value in observation.items():
        put(key, value)
    own: dict[str, list[str]] = {STATE: list(PARTS)}
    for ours, theirs in (own | parts).items():
        if ours not in flat and any(key in flat for key in theirs):
            flat[ours] = _join(flat, theirs, ours)
    return flat


def _join(flat: dict[str, Any], keys: list[str], ours: str) -> np.ndarray:
    """The parts of one vector, taken out of `flat`, as one (axes,)."""
    arrays = []
    for key in keys:
        if key not in flat:
            raise RequestError("missing_key", f"{key!r} is missing: {ours!r} is made of {', '.join(keys)}", key=key)
        try:
            array = np.asarray(flat.pop(key))
        except (TypeError, ValueError) as error:
            raise RequestError("wrong_type", f"{key!r} is not a list of numbers", key=key) from error
        array = array[0] if array.ndim == 2 and len(array) == 1 else np.atleast_1d(array)
        if array.dtype.kind not in "iuf" or array.ndim != 1:
            raise RequestError("wrong_type", f"{key!r} is {array.dtype} {array.shape}, expected numbers (n,)", key=key)
        arrays.append(array)
    return np.concatenate(arrays)


def check_aliases(aliases: Mapping[str, str], contract: Contract) -> None:
    """Raises: ConfigError for an alias of a key that no observation has."""
    bodies = contract.embodiments.values()
    known = {*OTHER_KEYS, *PREDICT_KEYS, *TURN_KEYS, "observation", "images"}
    known |= {key for body in bodies for key in (*image_keys(body), *vector_keys(body), *contract.required(body))}
    for theirs, ours in aliases.items():
        if ours not in known and ours.partition("@")[0] not in known:
            raise ConfigError(f"observation.aliases: {theirs!r} is {ours!r}: {did_you_mean(ours, known)}")


def _ours(key: str, cameras: list[str]) -> str:
    if key.startswith(IMAGES) or key in OTHER_KEYS:
        return key.replace("/", ".")
    key = key.replace("/", ".")
    if key == "state":
        return STATE
    if not key.startswith("observation.") or key.startswith(IMAGES):
        return key
    name = key.removeprefix("observation.")
    if name in cameras:
        return IMAGES + name
    if name == "image" and cameras:
        return IMAGES + cameras[0]
    if name.removesuffix("_image") in cameras:
        return IMAGES + name.removesuffix("_image")
    return key
