from torch import nn

from brfx.nn import QuantizedClippedReLU
from brfx.passes import InsertObservers

from .helpers import assert_rewrites


def test_an_observer_in_front_of_each_quantized_relu():
    assert_rewrites(
        nn.Sequential(nn.Flatten(), QuantizedClippedReLU(2), QuantizedClippedReLU(2)),
        InsertObservers(),
        """
        input_1 = input
        _0 = Flatten(input_1)
        _1 = QuantizedClippedReLU(_0)
        _2 = QuantizedClippedReLU(_1)
        return _2
        """,
        """
        input_1 = input
        _0 = Flatten(input_1)
        _1_observer = ActivationObserver(_0)
        _1 = QuantizedClippedReLU(_1_observer)
        _2_observer = ActivationObserver(_1)
        _2 = QuantizedClippedReLU(_2_observer)
        return _2
        """,
        sites=2,
    )


def test_float_relus_are_declined():
    text = "input_1 = input\n_0 = ReLU(input_1)\nreturn _0"
    assert_rewrites(nn.Sequential(nn.ReLU()), InsertObservers(), text, text, sites=0)
