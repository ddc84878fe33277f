import base64
import contextlib
import json

import msgpack
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mmseq.errors import ConfigError, ServeError
from mmseq.serving import codec

# Written out by hand from the format: a map of five, an array, text, and one scalar of each kind.
GOLDEN_VALUE = {
    "observation/state": np.array([0, 1], np.float32),
    "prompt": "go",
    "n": np.int64(3),
    "g": np.float32(0.5),
    "b": np.bool_(True),
}
GOLDEN_BYTES = (
    b"\x85"
    b"\xb1observation/state"
    b"\x84\xc4\x0b__ndarray__\xc3\xc4\x04data\xc4\x08\x00\x00\x00\x00\x00\x00\x80?\xc4\x05dtype\xa3<f4\xc4\x05shape\x91\x02"
    b"\xa6prompt\xa2go"
    b"\xa1n\x83\xc4\r__npgeneric__\xc3\xc4\x04data\x03\xc4\x05dtype\xa3<i8"
    b"\xa1g\x83\xc4\r__npgeneric__\xc3\xc4\x04data\xcb?\xe0\x00\x00\x00\x00\x00\x00\xc4\x05dtype\xa3<f4"
    b"\xa1b\x83\xc4\r__npgeneric__\xc3\xc4\x04data\xc3\xc4\x05dtype\xa3|b1"
)

dtypes = st.sampled_from(["u1", "i2", "<i8", ">i4", "f2", "<f4", ">f8", "b1", "<U3", ">U2"])
shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
# surrogates are no characters, and numpy drops a zero at the end of a text
letters = st.text(st.characters(min_codepoint=1, exclude_categories=["Cs"]), max_size=2)
arrays = dtypes.flatmap(lambda dtype: hnp.arrays(dtype, shapes, elements=letters if "U" in dtype else None))
leaves = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(max_size=8) | arrays
messages = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)


def same(a, b) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.shape == b.shape and a.dtype.newbyteorder("=") == b.dtype and equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and set(a) == set(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def equal(a, b) -> bool:
    return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def array(**fields) -> bytes:
    body = {b"__ndarray__": True, b"data": b"\0" * 8, b"dtype": "<f4", b"shape": [2]}
    body.update({key.encode(): value for key, value in fields.items()})
    return msgpack.packb({"a": {key: value for key, value in body.items() if value is not ...}})


class TestFormat:
    def test_golden_bytes_are_written(self):
        assert codec.pack(GOLDEN_VALUE) == GOLDEN_BYTES

    def test_golden_bytes_are_read(self):
        value = codec.unpack(GOLDEN_BYTES)
        assert list(value) == list(GOLDEN_VALUE)
        assert all(same(GOLDEN_VALUE[key], value[key]) for key in value)
        assert [type(value[key]) for key in "ngb"] == [np.int64, np.float32, np.bool_]

    @settings(max_examples=100, deadline=None)
    @given(messages)
    def test_what_is_packed_comes_back(self, value):
        try:
            data = codec.pack(value)
        except ServeError:  # an integer beyond 64 bits, a lone surrogate
            return
        assert same(value, codec.unpack(data))

    def test_text_keys_serve_clients_without_bytes_keys(self):
        body = {"__ndarray__": True, "data": b"\1\2", "dtype": "|u1", "shape": [2]}
        assert codec.unpack(msgpack.packb(body)).tolist() == [1, 2]

    def test_json_holds_the_same_as_base64(self):
        sent = json.loads(codec.to_json({"a": np.array([[1, 2]], np.uint8)}))
        assert sent["a"] == {
            "__ndarray__": True,
            "data": base64.b64encode(b"\1\2").decode(),
            "dtype": "|u1",
            "shape": [1, 2],
        }
        value = codec.from_json(codec.to_json(GOLDEN_VALUE))
        assert all(same(GOLDEN_VALUE[key], value[key]) for key in GOLDEN_VALUE)

    def test_decoded_arrays_are_views_of_the_message(self):
        assert not codec.unpack(codec.pack(np.zeros(3))).flags.writeable


class TestRefusals:
    @pytest.mark.parametrize(
        ("data", "words"),
        [
            (array(dtype="|O"), "dtype"),
            (array(dtype="f4,f4"), "dtype"),
            (array(dtype="<M8[s]"), "dtype"),
            (array(dtype="<c8"), "dtype"),
            (array(dtype="|V8"), "dtype"),
            (array(dtype=4), "dtype"),
            (array(shape=[3]), "12 bytes, got 8"),
            (array(shape=[-2]), "sizes"),
            (array(shape=[True, 2]), "sizes"),
            (array(shape=2), "sizes"),
            (array(shape=[0, 2**62]), "limit"),
            (array(shape=[2**40]), "limit"),
            (array(shape=[1] * 9 + [2]), "axes"),
            (array(data="text"), "bytes"),
            (array(data=...), "fields"),
            (array(more=1), "fields"),
            (array(dtype="<U2", data=b"\xff" * 8, shape=[]), "character"),
            (array(dtype="|b1", data=b"\2", shape=[1]), "bool"),
            (msgpack.packb({b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}), "cannot be '300'"),
            (msgpack.packb({b"__npgeneric__": True, b"data": b"x", b"dtype": "<f4"}), "cannot be"),
            (msgpack.packb(msgpack.ExtType(5, b"x")), "extension"),
            (msgpack.packb(msgpack.Timestamp(1)), "extension"),
            (b"\x80\x80", "follow"),
            (b"", "ends"),
            (b"\xdd\xff\xff\xff\xff", "values"),
            (b"\xc6\xff\xff\xff\xff", "ends"),
            (b"\x91" * 5000 + b"\xc0", "deep"),
            (b"\x92" + (b"\xdc\xff\xff" + b"\x90" * 65535) * 2, "values"),
            (b"\xa1\xff", "malformed"),
            (b"\x81\x01\x02", "malformed"),
        ],
    )
    def test_malformed_and_oversized_messages(self, data, words):
        with pytest.raises(ServeError, match=words):
            codec.unpack(data)

    def test_the_message_limit(self):
        with pytest.raises(ServeError, match="the limit is 10"):
            codec.unpack(b"\0" * 11, codec.Limits(max_message_bytes=10))

    @pytest.mark.parametrize(
        "value", [object(), np.array([object()]), np.zeros(2, "c8"), 2**70, {"a": {1, 2}}, "\ud800"]
    )
    def test_what_cannot_be_sent(self, value):
        with pytest.raises(ServeError):
            codec.pack(value)

    @pytest.mark.parametrize(
        "data",
        [b"", b"{", b"NaN", b"[" * 100_000, b"1" * 5000, b"\xff", b"[" * 20 + b"]" * 20]
        + [b'{"__ndarray__": true, "data": "?", "dtype": "<f4", "shape": []}', b"[" + b"1," * 70_000 + b"1]"],
    )
    def test_malformed_json(self, data):
        with pytest.raises(ServeError):
            codec.from_json(data)

    def test_a_message_is_a_map_with_text_keys(self):
        for value in ([], 3, {b"a": 1}):
            with pytest.raises(ServeError, match="map"):
                codec.message(value)


class TestHostileBytes:
    """Whatever arrives, the only exception is a ServeError."""

    @settings(max_examples=400, deadline=None)
    @given(st.binary(max_size=200))
    @example(b"\x81\xc4\x0b__ndarray__\xc3")
    def test_random_bytes(self, data):
        for decode in (codec.unpack, codec.from_json):
            with contextlib.suppress(ServeError):
                codec.pack(decode(data))

    @settings(max_examples=400, deadline=None)
    @given(
        messages.map(lambda value: {"k": value, **GOLDEN_VALUE}),
        st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255), st.sampled_from("sdi")), max_size=4),
    )
    def test_mutated_messages(self, value, edits):
        try:
            data = bytearray(codec.pack(value))
        except ServeError:
            return
        for where, byte, kind in edits:
            at = int(where * (len(data) - 1))
            if kind == "s":
                data[at] = byte
            elif kind == "d":
                del data[at : at + 1 + byte % 4]
            else:
                data[at:at] = bytes([byte])
            if not data:
                return
        try:
            found = codec.unpack(bytes(data))
        except ServeError:
            return
        repr(found)


def msgpack_numpy(value, change=()):
    """As the package msgpack-numpy writes it."""
    body = {b"nd": isinstance(value, np.ndarray), b"type": value.dtype.str, b"data": value.tobytes()}
    if body[b"nd"]:
        body |= {b"kind": b"", b"shape": value.shape}
    return msgpack.packb({"a": {key: item for key, item in (body | dict(change)).items() if item is not ...}})


@pytest.mark.parametrize(
    "value",
    [np.arange(6, dtype=np.float32).reshape(2, 3), np.zeros((0, 4)), np.uint8(3), np.float64(0.25), np.bool_(True)]
    + [np.arange(5000, dtype=">i2"), np.array(["go", "on"])],
)
def test_arrays_of_the_package_msgpack_numpy_are_read(value):
    found = codec.unpack(msgpack_numpy(value))["a"]
    np.testing.assert_array_equal(found, value)
    assert (type(found), found.shape) == (type(value), value.shape)
    texts = {key.decode(): item for key, item in msgpack.unpackb(msgpack_numpy(value))["a"].items()}
    np.testing.assert_array_equal(codec.unpack(msgpack.packb({"a": texts}))["a"], value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({b"kind": b"O"}, "an array of objects"),
        ({b"kind": b"V", b"type": [["x", "<f4"]]}, "an array of objects or of records"),
        ({b"type": "|O"}, "dtype"),
        ({b"shape": [7]}, "has 28 bytes, got 16"),
        ({b"shape": ...}, "has 4 bytes, got 16"),
        ({b"nd": 1}, "has 4 bytes, got 16"),
    ],
)
def test_what_msgpack_numpy_would_pickle_or_has_cut_off_is_refused(change, words):
    with pytest.raises(ServeError, match=words):
        codec.unpack(msgpack_numpy(np.zeros(4, np.float32), change))


def test_a_map_that_only_looks_like_an_array_stays_one():
    assert codec.unpack(msgpack.packb({"nd": 1, "type": "x"})) == {"nd": 1, "type": "x"}
    assert codec.unpack(msgpack.packb({"nd": 1, "type": "x", "data": "y"})) == {"nd": 1, "type": "x", "data": "y"}


@pytest.mark.parametrize("size", [0, 1, 15, 16, 31, 32, 255, 256, 65535, 65536])
def test_every_width_of_a_length_is_read(size):
    """Where one form of MessagePack ends and the next begins: texts, bytes, lists and maps."""
    text, items = "k" * size, list(range(min(size, 5000)))
    value = {"text": text, text or "key": True, "items": items, "map": {f"{i}": i for i in items}}
    assert codec.unpack(codec.pack(value)) == value
    assert codec.unpack(msgpack.packb(value)) == value


def test_a_text_named_data_is_no_array():
    assert codec.from_json(b'{"data": "not base64!"}') == {"data": "not base64!"}


def test_the_most_values_that_json_may_have():
    limits = codec.Limits(max_items=3)
    assert codec.from_json(b"[1,2,3]", limits) == [1, 2, 3]
    with pytest.raises(ServeError, match="over 3 values"):
        codec.from_json(b"[1,2,3,4]", limits)


def test_the_last_character_of_all_is_one():
    value = np.array(["\U0010ffff"])
    np.testing.assert_array_equal(codec.unpack(codec.pack(value)), value)


def nested(depth, empty):
    """Lists and maps inside each other, `depth` of them, the innermost empty or of one number."""
    value = [] if empty else [7]
    for level in range(depth - 1):
        value = [value] if level % 2 else {"k": value}
    return value


def within(limits, value) -> bool:
    """Whether both forms of a message are within the limits: of one value both are, or neither."""
    found = []
    for encode, decode in ((codec.pack, codec.unpack), (codec.to_json, codec.from_json)):
        try:
            assert decode(encode(value), limits) == value
            found.append(True)
        except ServeError:
            found.append(False)
    assert found[0] == found[1]
    return found[0]


@pytest.mark.parametrize("empty", [False, True])
def test_a_message_may_be_so_deep_and_no_deeper(empty):
    for depth in (1, 2, 5):
        limits = codec.Limits(max_depth=depth)
        assert within(limits, nested(depth, empty))
        assert not within(limits, nested(depth + 1, empty))


@pytest.mark.parametrize("encode", [codec.pack, codec.to_json])
def test_a_message_may_be_so_long_and_no_longer(encode):
    value = {"text": "x" * 40}
    data, decode = encode(value), codec.unpack if encode is codec.pack else codec.from_json
    assert decode(data, codec.Limits(max_message_bytes=len(data))) == value
    with pytest.raises(ServeError, match=f"a message of {len(data)} bytes, the limit is {len(data) - 1}"):
        decode(data, codec.Limits(max_message_bytes=len(data) - 1))


def test_the_most_values_that_a_message_may_have():
    """Itself, and those inside of it; a map has two for each key."""
    for value, count in (([1, 2, 3], 4), ({"a": 1, "b": [2]}, 6), ([[], {}], 3)):
        assert codec.unpack(codec.pack(value), codec.Limits(max_items=count)) == value
        with pytest.raises(ServeError, match=f"over {count - 1} values"):
            codec.unpack(codec.pack(value), codec.Limits(max_items=count - 1))


def test_an_array_may_be_so_large_and_no_larger():
    value = np.arange(6, dtype=np.float32)
    assert codec.unpack(codec.pack(value), codec.Limits(max_array_bytes=24)).tolist() == value.tolist()
    assert codec.from_json(codec.to_json(value), codec.Limits(max_array_bytes=24)).tolist() == value.tolist()
    with pytest.raises(ServeError, match="23"):
        codec.unpack(codec.pack(value), codec.Limits(max_array_bytes=23))
    with pytest.raises(ServeError, match="over the limit of 23 bytes"):
        codec.from_json(codec.to_json(value), codec.Limits(max_array_bytes=23))
    deep = np.zeros((1,) * 8)
    assert codec.unpack(codec.pack(deep)).shape == deep.shape
    with pytest.raises(ServeError, match="an array of 9 axes, the limit is 8"):
        codec.unpack(codec.pack(deep[None]))


def test_a_limit_is_at_least_one():
    assert codec.Limits(max_depth=1).max_depth == 1
    with pytest.raises(ConfigError, match=r"limits.max_depth is 0"):
        codec.Limits(max_depth=0)


@pytest.mark.parametrize("number", [-33, -32, -1, 0, 127, 128, 255, 256, 65535, 65536, -128, -129, 2**32, -(2**63)])
def test_whole_numbers_of_every_width_are_read(number):
    assert codec.unpack(msgpack.packb([number, number])) == [number, number]


@pytest.mark.parametrize("size", [4095, 4096, 65535, 65536])
def test_large_arrays_are_views_of_the_message_and_small_ones_and_texts_are_not(size):
    value = np.arange(size, dtype=np.uint8)
    data = codec.pack({"a": value, "data": "x" * size})
    found = codec.unpack(data)
    np.testing.assert_array_equal(found["a"], value)
    assert found["data"] == "x" * size
    assert np.shares_memory(found["a"], np.frombuffer(data, np.uint8)) == (size >= 4096)
    assert not found["a"].flags.writeable


@pytest.mark.parametrize("shift", range(8))
def test_arrays_are_aligned_wherever_they_lie_in_a_message(shift):
    value = np.arange(1000.0)
    found = codec.unpack(codec.pack({"k" * shift: value}))["k" * shift]
    np.testing.assert_array_equal(found, value)
    assert found.flags.aligned
    assert not found.flags.writeable


@pytest.mark.parametrize(
    ("point", "passes"), [(0xD7FF, True), (0xD800, False), (0xDFFF, False), (0xE000, True), (0x110000, False)]
)
def test_numbers_that_are_no_characters_are_refused(point, passes):
    data = array(dtype="<U1", data=point.to_bytes(4, "little"), shape=[1])
    if passes:
        assert codec.unpack(data)["a"].tolist() == [chr(point)]
        return
    with pytest.raises(ServeError, match="no character"):
        codec.unpack(data)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"more": 1}, "a numpy scalar has the fields"),
        ({"dtype": ...}, "a numpy scalar has the fields"),
        ({"__npgeneric__": 1}, "a numpy scalar has the fields"),
        ({"data": -1}, "cannot be '-1'"),
        ({"data": 255}, None),
        ({"data": 256}, "cannot be '256'"),
        ({"data": True}, "cannot be 'True'"),
        ({"dtype": "|i1", "data": -128}, None),
        ({"dtype": "|i1", "data": -129}, "cannot be '-129'"),
        ({"dtype": "|i1", "data": 128}, "cannot be '128'"),
    ],
)
def test_a_scalar_is_a_number_of_its_type(change, words):
    body = {"__npgeneric__": True, "data": 0, "dtype": "|u1"} | change
    data = msgpack.packb({key.encode(): value for key, value in body.items() if value is not ...})
    if words is None:
        assert codec.unpack(data) == change["data"]
        return
    with pytest.raises(ServeError, match=words):
        codec.unpack(data)
