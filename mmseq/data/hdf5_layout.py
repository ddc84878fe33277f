"""What lies where in HDF5 demonstrations of robomimic (also LIBERO, MimicGen, RoboCasa) and of ALOHA (also ACT, RDT).

`columns_of` lists what a demonstration holds, `find_streams` says what fills which stream, `facts_of` what the file
says of the robot, and `phrasings` takes instructions out of whatever they were written as.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmseq.data.mapping import Column, Streams
from mmseq.data.pictures import has_picture_shape, is_encoded

ACTIONS = ("actions", "action")
PROPRIO = (  # joined in this order
    "robot0_eef_pos",
    "robot0_eef_quat",
    "robot0_gripper_qpos",
    "robot1_eef_pos",
    "robot1_eef_quat",
    "robot1_gripper_qpos",
    "ee_pos",
    "ee_ori",
    "joint_states",
    "gripper_states",
)
WHOLE_PROPRIO = ("qpos", "state", "proprio", "robot_state", "joint_pos", "joint_positions", "robot0_joint_pos")
SUCCESS = ("success", "is_success", "successful", "task_success", "success_label", "outcome")
ENDS = ("rewards", "dones")  # of robomimic: they say how a demonstration ended where they tell some from others
_RATES = ("fps", "control_freq", "control_hz", "frequency", "rate_hz", "hz")
_FORMS = ("action_form", "action_type", "action_mode", "control_mode")
_TEXT = re.compile(
    r"(raw_)?lang(uage)?(_instructions?|_raw|_annotations?|_goal)?(_\d+)?|instructions?(_raw)?(_\d+)?|raw_instructions?"
    r"|task_descriptions?|prompts?|captions?|commands?|ep_meta"
)
_IN_JSON = ("lang", "language", "language_instruction", "instruction", "instructions", "task_description", "prompt")
_PICTURE = re.compile(r"image|rgb|colou?r|(^|/|_)cam")
_NO_PICTURE = re.compile(r"depth|mask|seg|flow|normal|points?|xyz")
_SKIPPED = ("next_obs",)  # `obs`, one step later
_NOT_ARMS = re.compile(r"base|torso|head|leg|grip")
_OF_THE_FILE = (*_RATES, *_FORMS, "env_args", "robot", "robot_type")  # attributes that `facts_of` reads
_YES, _NO = ("success", "succeeded", "true", "yes", "1"), ("failure", "fail", "failed", "false", "no", "0")
_LONG_TEXT = 2000  # an attribute that is longer is a model or a log, not a text about the episode


@dataclass(frozen=True)
class Entry:
    """A dataset or attribute of a demonstration. steps: of a dataset along its first axis, None where it has none."""

    column: Column
    steps: int | None = None
    width: int = 0
    attribute: bool = False


def natural(name: str) -> list[Any]:
    """Sorts `demo_10` behind `demo_9`."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]


def columns_of(group: Any) -> dict[str, Entry]:
    """Everything that a demonstration holds, by its path in the group; an attribute by its name."""
    found = dict(_datasets(group))
    for name, value in group.attrs.items():
        last = name.lower()
        if last in _OF_THE_FILE:
            continue
        if last in SUCCESS:
            found.setdefault(name, Entry(Column("flag", "an attribute"), attribute=True))
        elif (_TEXT.fullmatch(last) or _is_short_text(value)) and _text_kind(value):
            found.setdefault(name, Entry(Column("text", "an attribute"), attribute=True))
    return found


def _text_kind(value: Any) -> bool:
    return isinstance(value, (str, bytes)) or (isinstance(value, np.ndarray) and value.dtype.kind in "SUO")


def _is_short_text(value: Any) -> bool:
    return isinstance(value, (str, bytes)) and 0 < len(value) <= _LONG_TEXT


def _datasets(group: Any, prefix: str = "") -> Iterator[tuple[str, Entry]]:
    for name in sorted(group, key=natural):
        path = prefix + name
        try:
            item = group[name]
        except (KeyError, OSError, RuntimeError):
            yield path, Entry(Column("other", "a broken link"))
            continue
        if hasattr(item, "shape"):
            yield path, _entry(path, item)
        elif name not in _SKIPPED:
            yield from _datasets(item, f"{path}/")


def _entry(path: str, dataset: Any) -> Entry:
    if dataset.shape is None:  # h5py's Empty
        return Entry(Column("other", "empty"))
    steps = dataset.shape[0] if dataset.shape else None
    return Entry(_column(path.lower(), dataset), steps, int(np.prod(dataset.shape[1:])) if dataset.ndim <= 3 else 0)


def _column(path: str, dataset: Any) -> Column:
    shape, kind, inner = dataset.shape, dataset.dtype.kind, dataset.shape[1:]
    detail = f"{dataset.dtype} {shape}" if kind != "O" else f"{shape}"
    try:
        first = dataset[0] if shape and shape[0] and len(shape) <= 2 else dataset[()] if shape == () else None
    except (OSError, TypeError, ValueError):  # a type that h5py cannot read
        return Column("other", detail)
    if kind in "SOV" or (len(shape) == 2 and dataset.dtype.itemsize == 1 and kind in "ui"):
        if is_encoded(first) or (kind == "O" and "images/" in path and isinstance(first, np.ndarray)):
            return Column("depth" if "depth" in path else "picture", "encoded")
        if kind in "SO" and (first is None or isinstance(first, (bytes, str, np.ndarray))):
            return Column("text", "texts" if shape else "a text")
        if kind in "SOV":
            return Column("other", detail)
    if kind not in "fiub":
        return Column("other", detail)
    if "depth" in path and len(shape) >= 3:
        return Column("depth", detail)
    grey = len(inner) == 2 and min(inner) >= 8
    if (grey or (has_picture_shape(inner) and sorted(inner)[1] >= 8)) and not _NO_PICTURE.search(path):
        colour = not grey and 3 in (inner[0], inner[2]) and dataset.dtype == np.uint8
        if colour or _PICTURE.search(path):
            return Column("picture", detail)
    if len(inner) == 1 or (len(inner) == 2 and inner[0] == 1):
        return Column("vector", f"{inner[-1]} numbers")
    return Column("flag", "one number") if len(shape) == 1 else Column("other", detail)


def find_streams(demos: Sequence[Mapping[str, Entry]]) -> Streams:
    """What fills each stream of a set of demonstrations, as far as its names say. Parts of the proprio are those that
    most demonstrations have, so that what one lacks does not decide for the others."""
    counts = Counter(name for demo in demos for name in demo)
    kinds = {name: demo[name].column.kind for demo in reversed(demos) for name in demo}
    last = lambda name: name.rpartition("/")[2].lower()
    observed = {last(n): n for n in counts if kinds[n] in ("vector", "flag") and re.match(r"obs(ervations?)?/", n)}
    having = {part: counts[name] for part, name in observed.items()}
    streams: Streams = {}
    for camera, name in _cameras([n for n in sorted(counts, key=natural) if kinds[n] == "picture"]).items():
        streams[f"image.{camera}"] = (name,)
    parts = [p for p in PROPRIO if p in observed]
    parts = [p for p in parts if 2 * having[p] > max(having[q] for q in parts)]
    parts = parts or [p for p in WHOLE_PROPRIO if p in observed][:1]
    streams["proprio"] = tuple(observed[p] for p in parts)
    streams["action"] = tuple(n for n in ACTIONS if kinds.get(n) in ("vector", "flag"))[:1]
    streams["text"] = tuple(n for n in counts if kinds[n] == "text" and _TEXT.fullmatch(last(n)))
    streams["success"] = tuple(n for n in counts if last(n) in SUCCESS and kinds[n] in ("flag", "text", "vector"))[:1]
    return {stream: names for stream, names in streams.items() if names}


def _cameras(names: Sequence[str]) -> dict[str, str]:
    """Cameras by a short name: `obs/front/rgb` and `obs/front_image` are `front`, unless that is taken."""
    found: dict[str, str] = {}
    for name in sorted(names, key=lambda n: not re.search(r"[_/](image|rgb)$", n)):
        path = re.sub(r"(^|/)(images?|rgb)/", r"\1", re.sub(r"^obs(ervations?)?/", "", name))
        whole = re.sub(r"[^A-Za-z0-9_-]+", "_", path).strip("_")
        short = re.sub(r"_(image|rgb)$", "", whole)
        found[short if short and short not in found else whole if whole not in found else f"{whole}_2"] = name
    return dict(sorted(found.items(), key=lambda pair: names.index(pair[1])))


def texts_of(name: str, value: Any) -> list[str]:
    """The texts in a dataset or an attribute; of those that hold JSON, only what that says."""
    return phrasings(_json(value) if name.lower().endswith(("ep_meta", "problem_info")) else value)


def phrasings(value: Any) -> list[str]:
    """The texts in a value of any of the kinds in use: a text, bytes, lists of either, JSON that holds them."""
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if isinstance(value, str):
        text = value.strip("\0 \t\r\n")
        if text[:1] in ("{", "["):
            try:
                return phrasings(json.loads(text))
            except ValueError:
                pass
        return [text] if text else []
    if isinstance(value, Mapping):
        return [text for key in _IN_JSON if key in value for text in phrasings(value[key])]
    if isinstance(value, np.ndarray):
        value = value.reshape(-1).tolist()
    if not isinstance(value, (list, tuple)):
        return []
    texts = [text for item in value for text in phrasings(item)]
    if len(value) > 1 and all(isinstance(item, str) and len(item) <= 1 for item in value):
        return ["".join(value)]  # a text that was taken apart into letters
    return list(dict.fromkeys(texts))


def truth(value: Any) -> bool | None:
    """Whether a flag, one per step, or a word means success; None for what means neither."""
    if isinstance(value, (str, bytes)) or np.asarray(value).dtype.kind in "SUO":
        words = {word.lower() for word in phrasings(value)}
        return True if words & set(_YES) else False if words & set(_NO) else None
    marks = np.asarray(value, dtype=np.float64)
    return bool((marks > 0).any()) if marks.size and (marks >= 0).all() else None


@dataclass(frozen=True)
class Facts:
    """What a file says of all its demonstrations; None where it says nothing."""

    rate_hz: float | None = None
    robot: str | None = None
    action_form: str | None = None
    texts: tuple[str, ...] = ()
    remark: str = ""


def facts_of(*groups: Any) -> Facts:
    """From the attributes of a file's groups, the more telling ones first."""
    stated: dict[str, Any] = {}
    for group in reversed(groups):
        stated |= dict(group.attrs)
    arguments = _json(stated.get("env_args"))
    options = arguments.get("env_kwargs")
    options = options if isinstance(options, dict) else {}
    robots = options.get("robots") or stated.get("robot") or stated.get("robot_type") or []
    robots = [robots] if isinstance(robots, (str, bytes)) else list(robots) if isinstance(robots, Sequence) else []
    name = "_".join(text for r in robots for text in phrasings(r)) or next(
        iter(phrasings(arguments.get("env_name"))), ""
    )
    form, remark = _action_form(options, stated)
    rates = (_number(source.get(key)) for source in (stated, options) for key in _RATES)
    texts = [
        t for key in stated if key == "problem_info" or _TEXT.fullmatch(key.lower()) for t in texts_of(key, stated[key])
    ]
    texts += [t for key in ("env_lang", "lang") for t in phrasings(arguments.get(key) or options.get(key))]
    return Facts(
        rate_hz=next((rate for rate in rates if rate), None),
        robot=re.sub(r"[^\w .-]", "_", name).lstrip("_ .-")[:100] or None,
        action_form=form,
        texts=tuple(dict.fromkeys(texts)),
        remark=remark,
    )


def _json(value: Any) -> dict[str, Any]:
    try:
        found = json.loads(value) if isinstance(value, (str, bytes)) else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _number(value: Any) -> float | None:
    try:
        number = float(np.asarray(value).reshape(-1)[0]) if value is not None else 0.0
    except (TypeError, ValueError, IndexError):
        return None
    return number if np.isfinite(number) and number > 0 else None


def _action_form(options: Mapping[str, Any], stated: Mapping[str, Any]) -> tuple[str | None, str]:
    """How actions are meant, and a remark: what robosuite's controllers say, else a word such as `pd_ee_delta_pose`."""
    forms = dict(_controllers(options.get("controller_configs"), ""))
    arms = {part: form for part, form in forms.items() if not _NOT_ARMS.search(part)} or forms
    if len(set(arms.values())) == 1:
        return next(iter(arms.values())), ""
    if arms:
        return None, "the controllers differ (" + ", ".join(
            f"{p.strip('.') or 'all'} {f}" for p, f in arms.items()
        ) + "), nothing here says"
    for source in (options, stated):
        for key in _FORMS:
            words = "_".join(phrasings(source.get(key))).lower()
            for form, marks in (("delta", r"delta|relative"), ("velocity", r"vel"), ("absolute", r"abs")):
                if re.search(marks, words):
                    return form, ""
    return None, ""


def _controllers(node: Any, part: str) -> Iterator[tuple[str, str]]:
    """(part of the robot, form) of every controller in robosuite's settings, also the nested ones of 1.5."""
    if isinstance(node, list):
        for i, inner in enumerate(node):
            yield from _controllers(inner, f"{part}.{i}" if len(node) > 1 else part)
    if not isinstance(node, dict):
        return
    kind, said = str(node.get("type", "")).upper(), node.get("input_type", node.get("control_delta"))
    if "VELOCITY" in kind:
        yield part, "velocity"
    elif said is not None:
        yield part, "delta" if str(said).lower() in ("delta", "true", "1") else "absolute"
    elif kind in ("OSC_POSE", "OSC_POSITION", "IK_POSE", "JOINT_POSITION"):
        yield part, "delta"  # robosuite's default
    for name, inner in node.items():
        yield from _controllers(inner, f"{part}.{name}")
