import logging
import math

import pytest
import torch
from torch import nn

import brfx
from brfx.analysis.sqnr import lossy_at_8_bits, sqnr
from brfx.nn import LSQActivationQuantizer


def test_sqnr_is_the_ratio_of_energies_in_decibels():
    values = torch.tensor([3.0, 4.0])
    assert sqnr(values, torch.tensor([3.0, 4.5])) == pytest.approx(20.0)
    assert sqnr(values, values) == sqnr(torch.zeros(2), torch.zeros(2)) == math.inf


class Shifted(nn.Module):
    """An input of a layer whose values lie as ``shape`` makes them."""

    def __init__(self, shape):
        super().__init__()
        self.conv, self.shape = nn.Conv2d(3, 4, 1), shape

    def forward(self, x):
        return self.conv(self.shape(x))


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("shape", [torch.tanh, torch.relu, lambda x: x * 100, lambda x: x.exp()])
def test_a_sound_network_is_calibrated_without_a_word(tiny, images, caplog, shape, bits):
    with caplog.at_level(logging.WARNING):
        brfx.calibrate(brfx.prepare_qat(tiny, brfx.QATConfig(bits=bits), example_inputs=images), [images])
        brfx.calibrate(brfx.prepare_qat(Shifted(shape), brfx.QATConfig(bits=bits), example_inputs=images), [images])
    assert not caplog.records


@pytest.mark.parametrize("bits", [2, 8])
def test_an_unsigned_grid_for_negative_values_is_named_with_the_share(images, caplog, bits):
    qmodel = brfx.prepare_qat(Shifted(torch.tanh), brfx.QATConfig(bits=bits), example_inputs=images)
    qmodel.conv_input.grid = type(qmodel.conv_input.grid)(bits, signed=False)
    caplog.clear()
    brfx.calibrate(qmodel, [images])
    (record,) = (record for record in caplog.records if record.levelno == logging.WARNING)
    share = (images < 0).float().mean().item()
    assert "conv_input 3" in record.message or "conv_input 2" in record.message
    assert f"{share:.0%} of its values are negative" in record.message


def watched(values, start):
    quantizer = LSQActivationQuantizer(2, signed=False)
    quantizer.begin_calibration(start)
    with lossy_at_8_bits({"q": quantizer}, start) as lossy:
        quantizer(values)
    assert not quantizer._forward_hooks
    return lossy


def test_a_range_that_does_not_fit_is_named():
    outlier = torch.cat([torch.full((4096,), 0.01), torch.full((1,), 100.0)])
    assert not watched(outlier, "mse")  # its range reaches the one value, which has nearly all of the energy
    assert "its values reach to 100, its range to 1.1" in watched(outlier, "lsq")["q"]
    assert "its values vanish, at most 1e-08" in watched(torch.rand(2000) * 1e-8, "mse")["q"]
