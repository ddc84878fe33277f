"""Checks an observation against the embodiment, before any model sees it.

==============================  =======================  =============================================
`observation.images.<camera>`   uint8 (H, W, 3)          RGB; another size is fitted to the contract's camera
`observation.images.<c>@+16`    uint8 (H, W, 3)          where the policy is given a future image (a goal); of a
                                                         future video[n] (n, H, W, 3); vectors likewise
`observation.state`             float32 (proprio,)       in the order and units of the contract
`observation.<stream>`          float32 (axes,)          each further vector stream of the contract, such as `force`
`prompt`                        text                     the instruction
`embodiment`                    text, or its whole dict  which robot; may be left out if there is one
`embodiment_fingerprint`        text                     refused unless it is the server's
`action_prefix`                 float32 (n, action)      actions already committed, 0 <= n < horizon
`options`                       map                      passed on to the policy
`step`, `delay`, ...                                     see `chunking.Turn`
==============================  =======================  =============================================

Other spellings of these keys are in `keys`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from mmseq_client import contract as client
from mmseq_client.images import fit
from mmseq_client.rules import inward, rounding

from mmseq.embodiment import Axes, Camera, Embodiment
from mmseq.errors import EmbodimentError, did_you_mean
from mmseq.serving.chunking import TURN_KEYS
from mmseq.serving.errors import RequestError
from mmseq.serving.keys import DEMO, IMAGES, OTHER_KEYS, PREDICT_KEYS, canonical_keys, image_keys, vector_keys
from mmseq.serving.policy import Contract

ENLARGED = 8  # times, at most: what is smaller is no picture of such a camera
MAX_SHOWN = 4096  # frames of a demonstration
MAX_FITTED = 64 << 20  # bytes of pictures of one key once they are fitted: as many as a message may have
MAX_TEXT = 20_000  # characters: tokenizing more holds up every robot


@dataclass(frozen=True, kw_only=True)
class ObservationRules:
    """How strict the server is."""

    # `refuse`, or `ignore` for clients that send more than the model reads
    unknown_keys: Literal["refuse", "ignore"] = "refuse"
    # a state outside of the contract: `refuse`, `clamp` limits it, `ignore` passes it on
    state_range: Literal["refuse", "clamp", "ignore"] = "refuse"
    aliases: dict[str, str] = field(default_factory=dict)  # a client's own key: ours


def choose_embodiment(observation: Mapping[str, Any], contract: Contract) -> Embodiment:
    """The embodiment an observation is for, after comparing what it says of it.

    Raises: RequestError `fingerprint` that names the fields in which a given contract differs.
    """
    given = observation.get("embodiment")
    name = given.get("name") if isinstance(given, Mapping) else given
    if name is None:
        if len(contract.embodiments) > 1:
            names = ", ".join(contract.embodiments)
            raise RequestError("missing_key", f"'embodiment' is missing; this server has {names}", key="embodiment")
        name = next(iter(contract.embodiments))
    if not isinstance(name, str) or name not in contract.embodiments:
        hint = did_you_mean(str(name), contract.embodiments)
        raise RequestError("refused", f"embodiment {str(name)[:80]!r} is not served: {hint}", key="embodiment")
    mine = contract.embodiments[name]
    if isinstance(given, Mapping):
        try:
            differences = mine.differences(Embodiment.from_dict(dict(given)))
        except (EmbodimentError, TypeError, ValueError) as error:  # arrays and bytes have no place in a contract
            raise RequestError("wrong_type", f"'embodiment': {str(error)[:500]}", key="embodiment") from error
        if differences:
            raise RequestError(
                "fingerprint",
                f"embodiment {name!r} differs between server and client: {'; '.join(differences)}",
                key="embodiment",
                fix="use the contract that the model was trained with",
            )
    fingerprint = observation.get("embodiment_fingerprint")
    if fingerprint is not None and _check_text(fingerprint, "embodiment_fingerprint") != mine.fingerprint:
        raise RequestError(
            "fingerprint",
            f"'embodiment_fingerprint' is {str(fingerprint)[:40]!r}, the server's {name!r} is {mine.fingerprint!r}",
            key="embodiment_fingerprint",
            fix="send the contract as 'embodiment' to have the fields named that differ",
        )
    return mine


def _describe(value: Any) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__


def check_image(value: Any, camera: Camera, *, key: str, frames: bool = False) -> np.ndarray:
    """uint8 (H, W, 3) in the camera's size, or with `frames` also (T, H, W, 3). Raises: RequestError.

    Channels may come first, a batch axis may have one picture, and another size is cropped and scaled as
    `mmseq data import --size` does: nothing is lost that training had.
    """
    expected = f"uint8 ({camera.height}, {camera.width}, 3)"
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8:
        fix = "send 0..255" if isinstance(value, np.ndarray) and value.dtype.kind == "f" else None
        raise RequestError("wrong_type", f"{key!r} is {_describe(value)}, expected {expected}", key=key, fix=fix)
    given = value
    if value.ndim == 4 and len(value) == 1 and not frames:
        value = value[0]
    if value.ndim > 2 and value.shape[-1] != 3 and value.shape[-3] == 3:
        value = np.moveaxis(value, -3, -1)
    height, width = value.shape[-3:-1] if value.ndim > 2 else (0, 0)
    fix = None
    if value.ndim == 2 or value.shape[-1] == 1:
        fix = "send the colours: RGB, not grey or depth"
    elif value.ndim > 2 and 4 in (value.shape[-1], value.shape[-3]) and value.shape[-1] != 3:
        fix = "leave the alpha channel out: RGB has three"
    elif value.ndim == 4 and not (frames and len(value)):
        fix = "send one picture, that of now"
    elif value.ndim not in (3, 4) or value.shape[-1] != 3:
        fix = "send RGB with the channels last"
    elif height * ENLARGED < camera.height or width * ENLARGED < camera.width:
        fix = f"send at least a {ENLARGED}th of the contract's size, or serve a policy of smaller pictures"
    if fix is not None:
        raise RequestError("wrong_shape", f"{key!r} is {_describe(given)}, expected {expected}", key=key, fix=fix)
    many = len(value) if value.ndim == 4 else 1
    if many * camera.height * camera.width * 3 > MAX_FITTED:  # enlarging them would keep other robots waiting
        raise RequestError(
            "too_large",
            f"{key!r} has {many} pictures for a camera of {camera.height} x {camera.width}",
            key=key,
            fix=f"send at most {MAX_FITTED // (camera.height * camera.width * 3)}",
        )
    if (height, width) == (camera.height, camera.width):
        return value
    fitted = [
        fit(np.ascontiguousarray(one), camera.height, camera.width) for one in value.reshape(-1, height, width, 3)
    ]
    return np.stack(fitted) if value.ndim == 4 else fitted[0]


def check_vectors(value: Any, axes: Axes, *, key: str, ndim: int, out_of_range: str = "refuse") -> np.ndarray:
    """float32 (axes,) for ndim 1, (n, axes) for ndim 2, in the axes' limits.

    Raises: RequestError that names the axis, what was got and what is expected.
    """
    expected = f"float32 {f'(n, {len(axes)})' if ndim == 2 else f'({len(axes)},)'} for axes {list(axes.names)}"
    if isinstance(value, list):  # from JSON and from clients without arrays
        try:
            with np.errstate(over="ignore"):
                value = np.asarray(value, dtype=np.float32)
        except (ValueError, TypeError, OverflowError) as error:
            raise RequestError(
                "wrong_type", f"{key!r} is not a list of numbers, expected {expected}", key=key
            ) from error
        if ndim == 2 and not value.size:
            value = value.reshape(0, len(axes))
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf":
        raise RequestError("wrong_type", f"{key!r} is {_describe(value)}, expected {expected}", key=key)
    if ndim == 1 and value.ndim == 2 and len(value) == 1:  # a batch of one
        value = value[0]
    if value.ndim != ndim or value.shape[-1] != len(axes):
        raise RequestError("wrong_shape", f"{key!r} is {_describe(value)}, expected {expected}", key=key)
    with np.errstate(over="ignore"):
        value = value.astype(np.float32, copy=False)
    bad = ~np.isfinite(value)
    if bad.any():
        axis = axes.names[np.argwhere(bad)[0][-1]]
        raise RequestError("not_finite", f"{key!r} axis {axis!r} is {value[bad][0]}, expected a finite number", key=key)
    if out_of_range == "ignore":
        return value
    low, high = inward(axes.minimum, axes.maximum)
    slack = rounding(low, high)
    outside = (value < low - slack) | (value > high + slack)
    if outside.any() and out_of_range == "refuse":
        where = tuple(np.argwhere(outside)[0])
        i = where[-1]
        raise RequestError(
            "out_of_range",
            f"{key!r} axis {axes.names[i]!r} is {value[where]:.5g}, expected {axes.minimum[i]:.5g}.."
            f"{axes.maximum[i]:.5g} {axes.units[i]}",
            key=key,
            fix="check the unit and the order of the axes against the contract",
        )
    return np.clip(value, low, high)


def _check_text(value: Any, key: str) -> str:
    if isinstance(value, np.ndarray) and value.dtype.kind == "U" and value.size == 1:
        return str(value.reshape(())[()])
    if not isinstance(value, str):
        raise RequestError("wrong_type", f"{key!r} is {_describe(value)}, expected text", key=key)
    if len(value) > MAX_TEXT:
        raise RequestError("too_large", f"{key!r} has {len(value)} characters, at most {MAX_TEXT} are read", key=key)
    return value


def _check_given(key: str, value: Any, embodiment: Embodiment, rules: ObservationRules, *, frames: bool) -> Any:
    """One stream by its key; None when the key is not known."""
    base, at, _ = key.partition("@")
    shown = base.startswith(DEMO)  # a clip, of whatever length
    frames = frames or bool(at)  # likewise, that ends there
    camera = base.removeprefix(DEMO if shown else IMAGES)
    cameras = {camera.name: camera for camera in embodiment.cameras}
    if base != camera and camera in cameras:
        if (shown or at) and np.ndim(value) == 4 and len(value) > MAX_SHOWN:
            raise RequestError("too_large", f"{key!r} has {len(value)} frames, at most {MAX_SHOWN} are read", key=key)
        return check_image(value, cameras[camera], key=key, frames=frames or shown)
    if base in (plans := vector_keys(embodiment, "commanded")):
        found = check_vectors(value, plans[base], key=key, ndim=2)
    else:
        axes = vector_keys(embodiment).get(base)
        if axes is None:
            return None
        many = frames and isinstance(value, np.ndarray) and value.ndim == 2
        found = check_vectors(value, axes, key=key, ndim=2 if many else 1, out_of_range=rules.state_range)
    if not len(found):
        raise RequestError("wrong_shape", f"{key!r} is {_describe(value)}, expected one step or more", key=key)
    return found


def check_observation(
    observation: Mapping[str, Any], contract: Contract, rules: ObservationRules
) -> tuple[dict[str, Any], Embodiment]:
    """The observation of an `infer`, under our keys and in our dtypes, and the embodiment it is for.

    Raises: RequestError that names the key, what was got and what is expected.
    """
    embodiment = choose_embodiment(observation, contract)
    flat = canonical_keys(observation, embodiment, rules.aliases)
    required = contract.required(embodiment)
    kept, frames = contract.kept_keys.get(embodiment.name, ()), contract.history > 1
    for key in required:
        if key not in flat and key not in kept:
            expected = ", ".join(required)
            raise RequestError(
                "missing_key", f"{key!r} is missing; expected {expected}; got {sorted(flat)[:20]}", key=key
            )
    if contract.reads_prompt:
        if flat.get("prompt") is None:
            raise RequestError("missing_key", "'prompt' is missing; the policy is given text", key="prompt")
        if not _check_text(flat["prompt"], "prompt").strip():
            raise RequestError("out_of_range", "'prompt' is empty", key="prompt", fix="say what is to be done")
    cameras = {IMAGES + camera.name: camera for camera in embodiment.cameras}
    known = {*cameras, *required, *kept, *vector_keys(embodiment), *OTHER_KEYS, *(("past_actions",) if frames else ())}
    checked: dict[str, Any] = {}
    for key, value in flat.items():
        if key in cameras:
            stacked = frames and isinstance(value, np.ndarray) and value.ndim == 4
            value = value[-contract.history :] if stacked else value  # nobody looks farther back
            checked[key] = check_image(value, cameras[key], key=key, frames=frames)
        elif key not in known:
            if rules.unknown_keys == "refuse":
                raise RequestError(
                    "unknown_key",
                    f"{key[:80]!r} is not known: {did_you_mean(key[:80], known | set(TURN_KEYS))}",
                    key=key,
                )
        elif key == "prompt":
            checked[key] = _check_text(value, key)
        elif key == "options":
            checked[key] = _check_options(value, contract)
        elif key == "action_prefix":
            prefix = _check_prefix(value, embodiment, contract)
            if len(prefix):
                checked[key] = prefix
        elif key == "past_actions":
            assert embodiment.action is not None
            did = check_vectors(value, embodiment.action, key=key, ndim=2, out_of_range="clamp")
            if len(did):
                checked[key] = did[1 - contract.history :]
        elif key not in ("embodiment", "embodiment_fingerprint"):
            checked[key] = _check_given(key, value, embodiment, rules, frames=frames)
            if checked[key] is None:
                raise RequestError("refused", f"embodiment {embodiment.name!r} has no {key!r}", key=key)
    checked["embodiment"] = embodiment.name
    return checked, embodiment


def _check_options(value: Any, contract: Contract) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise RequestError(
            "wrong_type", f"'options' is {_describe(value)}, expected a map with text keys", key="options"
        )
    known = contract.extra.get("options", value)
    for name in value:
        if name not in known:
            what = f"options.{name[:80]} is not known: {did_you_mean(name[:80], known)}"
            raise RequestError("unknown_key", what, key="options")
    temperature, seed = value.get("temperature", 0.0), value.get("seed", 0)
    if type(temperature) not in (int, float) or not 0 <= temperature <= 1e6:  # the decoder knows what it can do
        raise RequestError(
            "out_of_range", f"options.temperature is {temperature!r:.40}, expected a number from 0 on", key="options"
        )
    if type(seed) is not int or not 0 <= seed < 1 << 63:
        raise RequestError(
            "out_of_range", f"options.seed is {seed!r:.40}, expected a whole number from 0 on", key="options"
        )
    return value


def _check_prefix(value: Any, embodiment: Embodiment, contract: Contract) -> np.ndarray:
    key = "action_prefix"
    if not contract.prefix:
        raise RequestError("refused", f"{key!r} is not understood by {contract.name}", key=key, fix="leave it out")
    assert embodiment.action is not None
    prefix = check_vectors(value, embodiment.action, key=key, ndim=2)
    if len(prefix) >= contract.horizon:
        raise RequestError(
            "out_of_range", f"{key!r} has {len(prefix)} steps, expected fewer than {contract.horizon}", key=key
        )
    return prefix


def check_given(
    observation: Mapping[str, Any], contract: Contract, rules: ObservationRules, arrow: str = ""
) -> tuple[dict[str, Any], Embodiment]:
    """The given streams of a `predict`: any arrow may need any of them, so none is required here.

    Beside the keys of `infer`: a time offset as in `observation.images.front@+16`, frames (T, H, W, 3) for
    video, `action` float32 (n, axes), and further streams that the arrow names: text, finite numbers or arrays.
    """
    embodiment = choose_embodiment(observation, contract)
    named = {*PREDICT_KEYS, *re.findall(r"[a-z_]+", contract.tasks.get(arrow, arrow))}
    checked: dict[str, Any] = {}
    for key, value in canonical_keys(observation, embodiment, rules.aliases).items():
        if key in ("embodiment", "embodiment_fingerprint"):
            continue
        if key == "prompt":
            checked[key] = _check_text(value, key)
        elif key == "options":
            checked[key] = _check_options(value, contract)
        elif key == "action_prefix":
            checked[key] = _check_prefix(value, embodiment, contract)
        elif (stream := _check_given(key, value, embodiment, rules, frames=True)) is not None:
            checked[key] = stream
        elif key.startswith("observation."):
            known = [*image_keys(embodiment), *vector_keys(embodiment)]
            raise RequestError("unknown_key", f"{key[:80]!r} is not known: {did_you_mean(key[:80], known)}", key=key)
        elif key.partition("@")[0] in named:
            checked[key] = _check_other(key, value)
        elif rules.unknown_keys == "refuse":
            known = [*image_keys(embodiment), *vector_keys(embodiment), *OTHER_KEYS, *PREDICT_KEYS]
            raise RequestError("unknown_key", f"{key[:80]!r} is not known: {did_you_mean(key[:80], known)}", key=key)
    checked["embodiment"] = embodiment.name
    return checked, embodiment


def _check_other(key: str, value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic | int | float):
        if np.asarray(value).dtype.kind == "f" and not np.isfinite(value).all():
            raise RequestError("not_finite", f"{key[:80]!r} holds a number that is not finite", key=key)
    elif not isinstance(value, str):
        raise RequestError("wrong_type", f"{key[:80]!r} is {_describe(value)}, expected text or an array", key=key)
    return value


def example_observation(embodiment: Embodiment, *, seed: int = 0) -> dict[str, Any]:
    """A valid random observation of `embodiment`: to try a server, to warm a model up, in tests."""
    return client.example_observation(embodiment.to_dict(), seed)
