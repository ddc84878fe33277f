"""Pictures in the forms that others store, as uint8 (H, W, 3) RGB: encoded or raw, of any channel order and type.

==========================================  ==================================================================
stored as                                   read as
==========================================  ==================================================================
JPEG, PNG, ... in a row of bytes            decoded, and turned as its EXIF orientation says; padding behind it does
                                            not matter. Rows of uint8, of any length, numpy's `S<n>` and `V<n>`,
                                            byte strings
integers 0 to 255                           as they are, (H, W, 3) or (3, H, W); grey is repeated
floats 0 to 1, or whole floats 0 to 255     scaled to 0 to 255; which of the two it is, the whole episode says
a fourth channel that hides nothing         without it
==========================================  ==================================================================

Anything else would lose something (depth, 16 bits, normalised values, transparency) and is refused with the way out.
Whether red and blue were swapped (OpenCV's order given to an encoder that wants RGB) no file says: `changed.py`.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from mmseq.errors import DataError

_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"BM", b"GIF8", b"II*\0", b"MM\0*")  # how encoded pictures begin
_CHANNELS = (1, 3, 4)
_COLOURS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")  # PIL's modes of 8 bits


def as_bytes(value: Any) -> bytes | None:
    """The bytes of an encoded picture in any of the forms in use, None for what is none of them."""
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, np.void):
        return value.tobytes()
    array = np.asarray(value)
    if array.ndim == 1 and array.dtype in (np.uint8, np.int8):
        return array.tobytes()
    if array.size == 1 and array.dtype.kind in "SVO":  # one byte string, perhaps in an array of its own
        return as_bytes(array.reshape(-1)[0])
    return None


def is_encoded(value: Any) -> bool:
    """Whether a value begins as a JPEG, PNG or another encoded picture does."""
    data = as_bytes(value)
    return data is not None and data.startswith(_MAGIC)


def has_picture_shape(shape: Sequence[int]) -> bool:
    """Whether arrays of this shape, without the axis of time, may be pictures with channels first or last."""
    return len(shape) == 3 and min(shape) > 0 and (shape[2] in _CHANNELS or shape[0] in _CHANNELS)


def decode_picture(data: bytes, where: str) -> np.ndarray:
    """An encoded picture as uint8 (H, W, 3). Raises: DataError when it is none, or holds more than 8 bits of colour."""
    try:
        with Image.open(io.BytesIO(data)) as stored:
            if stored.mode not in _COLOURS:
                raise DataError(
                    f"{where} is a picture of mode {stored.mode}, more than 8 bits of one channel",
                    fix="leave this camera out if it is depth; else store it as 8-bit colour",
                )
            turned = _turned(stored, where)
            if "A" in turned.getbands() or "transparency" in turned.info:
                return _opaque(np.asarray(turned.convert("RGBA")), where)
            return np.asarray(turned.convert("RGB"))
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        begins = data[:8].hex(" ")
        raise DataError(
            f"{where} is no picture ({len(data)} bytes that begin with {begins or 'nothing'})",
            fix="record the episode again, or take it out",
        ) from error


def _turned(stored: Image.Image, where: str) -> Image.Image:
    """A picture as its EXIF orientation says, which is how LeRobot and OpenCV read it."""
    try:
        return ImageOps.exif_transpose(stored)
    except (struct.error, TypeError, AttributeError) as error:  # what PIL raises for other tags that are damaged
        raise DataError(f"{where} has EXIF data that are damaged", fix="store it without EXIF, turned") from error


def to_rgb(values: Callable[[], Iterator[Any]], where: str) -> Iterator[np.ndarray]:
    """The pictures of one camera in one episode, one at a time.

    values: makes an iterator of them as stored, more than once: the range of floats is that of all of them.
    Raises: DataError naming the step and the way out.
    """
    scale: float | None = None
    for step, value in enumerate(values()):
        at = f"{where} of step {step}"
        data = as_bytes(value)
        if data is not None:
            yield decode_picture(data, at)
            continue
        image = np.asarray(value)
        if image.dtype.kind == "f":
            scale = _float_scale(values(), where) if scale is None else scale
            image = np.rint(image.astype(np.float64) * scale).astype(np.uint8)
        elif image.dtype != np.uint8:
            image = _narrow(image, at)
        yield _last_channels(image, at)


def _float_scale(values: Iterator[Any], where: str) -> float:
    """What makes 0 to 255 of all these floats."""
    low, high, whole = np.inf, -np.inf, True
    for value in values:
        array = np.asarray(value)
        low, high = min(low, float(array.min(initial=np.inf))), max(high, float(array.max(initial=-np.inf)))
        whole = whole and bool((array == np.rint(array)).all())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise DataError(f"{where} holds pictures with values that are not finite", fix="leave out the episode")
    if low >= 0 and high <= 1:
        return 255.0
    if whole and low >= 0 and high <= 255:
        return 1.0
    raise DataError(
        f"{where} holds pictures of floats from {low:g} to {high:g}",
        fix="undo their normalisation and store 0 to 1 or uint8; leave the camera out if it is depth",
    )


def _narrow(image: np.ndarray, where: str) -> np.ndarray:
    """Integers of another width, or truth values, as uint8 where nothing is lost."""
    if image.dtype.kind in "iu" and image.size and image.min() >= 0 and image.max() <= 255:
        return image.astype(np.uint8)
    extent = f" from {image.min()} to {image.max()}" if image.dtype.kind in "iu" and image.size else ""
    raise DataError(
        f"{where} is {image.dtype} {image.shape}{extent}, expected 8 bits of colour",
        fix="leave the camera out if it is depth or a mask; else store it as uint8",
    )


def _last_channels(image: np.ndarray, where: str) -> np.ndarray:
    if image.ndim == 2:
        image = image[:, :, None]
    if image.ndim == 3 and image.shape[2] not in _CHANNELS and image.shape[0] in _CHANNELS:
        image = np.moveaxis(image, 0, 2)
    if image.ndim != 3 or image.shape[2] not in _CHANNELS or not image.size:
        raise DataError(
            f"{where} is {image.dtype} {image.shape}, expected (height, width, 3)",
            fix="store one picture per step, or leave the camera out",
        )
    if image.shape[2] == 4:
        return _opaque(image, where)
    return np.ascontiguousarray(image if image.shape[2] == 3 else np.repeat(image, 3, axis=2))


def _opaque(image: np.ndarray, where: str) -> np.ndarray:
    if (image[:, :, 3] != 255).any():
        raise DataError(
            f"{where} has a fourth channel that is not 255 everywhere",
            fix="store colour alone: what is transparent has no colour, and depth has no place in a picture",
        )
    return np.ascontiguousarray(image[:, :, :3])
