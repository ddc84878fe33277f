"""Messages that mean harm: valid ones that were changed, and ones that lie about what follows.

random = Random(0)
data = hostile(random, corpus)          # bytes of one message
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from random import Random
from typing import Any

import msgpack

DTYPES: list[Any] = [
    "|u1",
    "<f4",
    ">f8",
    "<i8",
    "|b1",
    "<U3",
    "|O",
    "<c8",
    "<M8[s]",
    "|V8",
    "f4,f4",
    "<f2",
    "",
    "u1" * 50,
    b"|u1",
    4,
]
HEADS = [b"\xc1", b"\xc6\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xdf\x7f\xff\xff\xff", b"\xdb\xff\xff\xff\xff"]
HEADS += [b"\xc7\x05\x01", b"\xd6\x00\x00\x00\x00\x00", b"\xd8", b"\xdc\xff\xff", b"\x9f", b"\x8f", b"\xff" * 8]
NUMBERS: list[Any] = [
    0,
    -1,
    1,
    True,
    1 << 31,
    (1 << 64) - 1,
    -(1 << 63),
    1e308,
    -0.0,
    float("nan"),
    float("inf"),
    5e-324,
]
KEYS = ["observation.state", "observation.images.front", "prompt", "embodiment", "embodiment_fingerprint", "options"]
KEYS += ["action_prefix", "step", "sent_at", "deadline_ms", "delay", "reset", "chunking", "images", "observation"]
KEYS += [
    "observation/image",
    "observation/wrist_image",
    "state",
    "temperature",
    "seed",
    "as",
    "__ndarray__",
    "\x00",
    "",
]


def hostile(random: Random, corpus: Sequence[bytes]) -> bytes:
    """One message: made up, or one of `corpus` with a few changes."""
    if random.random() < 0.35:
        value = {_key(random): _value(random, 0) for _ in range(random.randrange(6))}
        data = bytes(msgpack.packb(value if random.random() < 0.9 else _value(random, 0)) or b"")
        if random.random() < 0.6:
            return data
    else:
        data = random.choice(corpus)
    for _ in range(random.randrange(1, 5)):
        data = _mutate(random, data, corpus)
    return data


def _mutate(random: Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    # most of a message is pixels; its structure is at its ends and around them
    n = len(data)
    at = random.randrange(n + 1) if random.random() < 0.5 else random.randrange(min(n, 200) + 1)
    if random.random() < 0.25:
        at = max(0, n - at)
    match random.randrange(8):
        case 0:
            return data[:at] + bytes([random.randrange(256)]) + data[at + 1 :]
        case 1:
            return data[:at]
        case 2:
            return data[:at] + data[at + random.randrange(1, 9) :]
        case 3:
            return data[:at] + random.randbytes(random.randrange(1, 9)) + data[at:]
        case 4:
            return data[:at] + random.choice(HEADS) + data[at:]
        case 5:
            other = random.choice(corpus)
            return data[:at] + other[random.randrange(len(other)) :]
        case 6:
            return data[:at] + struct.pack(">Q", random.randrange(1 << 63))[-random.randrange(1, 9) :] + data[at + 4 :]
        case _:
            depth = random.randrange(1, 40)
            return data[:at] + bytes([random.choice([0x91, 0x81])]) * depth + data[at:]


def _key(random: Random) -> Any:
    if random.random() < 0.9:
        return random.choice(KEYS)
    return _value(random, 9) if random.random() < 0.5 else random.randbytes(4)


def _value(random: Random, depth: int) -> Any:
    kind = random.randrange(9 if depth < 4 else 5)
    if kind == 0:
        return random.choice(NUMBERS)
    if kind == 1:
        return "".join(chr(random.randrange(32, 0xD7FF)) for _ in range(random.randrange(20)))
    if kind == 2:
        return random.randbytes(random.randrange(40))
    if kind == 3:
        return random.choice([None, True, False, "plain", "arm", "x" * 3000])
    if kind == 4:
        return random.gauss(0, 1)
    if kind == 5:
        return [_value(random, depth + 1) for _ in range(random.randrange(5))]
    if kind == 6:
        return {_key(random) if depth < 3 else str(i): _value(random, depth + 1) for i in range(random.randrange(4))}
    return _array(random)


def _array(random: Random) -> dict[Any, Any]:
    """An array or a scalar on the wire, seldom a true one."""
    sizes = [0, 1, 3, 4, 8, 16, 24, -1, 1 << 20, 1 << 62, True, 2.0]
    shape: Any = [random.choice(sizes) for _ in range(random.randrange(5 if random.random() < 0.9 else 40))]
    size = 1
    for n in shape:
        size *= int(n)
    data: Any = random.randbytes(size * random.randrange(1, 9) if 0 <= size < 3000 else random.randrange(64))
    if random.random() < 0.1:
        shape, data = random.choice([[], 3, "4", None]), random.choice([b"", "text", 7, None])
    body = {b"__ndarray__": True, b"data": data, b"dtype": random.choice(DTYPES), b"shape": shape}
    if random.random() < 0.3:
        number = random.choice(NUMBERS)
        body = {b"__npgeneric__": True, b"data": number, b"dtype": random.choice(DTYPES)}
    if random.random() < 0.1:
        body.pop(list(body)[random.randrange(len(body))])
    return {key.decode(): value for key, value in body.items()} if random.random() < 0.3 else body
