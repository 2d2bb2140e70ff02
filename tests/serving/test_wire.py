"""Serialisation of arrays: compatible with the clients' packages, and restricted to numeric arrays."""

import base64
import contextlib
import json

import json_numpy
import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from vla.serving import wire

NUMBERS = arrays.arrays(
    st.sampled_from([np.uint8, np.int32, np.int64, np.float16, np.float32, np.float64, np.bool_]),
    arrays.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=4),
)
TREES = st.recursive(
    NUMBERS | st.text() | st.integers(-(2**60), 2**60) | st.none() | st.booleans(),
    lambda inner: st.dictionaries(st.text(), inner, max_size=4) | st.lists(inner, max_size=4),
    max_leaves=8,
)


def same(a, b) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@given(TREES)
def test_round_trip(tree):
    assert same(tree, wire.from_json(wire.to_json(tree)))
    assert same(tree, wire.from_msgpack(wire.to_msgpack(tree)))


@given(NUMBERS)
def test_json_is_compatible_with_json_numpy(array):
    assert json.loads(wire.to_json({"a": array})) == json.loads(json_numpy.dumps({"a": array}))
    assert same(array, wire.from_json(json_numpy.dumps(array)))
    assert same(array, np.array(json_numpy.loads(wire.to_json(array))))


def test_numpy_scalars():
    value = np.float32(0.5)
    assert json.loads(wire.to_json(value)) == json.loads(json_numpy.dumps(value))
    for back in (wire.from_json(wire.to_json(value)), wire.from_msgpack(wire.to_msgpack(value))):
        assert back == value and back.dtype == np.float32


def test_msgpack_equals_openpis():
    """The bytes in which openpi-client 0.1.2 encodes {"a": zeros(2, float32)}."""
    packed = wire.to_msgpack({"a": np.zeros(2, np.float32)})
    assert packed == (
        b"\x81\xa1a\x84\xc4\x0b__ndarray__\xc3\xc4\x04data\xc4\x08"
        + bytes(8)
        + b"\xc4\x05dtype\xa3<f4\xc4\x05shape\x91\x02"
    )


def array(**changes) -> dict:
    good = {b"__ndarray__": True, b"data": bytes(8), b"dtype": "<f4", b"shape": [2]}
    return good | {key.encode(): value for key, value in changes.items()}


BAD = [
    array(dtype="O"), array(dtype="|V8"), array(dtype="<c8"), array(dtype="<U2"), array(dtype="f4,f4"), array(dtype=7),
    array(dtype="nonsense"), array(shape=[3]), array(shape=[-2]), array(shape=[2**40, 2**40]), array(shape="2"),
    array(shape=[2.0]), array(shape=[1] * 40 + [2]), array(data="text"), array(data=None),
    {b"__npgeneric__": True, b"data": "x", b"dtype": "<f4"}, {b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"},
    {b"__npgeneric__": True, b"data": 1, b"dtype": "O"},
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_arrays_that_are_not_numeric_or_have_another_size_are_rejected(bad):
    with pytest.raises(wire.WireError):
        wire.from_msgpack(msgpack.packb(bad))
    if b"__ndarray__" in bad:
        data = bad[b"data"]
        entry = {"dtype": bad[b"dtype"], "shape": bad[b"shape"]}
        entry["__numpy__"] = base64.b64encode(data).decode() if isinstance(data, bytes) else data and "?"
        with pytest.raises(wire.WireError):
            wire.from_json(json.dumps(entry))


@settings(max_examples=300)
@given(st.binary(max_size=400) | TREES.map(wire.to_msgpack).flatmap(lambda b: st.just(b[: len(b) // 2] + b"\xc1")))
def test_random_bytes_are_read_or_rejected(data):
    for read in (wire.from_msgpack, wire.from_json):
        with contextlib.suppress(wire.WireError):
            read(data)


def test_deep_and_large_messages_are_rejected():
    for read, bomb in ((wire.from_json, b"[" * 100_000), (wire.from_msgpack, b"\x91" * 100_000)):
        with pytest.raises(wire.WireError):
            read(bomb)
    with pytest.raises(wire.WireError):
        wire.from_msgpack(b"\xdd\xff\xff\xff\xff")  # declares a list with four billion entries
    with pytest.raises(wire.WireError):
        wire.from_msgpack(b"\x81\x80\x01")  # a map as a key of a map
