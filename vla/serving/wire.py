"""Array encodings of robot clients.

Owns: the encodings json-numpy (OpenVLA: base64 in JSON objects) and openpi's msgpack-numpy, and `to_array`, with which
other protocols check their arrays. The bytes are identical to those of the original packages. Arrays must be numeric
and match the size of their data, and decoding never executes code. It does not know what the values mean.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np

from vla.errors import VLAError


class WireError(VLAError):
    """A message is not valid in its encoding."""


def to_json(value: Any) -> str:
    """`value` as JSON, with arrays and numpy scalars as in json-numpy."""
    return json.dumps(value, default=_encode_json)


def from_json(text: str | bytes) -> Any:
    """Inverse of `to_json`; arrays are read-only views of the bytes."""
    try:
        return json.loads(text, object_hook=_decode_json)
    except (ValueError, TypeError, RecursionError) as error:
        raise WireError(f"not valid JSON: {error}.") from None


def to_msgpack(value: Any) -> bytes:
    """`value` as msgpack, with arrays and numpy scalars as in openpi."""
    return msgpack.packb(value, default=_encode_msgpack, use_bin_type=True)


def from_msgpack(data: bytes, hook: Callable[[dict[Any, Any]], Any] | None = None) -> Any:
    """Inverse of `to_msgpack`; arrays are read-only views of the bytes.

    Args:
        hook: decodes a map, for other array encodings than openpi's.
    """
    try:
        return msgpack.unpackb(data, object_hook=hook or _decode_msgpack, raw=False, strict_map_key=False)
    # Besides its own exceptions, msgpack raises TypeError for unhashable keys and ValueError for invalid UTF-8.
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise WireError(f"not valid msgpack: {type(error).__name__}: {error}.") from None


def _encode_json(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        array = np.asarray(value)
        _dtype(array.dtype.str)
        data = base64.b64encode(array.tobytes()).decode()
        return {"__numpy__": data, "dtype": array.dtype.str, "shape": list(array.shape)}
    raise TypeError(f"{type(value).__name__} cannot be sent as JSON.")


def _decode_json(entry: dict[str, Any]) -> Any:
    if "__numpy__" not in entry:
        return entry
    try:
        data = base64.b64decode(entry["__numpy__"], validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise WireError('an array\'s "__numpy__" must be base64.') from None
    array = to_array(data, entry.get("dtype"), entry.get("shape"))
    return array if array.shape else array[()]


def _encode_msgpack(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        _dtype(value.dtype.str)
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"{type(value).__name__} cannot be sent as msgpack.")


def _decode_msgpack(entry: dict[Any, Any]) -> Any:
    if b"__ndarray__" in entry:
        return to_array(entry.get(b"data"), entry.get(b"dtype"), entry.get(b"shape"))
    if b"__npgeneric__" in entry:
        value = entry.get(b"data")
        if not isinstance(value, bool | int | float):
            raise WireError(f"a numpy scalar must be a number, got {type(value).__name__}.")
        try:
            return _dtype(entry.get(b"dtype")).type(value)
        except OverflowError:
            raise WireError(f"{value} does not fit into {entry.get(b'dtype')!r}.") from None
    return entry


def to_array(data: Any, dtype: Any, shape: Any) -> np.ndarray:
    """The array with a dtype ("<f4") and a shape, as a read-only view of `data`. WireError if they do not match."""
    kind = _dtype(dtype)
    if not isinstance(data, bytes) or not isinstance(shape, list | tuple):
        raise WireError("an array needs its data as bytes and its shape as a list.")
    if not all(isinstance(side, int) and not isinstance(side, bool) and side >= 0 for side in shape) or len(shape) > 8:
        raise WireError(f"an array cannot have the shape {shape!r}.")
    if math.prod(shape) * kind.itemsize != len(data):
        raise WireError(
            f"an array {list(shape)} of {dtype} has {math.prod(shape) * kind.itemsize} bytes, got {len(data)}."
        )
    return np.frombuffer(data, kind).reshape(shape)


def _dtype(name: Any) -> np.dtype:
    """A numeric or boolean dtype; WireError for structured types, objects and text."""
    try:
        dtype = np.dtype(name) if isinstance(name, str) else None
    except TypeError:
        dtype = None
    if dtype is None or dtype.kind not in "biuf":
        raise WireError(f"arrays must be numeric, got dtype {name!r}.")
    return dtype
