"""Pack codes of few bits into bytes."""

from __future__ import annotations

from typing import Any

import numpy as np

#: ONNX's number of the signed type of so many bits (``TensorProto.INT2``, ``INT4``, ``INT8``).
CONTAINERS = {2: 26, 4: 22, 8: 3}


def container(bits: int) -> int:
    """The bits that a code of ``bits`` takes in a file: 2, 4 or 8."""
    return next(field for field in CONTAINERS if field >= bits)


def packed_bytes(count: int, bits: int) -> int:
    """The bytes that so many codes of ``bits`` take in a file."""
    return -(-count * container(bits) // 8)


def pack(codes: np.ndarray[Any, Any], bits: int) -> bytes:
    """Signed codes in two's complement, ``8 // bits`` of them a byte, the first in the low bits (ONNX's order).

    Args:
        codes: int8, any shape; taken in row-major order. The last byte is filled up with zeros.
        bits: 2, 4 or 8.
    """
    each = 8 // bits
    flat = codes.astype(np.int8).view(np.uint8).reshape(-1) & (2**bits - 1)
    flat = np.concatenate([flat, np.zeros(-len(flat) % each, np.uint8)]).reshape(-1, each)
    shifts = np.arange(each, dtype=np.uint8) * bits
    packed: bytes = np.bitwise_or.reduce(flat << shifts, axis=1).astype(np.uint8).tobytes()
    return packed


def unpack(packed: bytes, bits: int, count: int) -> np.ndarray[Any, Any]:
    """The first ``count`` codes of :func:`pack`, int8."""
    shifts = np.arange(8 // bits, dtype=np.uint8) * bits
    fields = (np.frombuffer(packed, np.uint8)[:, None] >> shifts & (2**bits - 1)).reshape(-1)[:count].astype(np.int16)
    codes: np.ndarray[Any, Any] = np.where(fields >= 2 ** (bits - 1), fields - 2**bits, fields).astype(np.int8)
    return codes
