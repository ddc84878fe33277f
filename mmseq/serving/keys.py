"""The keys of an observation: ours, openpi's spellings of them, and a client's own names for them.

openpi's: `/` for `.`, `state`, nested `images`, `observation/image` (the only or the first camera) and
`observation/<camera>_image`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmseq.embodiment import Embodiment
from mmseq.errors import ConfigError, did_you_mean
from mmseq.serving.chunking import TURN_KEYS
from mmseq.serving.errors import RequestError
from mmseq.serving.policy import Contract, image_keys

IMAGES = "observation.images."
STATE = "observation.state"
OTHER_KEYS = ("prompt", "embodiment", "embodiment_fingerprint", "action_prefix", "options")
PREDICT_KEYS = ("question", "plan", "action", "rate_hz", "step")  # that a `predict` may have as well


def canonical_keys(
    observation: Mapping[str, Any], embodiment: Embodiment, aliases: Mapping[str, str]
) -> dict[str, Any]:
    """The observation under our keys; openpi's spellings and `aliases` renamed.

    Raises: RequestError when two keys mean the same thing.
    """
    cameras = [camera.name for camera in embodiment.cameras]
    flat: dict[str, Any] = {}

    def put(key: str, value: Any) -> None:
        ours = aliases.get(key) or _ours(key, cameras)
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
    return flat


def check_aliases(aliases: Mapping[str, str], contract: Contract) -> None:
    """Raises: ConfigError for an alias of a key that no observation has."""
    bodies = contract.embodiments.values()
    known = {STATE, *OTHER_KEYS, *PREDICT_KEYS, *TURN_KEYS, "observation", "images"}
    known |= {key for body in bodies for key in (*image_keys(body), *contract.required(body))}
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
    if name == "image" and cameras:
        return IMAGES + cameras[0]
    if name in cameras:
        return IMAGES + name
    if name.removesuffix("_image") in cameras:
        return IMAGES + name.removesuffix("_image")
    return key
