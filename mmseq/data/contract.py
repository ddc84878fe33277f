"""Contract: the embodiment of a dataset that has none, from what the dataset says and what its owner answers.

A LeRobot dataset names its axes, cameras and rate; it does not say in which units they are, nor which value of
the gripper opens it. Both move a robot, so neither is guessed: they are asked for in a small YAML file.

    name: so101
    action_form: absolute        # absolute, delta or velocity
    gripper: {axis: gripper.pos, open: 100.0, closed: 0.0}        # null: it has none; a list: it has several
    proprio: {units: {shoulder_pan.pos: deg, gripper.pos: percent}}
    action: {units: deg, limits: {shoulder_pan.pos: [-90, 90]}}   # one unit for all; limits are optional

`max_step` of an axis, also optional, is its largest change from one control step to the next; the server and the
client hold to it: `action: {units: deg, max_step: {shoulder_pan.pos: 4.0}}`, or one number for all. Further vector
streams of the robot (`force`, `tactile`, ...) are described as `proprio` is.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mmseq.embodiment import ACTION_FORMS, Axes, Embodiment, Gripper
from mmseq.errors import EmbodimentError, did_you_mean
from mmseq.streams import OWN_VECTORS

_WITHIN = 0.9  # the least share of values that limits enclose, if they are of the same unit
_WHOLE = {"rate_hz", "cameras"}  # keys of a whole contract that no form has
KEYS = ("name", "action_form", "gripper")  # and the robot's vector streams, each with AXES_KEYS
AXES_KEYS = ("units", "limits", "max_step")
UNITS = ("rad", "deg", "m", "mm", "rad/s", "deg/s", "m/s", "N", "Nm", "percent", "unitless")
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
_PLACES = ("x", "y", "z", "rx", "ry", "rz", "roll", "pitch", "yaw", "qx", "qy", "qz", "qw")  # where a gripper is


def read_contract(path: str | Path) -> Embodiment | dict[str, Any]:
    """A whole contract, as `Embodiment.save` writes it, or the answers of a form: what a file holds decides, JSON or
    YAML. Raises: EmbodimentError naming the key that is unknown, missing or of the wrong kind."""
    data = _read(path)
    if not _WHOLE & set(data):
        return _checked_answers(data, path)
    try:
        return Embodiment.from_dict(data)
    except EmbodimentError as error:
        only = ", ".join(sorted(_WHOLE & set(data)))
        raise EmbodimentError(
            f"{path}: {error}", fix=f"write a whole contract, or leave out {only}, which a form has not"
        ) from error


def read_answers(path: str | Path) -> dict[str, Any]:
    """What the form in a file says. Raises: EmbodimentError naming the key that is unknown or of the wrong kind."""
    return _checked_answers(_read(path), path)


def _read(path: str | Path) -> dict[str, Any]:
    try:
        text = Path(path).read_text()
        data = json.loads(text) if text.lstrip().startswith("{") and _is_json(text) else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise EmbodimentError(f"cannot read the embodiment {path}: {error}") from error
    if not isinstance(data, dict):
        raise EmbodimentError(f"{path} must hold keys and values, it holds {data!r:.80}")
    return data


def _is_json(text: str) -> bool:
    """YAML reads some numbers of JSON, such as 1e-05, as texts."""
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _checked_answers(data: dict[str, Any], path: str | Path) -> dict[str, Any]:
    for part in (key for key in data if key not in KEYS):
        given = data[part] or {}
        known = [*KEYS, *OWN_VECTORS]
        if part not in known and (difflib.get_close_matches(str(part), known) or not isinstance(given, dict)):
            raise EmbodimentError(f"{path}: unknown key {part!r}: {did_you_mean(str(part), known)}")
        if not isinstance(given, dict):
            raise EmbodimentError(f"{path}: {part} must hold {' and '.join(AXES_KEYS)}, it holds {given!r:.80}")
        for key in given:
            if key not in AXES_KEYS:
                raise EmbodimentError(f"{path}: unknown key {part}.{key!r}: {did_you_mean(str(key), AXES_KEYS)}")
    return data


def complete(
    inferred: Embodiment, answers: dict[str, Any], *, where: str, values: Mapping[str, np.ndarray] | None = None
) -> Embodiment:
    """The contract that a dataset and its owner make together.

    values: the dataset's own, float (steps, axes) of each stream; the range of an axis with stated limits is that of
    those within. Without them limits must enclose the range.
    Raises: EmbodimentError naming an answer that does not fit, or every question that is still open.
    """
    vectors = inferred.vectors
    for part in (key for key, given in answers.items() if key not in (*KEYS, *vectors) and given):
        raise EmbodimentError(f"{where}: the dataset has no {part}", fix=f"leave {part} out, or fill it with --map")
    seen = values or {}
    robot = inferred.with_vectors(
        {part: _axes(axes, part, answers, where, seen.get(part)) for part, axes in vectors.items()}
    )
    if "name" in answers:
        if not isinstance(answers["name"], str):
            raise EmbodimentError(f"{where}: name is {answers['name']!r:.80}", fix="write a text")
        robot = replace(robot, name=answers["name"])
    if "action_form" in answers:
        if answers["action_form"] not in ACTION_FORMS:
            raise EmbodimentError(
                f"{where}: action_form is {answers['action_form']!r}", fix=f"use one of {', '.join(ACTION_FORMS)}"
            )
        robot = replace(robot, action_form=answers["action_form"])
    given = answers.get("gripper") or []
    grippers = [_gripper(robot, one, where) for one in (given if isinstance(given, list) else [given])]
    robot = replace(robot, grippers=tuple(grippers) or robot.grippers)
    questions = open_questions(robot, answers)
    if questions:
        raise EmbodimentError(f"{where} leaves open {'; '.join(questions)}")
    return robot


def open_questions(robot: Embodiment, answers: dict[str, Any]) -> list[str]:
    """What nobody has said yet."""
    found = []
    if robot.name == "unknown":
        found.append("the name of the robot (name)")
    for part, axes in robot.vectors.items():
        units = (answers.get(part) or {}).get("units")
        if units is None:
            found.append(f"the units of {part} ({part}.units)")
        elif isinstance(units, dict):
            missing = [name for name in axes.names if name not in units]
            if missing:
                found.append(f"the units of {part} {', '.join(missing)} ({part}.units)")
    if robot.action is not None and not robot.grippers and "gripper" not in answers:
        named = _named_grippers(robot.action)
        if named:
            several = "one entry for each in a list; " if len(named) > 1 else ""
            found.append(
                f"which value of {' and of '.join(named)} is open (gripper; {several}null when it is no gripper)"
            )
    return found


def doubts_about(robot: Embodiment) -> list[str]:
    """What a contract that was inferred from data takes for granted, since nobody has said it: a note, or none."""
    units = [part for part, axes in robot.vectors.items() if set(axes.units) == {"unitless"}]
    found = [f"the units of {', '.join(units)} (taken as unitless)"] if units else []
    if robot.action is not None and units:
        found.append(f"whether actions are {', '.join(ACTION_FORMS)} (taken as {robot.action_form})")
    named = _named_grippers(robot.action) if robot.action is not None and not robot.grippers else []
    if named:
        found.append(f"which value of {' and of '.join(named)} is open (taken as no gripper)")
    way = "a server and its robot go by that; say it in a file, and import with --embodiment FILE (docs/files.md)"
    return [f"nobody has said {'; '.join(found)}: {way}"] if found else []


def _named_grippers(axes: Axes) -> list[str]:
    """The axes whose names say that they open and close something: no joints of an arm or of a hand's fingers, and no
    place where a gripper is."""
    found = []
    for name in axes.names:
        words = [word.lower() for word in _WORDS.findall(name)]
        named = any("gripper" in word or word == "jaw" for word in words) or words[-1:] in (["hand"], ["finger"])
        if named and words[-1] not in _PLACES:
            found.append(name)
    return found


def questionnaire(robot: Embodiment) -> str:
    """A contract file for this dataset with what is known filled in, to be completed by hand."""
    lines = ["# What a dataset does not say. Replace every `???`, then pass this file with --embodiment."]
    lines += [f"name: {'???' if robot.name == 'unknown' else robot.name}"]
    if robot.action is not None:
        lines += [f"action_form: {robot.action_form}  # guessed from the names of the axes: absolute, delta, velocity"]
        named = _named_grippers(robot.action)
        if named:
            lines += ["gripper:  # null: it is no gripper"]
        for name in named:
            at = robot.action.names.index(name)
            low, high = robot.action.low[at], robot.action.high[at]
            lines += [f"  # {name} lies between {low:g} and {high:g} in the data"]
            dash = "  - " if len(named) > 1 else "  "
            lines += [f"{dash}axis: {_quoted(name)}"]
            lines += [f"{' ' * len(dash)}{value}: ???" for value in ("open", "closed")]
    for part, axes in robot.vectors.items():
        lines += [f"{part}:", f"  units:  # {', '.join(UNITS)}; one word in place of the list is for all"]
        lines += [
            f"    {_quoted(name)}: ???  # {low:g} to {high:g} in the data"
            for name, low, high in zip(axes.names, axes.low, axes.high)
        ]
        lines += [
            "  # a value beyond these limits, the data's range and a tenth of it, is refused; uncomment to change them"
        ]
        lines += ["  # limits:"]
        rows = zip(axes.names, axes.minimum, axes.maximum)
        lines += [f"  #   {_quoted(name)}: [{low:g}, {high:g}]" for name, low, high in rows]
        if part == "action":
            lines += ["  # the most that an axis may change in a control step, here a tenth of its range; uncomment to"]
            lines += ["  # limit how fast the robot moves, which nothing else does", "  # max_step:"]
            ranges = zip(axes.names, axes.low, axes.high)
            lines += [f"  #   {_quoted(name)}: {(high - low) / 10:.3g}" for name, low, high in ranges]
    return "\n".join(lines) + "\n"


def unknown_units(robot: Embodiment) -> list[str]:
    """Units that are spelled as none of `UNITS`, with what was probably meant."""
    stated = {unit for axes in robot.vectors.values() for unit in axes.units}
    return [f"{unit!r} ({did_you_mean(unit, UNITS)})" for unit in sorted(stated - set(UNITS))]


def _quoted(name: str) -> str:
    return yaml.safe_dump(name, width=1000).splitlines()[0]


def _axes(axes: Axes, part: str, answers: dict[str, Any], where: str, values: np.ndarray | None) -> Axes:
    given = answers.get(part) or {}
    units, limits = given.get("units"), given.get("limits") or {}
    for what, named in (("units", units), ("limits", limits), ("max_step", given.get("max_step"))):
        if isinstance(named, dict):
            for name in named:
                if name not in axes.names:
                    raise EmbodimentError(
                        f"{where}: {part}.{what} names {name!r}: {did_you_mean(str(name), axes.names)}"
                    )
    if units is not None and not isinstance(units, dict):
        units = dict.fromkeys(axes.names, units)
    for name, unit in (units or {}).items():
        if not isinstance(unit, str) or not unit.strip() or unit == "???":
            raise EmbodimentError(f"{where}: {part}.units.{name} is {unit!r}", fix="write a unit such as rad, deg or m")
    lowest, highest, minimum, maximum = (list(v) for v in (axes.low, axes.high, axes.minimum, axes.maximum))
    if not isinstance(limits, dict):
        raise EmbodimentError(f"{where}: {part}.limits must name axes, it holds {limits!r:.80}")
    for name, pair in limits.items():
        at = axes.names.index(name)
        try:
            low, high = (float(x) for x in pair)
        except (TypeError, ValueError) as error:
            raise EmbodimentError(
                f"{where}: {part}.limits.{name} is {pair!r}", fix="write [minimum, maximum]"
            ) from error
        seen = np.array([axes.low[at], axes.high[at]]) if values is None else values[:, at]
        rounding = 1e-4 * (high - low)
        within = seen[(seen >= low - rounding) & (seen <= high + rounding)]
        if len(within) < _WITHIN * len(seen):
            raise EmbodimentError(
                f"{where}: {part}.limits.{name} is [{low:.9g}, {high:.9g}], the data reach from {axes.low[at]:.9g} to "
                f"{axes.high[at]:.9g}",
                fix="check the unit of the limits",
            )
        minimum[at], maximum[at] = low, high
        # what lies beyond is refused episode by episode, so no bins are spent on it
        lowest[at], highest[at] = (float(np.float32(v)) for v in (within.min(), within.max()))
    stated = tuple((units or {}).get(name, unit) for name, unit in zip(axes.names, axes.units))
    ranges = {"low": lowest, "high": highest, "minimum": minimum, "maximum": maximum}
    axes = replace(axes, units=stated, **{name: tuple(values) for name, values in ranges.items()})
    return replace(axes, max_step=_max_step(axes, part, given.get("max_step"), where))


def _max_step(axes: Axes, part: str, given: Any, where: str) -> tuple[float, ...] | None:
    """One number per axis; an axis that is not named may cross its whole range in a step."""
    if given is None:
        return axes.max_step
    if not isinstance(given, dict):
        given = dict.fromkeys(axes.names, given)
    steps = [(high - low) or 1.0 for low, high in zip(axes.minimum, axes.maximum)]
    for name, step in given.items():
        try:
            steps[axes.names.index(name)] = float(step)
        except (TypeError, ValueError) as error:
            raise EmbodimentError(
                f"{where}: {part}.max_step.{name} is {step!r}", fix="write the largest change per control step"
            ) from error
    return tuple(steps)


def _gripper(robot: Embodiment, given: Any, where: str) -> Gripper:
    if not isinstance(given, dict) or set(given) != {"axis", "open", "closed"}:
        raise EmbodimentError(
            f"{where}: gripper is {given!r:.120}",
            fix="write {axis: NAME, open: VALUE, closed: VALUE}, or a list with one of these for each gripper",
        )
    names = robot.action.names if robot.action is not None else ()
    if given["axis"] not in names:
        raise EmbodimentError(f"{where}: gripper.axis is {given['axis']!r}: {did_you_mean(str(given['axis']), names)}")
    values = {}
    for key in ("open", "closed"):
        try:
            values[key] = float(given[key])
        except (TypeError, ValueError) as error:
            raise EmbodimentError(
                f"{where}: gripper.{key} is {given[key]!r}", fix="write the number that the robot is sent"
            ) from error
    if values["open"] == values["closed"]:
        raise EmbodimentError(f"{where}: gripper.open and gripper.closed are both {values['open']:g}")
    return Gripper(axis=given["axis"], **values)
