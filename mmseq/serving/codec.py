"""The wire codec: msgpack (and JSON) with numpy arrays, readable by openpi's clients and servers.

An array is a map with bytes keys, a numpy scalar likewise:

=====================  ==================================================================
`b"__ndarray__": True`    `b"data"`: bytes in C order, `b"dtype"`: "<f4", `b"shape"`: [2, 3]
`b"__npgeneric__": True`  `b"data"`: a number or a bool, `b"dtype"`: "<f4"
=====================  ==================================================================

Read, though not written, are also the maps of the package msgpack-numpy (`b"nd"`, `b"type"`, `b"kind"`, ...).
JSON has the maps above with text keys and base64 data. Decoding trusts nothing: before a byte is
turned into an object, one pass over the message bounds its depth, the number of its values and
every length; no object dtype, no structured dtype, no extension type and no pickle exist here.
Decoded arrays are read-only, and large ones views of the message. Every refusal is a `RequestError`.
"""

from __future__ import annotations

import base64
import binascii
import functools
import json
import math
import re
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

from mmseq.errors import ConfigError
from mmseq.serving.errors import RequestError

_NUMBER = re.compile(r"[<>|=]?(?:b1|[iu][1248]|f[248])")
_TEXT = re.compile(r"[<>|=]?U\d{1,6}")
_ARRAY_FIELDS = {"__ndarray__", "data", "dtype", "shape"}
_SCALAR_FIELDS = {"__npgeneric__", "data", "dtype"}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a message may be at most."""

    max_message_bytes: int = 64 << 20  # of the whole message
    max_array_bytes: int = 64 << 20  # of one array
    max_depth: int = 16  # of lists and maps inside each other
    max_items: int = 65_536  # values of any kind, an array counting as about eight
    max_dims: int = 8  # axes of an array

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 1:
                raise ConfigError(f"limits.{name} is {value}", fix="use 1 or more")


DEFAULT_LIMITS = Limits()


def malformed(what: str, *, fix: str | None = None) -> RequestError:
    return RequestError("malformed", f"the message is malformed: {what}", fix=fix)


# Encoding


def _encode_numpy(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        if not (_NUMBER.fullmatch(value.dtype.str) or _TEXT.fullmatch(value.dtype.str)):
            raise RequestError("unsupported", f"an array of dtype {value.dtype} cannot be sent")
        if isinstance(value, np.ndarray):
            return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise RequestError("unsupported", f"a {type(value).__name__} cannot be sent", fix="send arrays, numbers and text")


def pack(message: Any) -> bytes:
    """A message as msgpack bytes. Raises: RequestError for what the wire cannot carry."""
    try:
        return msgpack.packb(message, default=_encode_numpy)  # type: ignore[return-value]
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise RequestError("unsupported", f"the message cannot be sent as msgpack: {error}") from error


def to_json(message: Any) -> bytes:
    """A message as JSON bytes, arrays as base64. Raises: RequestError, also for NaN outside of arrays."""

    def encode(value: Any) -> Any:
        if isinstance(value, bytes):
            raise RequestError("unsupported", "bytes cannot be sent as JSON", fix="use msgpack")
        body = {key.decode(): item for key, item in _encode_numpy(value).items()}
        if "__ndarray__" in body:
            body["data"] = base64.b64encode(body["data"]).decode()
        return body

    try:
        return json.dumps(message, default=encode, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError("unsupported", f"the message cannot be sent as JSON: {error}") from error


# Decoding


def _text(value: Any, what: str) -> str:
    if isinstance(value, bytes) and value.isascii():
        value = value.decode()
    if not isinstance(value, str):
        raise malformed(f"{what} must be text, got {type(value).__name__}")
    return value


def _dtype(value: Any) -> np.dtype:
    return _dtype_of(_text(value, "a dtype"))


@functools.lru_cache(maxsize=64)
def _dtype_of(text: str) -> np.dtype:
    if not (_NUMBER.fullmatch(text) or _TEXT.fullmatch(text)):
        raise malformed(f"dtype {text[:40]!r}", fix="send bool, int, uint, float or text arrays")
    return np.dtype(text)


def _array(body: dict[str, Any], limits: Limits) -> np.ndarray:
    if set(body) != _ARRAY_FIELDS or body["__ndarray__"] is not True:
        raise malformed(f"an array has the fields {sorted(_ARRAY_FIELDS)}, got {sorted(map(str, body))[:8]}")
    dtype, shape, data = _dtype(body["dtype"]), body["shape"], body["data"]
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise malformed("the shape of an array must be a list of sizes")
    if len(shape) > limits.max_dims:
        raise malformed(f"an array of {len(shape)} axes, the limit is {limits.max_dims}")
    if not isinstance(data, bytes | memoryview):
        raise malformed(f"the data of an array must be bytes, got {type(data).__name__}")
    if dtype.itemsize * math.prod(max(size, 1) for size in shape) > limits.max_array_bytes:
        raise RequestError(
            "too_large", f"an array {tuple(shape)} of {dtype} is over the limit of {limits.max_array_bytes} bytes"
        )
    expected = dtype.itemsize * math.prod(shape)
    if len(data) != expected:
        raise malformed(f"an array {tuple(shape)} of {dtype} has {expected} bytes, got {len(data)}")
    array = np.ndarray(shape=shape, dtype=dtype, buffer=data)
    if not array.flags.aligned:
        array = array.copy()
    array.flags.writeable = False
    if dtype.kind == "U":
        points = np.ndarray(shape=(len(data) // 4,), dtype=dtype.byteorder.replace("|", "=") + "u4", buffer=data)
        if np.any(points > 0x10FFFF) or np.any((points >= 0xD800) & (points <= 0xDFFF)):
            raise malformed("a text array holds a number that is no character")
    elif dtype.kind == "b" and np.any(array.view(np.uint8) > 1):
        raise malformed("a bool array holds a byte other than 0 and 1")
    if not dtype.isnative:
        array = array.astype(dtype.newbyteorder("="))
        array.flags.writeable = False
    return array


def _scalar(body: dict[str, Any]) -> np.generic:
    if set(body) != _SCALAR_FIELDS or body["__npgeneric__"] is not True:
        raise malformed(f"a numpy scalar has the fields {sorted(_SCALAR_FIELDS)}, got {sorted(map(str, body))[:8]}")
    dtype, data = _dtype(body["dtype"]), body["data"]
    fits = {
        "b": lambda: isinstance(data, bool),
        "i": lambda: type(data) is int and np.iinfo(dtype).min <= data <= np.iinfo(dtype).max,
        "u": lambda: type(data) is int and 0 <= data <= np.iinfo(dtype).max,
        "f": lambda: type(data) in (int, float),
        "U": lambda: isinstance(data, str),
    }[dtype.kind]()
    if not fits:
        raise malformed(f"a numpy scalar of dtype {dtype} cannot be {str(data)[:40]!r}")
    with np.errstate(over="ignore"):
        return dtype.type(data)


def _of_msgpack_numpy(body: dict[str, Any], limits: Limits) -> np.ndarray | np.generic:
    """What the package msgpack-numpy makes of an array or a scalar; it pickles what is no number, which is refused."""
    if body.get("kind", b"") not in (b"", ""):
        raise malformed("an array of objects or of records", fix="send bool, int, uint, float or text arrays")
    shape = body.get("shape", []) if body["nd"] is True else []
    array = _array({"__ndarray__": True, "data": body["data"], "dtype": body["type"], "shape": shape}, limits)
    return array if body["nd"] is True else array[()]


def _hook(limits: Limits):
    def revive(body: dict[Any, Any]) -> Any:
        for mark in ("__ndarray__", "__npgeneric__"):
            if mark in body or mark.encode() in body:
                fields = {key.decode("latin-1") if isinstance(key, bytes) else key: body[key] for key in body}
                return _array(fields, limits) if mark == "__ndarray__" else _scalar(fields)
        if b"nd" in body or "nd" in body:
            fields = {key.decode("latin-1") if isinstance(key, bytes) else key: body[key] for key in body}
            if {"nd", "type", "data"} <= set(fields) and isinstance(fields["data"], bytes | memoryview):
                return _of_msgpack_numpy(fields, limits)
        for key, value in body.items():
            if type(value) is memoryview:
                body[key] = bytes(value)
        return body

    return revive


# First byte of a msgpack value -> bytes of payload that follow, for those of fixed size.
_FIXED = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}
_FIXED |= {0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
# First byte -> width in bytes of the length that follows.
_BLOB = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
LARGE = 4096  # bytes of an array from which it is a view of the message and not a copy
_DATA_KEYS = (b"\x04data", b"\xa4data")  # how the key before it ends, as bytes and as text
_CONTAINER = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}


def _scan(data: bytes | bytearray | memoryview, limits: Limits) -> list[tuple[int, int, int]]:
    """Walk the message without building anything; refuse what is cut off, too deep or too many.

    Returns: for each large `data` of an array, where its value, its bytes, and what follows them begin.
    """
    end, position, items, open_items = len(data), 0, 1, [1]
    large: list[tuple[int, int, int]] = []
    while open_items:
        if not open_items[-1]:
            open_items.pop()
            continue
        open_items[-1] -= 1
        if position >= end:
            raise malformed(f"it ends after {end} bytes, inside of a value")
        first = data[position]
        position += 1
        children = -1
        if first <= 0x7F or first >= 0xE0:
            pass
        elif first <= 0x8F:
            children = 2 * (first & 0x0F)
        elif first <= 0x9F:
            children = first & 0x0F
        elif first <= 0xBF:
            position += first & 0x1F
        elif first in _FIXED:
            position += _FIXED[first]
        elif first in _BLOB:
            width, start = _BLOB[first], position - 1
            length = int.from_bytes(data[position : position + width], "big")
            position += width + length
            if length >= LARGE and first <= 0xC6 and data[start - 5 : start] in _DATA_KEYS:
                large.append((start, position - length, position))
        elif first in _CONTAINER:
            width, per_item = _CONTAINER[first]
            children = per_item * int.from_bytes(data[position : position + width], "big")
            position += width
        else:
            raise malformed(f"byte 0x{first:02x} at {position - 1} starts an extension type or nothing at all")
        if children >= 0:
            items += children
            if items > limits.max_items:
                raise RequestError("too_large", f"the message has over {limits.max_items} values")
            if len(open_items) > limits.max_depth:
                raise RequestError("too_large", f"the message is nested more than {limits.max_depth} deep")
            open_items.append(children)
        if position > end:
            raise malformed(f"it ends after {end} bytes, inside of a value")
    if position != end:
        raise malformed(f"{end - position} bytes follow its end")
    return large


def unpack(data: bytes | bytearray | memoryview, limits: Limits = DEFAULT_LIMITS) -> Any:
    """The value in msgpack bytes. Raises: RequestError for anything malformed or over the limits."""
    if len(data) > limits.max_message_bytes:
        raise RequestError("too_large", f"a message of {len(data)} bytes, the limit is {limits.max_message_bytes}")
    large = _scan(data, limits)
    try:
        views: list[memoryview] = []
        if large:  # leave them where they are: an extension (which no message may have) says which it is
            whole, parts, at = memoryview(data), [], 0
            for start, begin, end in large:
                parts += [whole[at:start], b"\xd6\x00" + len(views).to_bytes(4, "big")]
                views.append(whole[begin:end])
                at = end
            data = b"".join([*parts, whole[at:]])
        return msgpack.unpackb(
            data,
            object_hook=_hook(limits),
            ext_hook=lambda _, index: views[int.from_bytes(index, "big")],
            max_bin_len=limits.max_array_bytes,
            max_str_len=limits.max_array_bytes,
        )
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise malformed(f"{type(error).__name__}: {error}") from error


def from_json(data: bytes | bytearray, limits: Limits = DEFAULT_LIMITS) -> Any:
    """The value in JSON bytes, base64 arrays included. Raises: RequestError like `unpack`."""
    if len(data) > limits.max_message_bytes:
        raise RequestError("too_large", f"a message of {len(data)} bytes, the limit is {limits.max_message_bytes}")
    # Base64 has none of these characters, so this bounds the values without parsing.
    if sum(data.count(mark) for mark in (b",", b"[", b"{", b":")) > limits.max_items:
        raise RequestError("too_large", f"the message has over {limits.max_items} values", fix="send arrays as base64")
    revive = _hook(limits)

    def refuse(constant: str) -> None:
        raise malformed(f"{constant} is not JSON")

    def whole(text: str) -> str:
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise malformed("a text holds half of a surrogate pair")
        return text

    def walk(value: Any, depth: int) -> Any:
        if isinstance(value, str):
            return whole(value)
        if not isinstance(value, list | dict):
            return value
        if depth > limits.max_depth:
            raise RequestError("too_large", f"the message is nested more than {limits.max_depth} deep")
        if isinstance(value, list):
            return [walk(item, depth + 1) for item in value]
        value = {whole(key): walk(item, depth + 1) for key, item in value.items()}
        if "__ndarray__" in value and isinstance(value.get("data"), str):
            try:
                value["data"] = base64.b64decode(value["data"], validate=True)
            except (binascii.Error, ValueError) as error:
                raise malformed(f"the data of an array is not base64: {error}") from error
        return revive(value)

    try:
        return walk(json.loads(data, parse_constant=refuse), 1)
    except (ValueError, RecursionError) as error:
        raise malformed(f"not JSON: {error}") from error


def message(value: Any) -> dict[str, Any]:
    """`value` as a message: a map with text keys. Raises: RequestError."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise malformed("a message is a map with text keys")
    return value
