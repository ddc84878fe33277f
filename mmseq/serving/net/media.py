"""Predicted images and videos as files: PNG and MP4, for programs that have no use for arrays."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np

from mmseq.mp4 import encode_video
from mmseq.serving.errors import RequestError

KINDS = ("array", "png", "mp4")


def is_picture(value: Any) -> bool:
    """Whether it is uint8 (H, W, 3), or (T, H, W, 3)."""
    return isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim in (3, 4) and value.shape[-1] == 3


def png(image: np.ndarray) -> bytes:
    """uint8 (H, W, 3) as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, "png")
    return buffer.getvalue()


def as_file(value: np.ndarray, kind: str, rate_hz: float) -> tuple[str, bytes | list[bytes]]:
    """Media type and bytes of a picture: MP4 of a video where `kind` is mp4, else PNG, one for each frame."""
    if value.ndim == 3:
        return "image/png", png(value)
    if kind == "png":
        return "image/png", [png(frame) for frame in value]
    return "video/mp4", encode_video(iter(value), rate_hz)[0]


def as_files(prediction: dict[str, Any], kind: str, rate_hz: float, *, text: bool) -> dict[str, Any]:
    """The prediction with each picture as `{"content_type": ..., "data": ...}`. text: base64 in place of bytes."""
    if kind == "array":
        return prediction
    found: dict[str, Any] = {}
    for key, value in prediction.items():
        if not is_picture(value):
            found[key] = value
            continue
        content_type, data = as_file(value, kind, rate_hz)
        if text:
            encode = lambda one: base64.b64encode(one).decode()
            data = [encode(one) for one in data] if isinstance(data, list) else encode(data)  # type: ignore[assignment]
        found[key] = {"content_type": content_type, "data": data}
    return found


def only_file(prediction: dict[str, Any], content_type: str, rate_hz: float) -> bytes:
    """The one picture of a prediction as a file. Raises: RequestError when there is none, several, or another kind."""
    pictures = [value for value in prediction.values() if is_picture(value)]
    if len(pictures) == 1:
        found, data = as_file(pictures[0], "mp4", rate_hz)
        if found == content_type and isinstance(data, bytes):
            return data
    kinds = {
        key: "video/mp4" if value.ndim == 4 else "image/png" for key, value in prediction.items() if is_picture(value)
    }
    raise RequestError(
        "unsupported",
        f"Accept is {content_type}, and the arrow predicts {kinds or 'no picture'}",
        fix='send "as": "png" or "mp4" to have every picture in one reply',
    )
