"""The arrays of a completion as one blob, back byte for byte, without pickle.

A line of JSON says what follows: name, dtype, shape, and whether only the first element is written because all are equal bit for
bit. So a mask of ones or a policy version that never changed costs nothing; token ids, log-probs and routes stand as they are.
"""

import json
from collections.abc import Mapping
from math import prod

import numpy as np


def pack(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Any arrays of plain numbers, by name."""
    header, parts = [], []
    for name, array in arrays.items():
        raw = array.tobytes()
        first = raw[: array.itemsize]
        # Bytes are compared, not values: NaN is unequal to itself, and 0.0 equals -0.0.
        constant = array.size > 1 and raw == first * array.size
        header.append([name, array.dtype.str, array.shape, constant])
        parts.append(first if constant else raw)
    return b"\n".join([json.dumps(header).encode(), b"".join(parts)])


def unpack(blob: bytes) -> dict[str, np.ndarray]:
    """What was packed: same bytes, dtypes and shapes; the arrays own their memory and can be written to."""
    end = blob.index(b"\n")
    offset = end + 1
    arrays = {}
    for name, dtype_name, shape, constant in json.loads(blob[:end]):
        dtype = np.dtype(dtype_name)
        written = 1 if constant else prod(shape)
        stored = np.frombuffer(blob, dtype, written, offset)
        arrays[name] = np.repeat(stored, prod(shape)).reshape(shape) if constant else stored.reshape(shape).copy()
        offset += written * dtype.itemsize
    return arrays
