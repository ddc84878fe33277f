"""msgpack with numpy arrays: a map with `b"__ndarray__"`, `b"data"`, `b"dtype"`, `b"shape"`.

Only plain numbers, bools and fixed-width text travel; no object dtype, no pickle.
"""

from __future__ import annotations

import msgpack
import numpy as np

_KINDS = "biufU"


def _encode(value):
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in _KINDS:
        if isinstance(value, np.ndarray):
            return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError("cannot send {} {}".format(type(value).__name__, getattr(value, "dtype", "")))


def _decode(body):
    if b"__ndarray__" in body or b"__npgeneric__" in body:
        dtype = np.dtype(body[b"dtype"])
        if dtype.kind not in _KINDS:
            raise ValueError(f"dtype {dtype} is not allowed on the wire")
        if b"__ndarray__" in body:
            # A copy, so that the caller may write to it.
            return np.frombuffer(body[b"data"], dtype=dtype).reshape(body[b"shape"]).copy()
        return dtype.type(body[b"data"])
    return body


def pack(message):
    """A message as bytes. Raises: TypeError for what cannot be sent."""
    return msgpack.packb(message, default=_encode)


def unpack(data):
    """The message in bytes. Raises: ValueError for what is not one."""
    try:
        return msgpack.unpackb(data, object_hook=_decode)
    except (KeyError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise ValueError(f"not a message: {error}") from error
