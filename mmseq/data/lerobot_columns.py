"""Columns of a LeRobot dataset: of what kind each is, by its data and by what meta/info.json says of it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from mmseq.data.lerobot_files import is_number, is_text
from mmseq.data.lerobot_images import stored_depth
from mmseq.data.lerobot_layout import BOOKKEEPING, EVENTS, PERSISTENT, Layout
from mmseq.data.lerobot_video import is_depth
from mmseq.data.mapping import Column
from mmseq.errors import DataError

_IMAGES, _IMAGE = "observation.images.", "observation.image"
SUCCESS = ("next.success", "success", "is_episode_successful", "episode_success", "is_success")
_DEPTH_FLAGS = (("info", "is_depth_map"), ("info", "video.is_depth_map"), ("video_info", "video.is_depth_map"))
_TRUE, _FALSE = ("true", "yes", "success", "successful", "1", "1.0"), ("false", "no", "failure", "failed", "0", "0.0")


def camera_name(column: str) -> str | None:
    """The camera that a column is by its usual name, in characters that a name may have."""
    for prefix in (_IMAGES, f"{_IMAGE}."):
        if column.startswith(prefix):
            name = re.sub(r"[^A-Za-z0-9_-]+", "_", column.removeprefix(prefix).replace(".", "\0"))
            return re.sub(r"[^A-Za-z0-9_-]*\0[^A-Za-z0-9_-]*", ".", name).strip(".") or None
    return "main" if column == _IMAGE else None


def success_of(names: Iterable[str]) -> str | None:
    """The column that says whether an episode reached its goal."""
    names = set(names)
    return next((name for name in SUCCESS if name in names), None)


def truth(value: Any) -> bool | None:
    """Whether a value says success; None when it says nothing."""
    if value is None or value != value:  # NaN
        return None
    word = str(value).strip().lower()
    return True if word in _TRUE else False if word in _FALSE else None


def columns_of(layout: Layout) -> dict[str, Column]:
    """Every column that is no bookkeeping: those of meta/info.json first, then those that only the data have.

    Videos that meta/info.json does not list are there too: whoever took them out of it may have left their files.
    """
    found = {}
    for name in dict.fromkeys((*layout.features, *layout.types, *sorted(layout.filmed))):
        if name in (*BOOKKEEPING, PERSISTENT):
            continue
        feature, type_ = layout.features.get(name, {}), layout.types.get(name)
        dtype, shape = str(feature.get("dtype") or type_), feature.get("shape")
        detail = f"{dtype} {tuple(shape)}" if isinstance(shape, list) else dtype
        kind = _kind(layout, name, feature, type_)
        if name not in layout.features and type_ is None:
            detail = "videos that meta/info.json does not list"
        elif type_ is None and kind == "other":
            detail += ", in no file of the data"
        found[name] = Column(kind, detail)
    return found


def _kind(layout: Layout, name: str, feature: dict[str, Any], type_: pa.DataType | None) -> str:
    if name == EVENTS:
        return "other"
    said = feature.get("dtype")
    stored = type_ is not None and (_holds_pictures(type_) or (said == "image" and is_text(type_)))
    if stored or (type_ is None and (said == "video" or name in layout.filmed)):
        flags = [truth((feature.get(part) or {}).get(flag)) for part, flag in _DEPTH_FLAGS]
        return "depth" if any(flags) or _deep(layout, name, stored) else "picture"
    if type_ is None:
        return "other"
    if is_text(type_):
        return "text"
    if pa.types.is_nested(type_):
        return "vector" if is_number(type_) and feature.get("shape") != [0] else "other"
    if pa.types.is_integer(type_) and name.startswith("annotation."):
        return "text"  # the number of a text among the tasks, as GR00T writes it
    return "vector" if pa.types.is_floating(type_) else "flag" if is_number(type_) else "other"


def _holds_pictures(type_: pa.DataType) -> bool:
    return pa.types.is_struct(type_) or pa.types.is_binary(type_) or pa.types.is_large_binary(type_)


def _deep(layout: Layout, name: str, stored: bool) -> bool:
    """Whether the first picture that can be opened is one of distances."""
    for record in layout.records:
        if record.problem:
            continue
        try:
            if stored:
                return stored_depth(layout.path, record.parts[0][0], name)
            path = layout.video_file(record, name)
        except DataError:
            continue
        if path.is_file():
            return is_depth(path)
    return False
