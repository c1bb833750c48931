import numpy as np
import pytest

from brfx.export.packing import pack, unpack


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("count", [1, 7, 8, 33])
def test_round_trip(bits, count):
    codes = np.random.default_rng(0).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), count).astype(np.int8)
    packed = pack(codes, bits)
    assert len(packed) == -(-count * bits // 8)
    assert np.array_equal(unpack(packed, bits, count), codes)


def test_the_first_code_is_in_the_low_bits():
    assert pack(np.array([1, -1, 0, -2], np.int8), 2) == bytes([0b10_00_11_01])
