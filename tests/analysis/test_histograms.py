import numpy as np
import pytest
import torch
from torch import nn

import brfx
from brfx.analysis.histograms import activation_histograms, weight_histograms
from brfx.errors import NotCalibratedError
from brfx.nn import ActivationQuantizer


def calibrated(model, images, **config):
    qmodel = brfx.prepare_qat(model, brfx.QATConfig(**config))
    brfx.calibrate(qmodel, [images], start="lsq")
    return qmodel


def assert_figures(figures, quantizer, values):
    """``figures`` are those of ``values``, counted one by one by NumPy."""
    step = quantizer.step.detach()
    prepared = quantizer.prepare(values.detach())
    ratio = (prepared / step).flatten().numpy()
    edges = figures["start"] + figures["width"] * np.arange(len(figures["counts"]) + 1)
    places = np.floor((ratio - figures["start"]) / np.float32(figures["width"]))
    assert figures["counts"] == [int((places == place).sum()) for place in range(len(edges) - 1)]
    assert figures["below"] == (ratio < edges[0]).sum() and figures["above"] == (ratio >= edges[-1]).sum()
    assert sum(figures["counts"]) + figures["below"] + figures["above"] == values.numel()
    codes = quantizer.encode(values)
    by_code = [int((codes == code).sum()) for code in quantizer.grid.codes]
    assert figures["used"] == sum(count > 0 for count in by_code)
    assert figures.get("codes", by_code) == by_code
    assert figures["bits"] == quantizer.bits and figures["step"] == pytest.approx(step.mean().item())
    first, last, apart = figures["levels"]
    assert np.arange(first, last + apart / 2, apart).tolist() == quantizer.grid.levels
    distance = prepared - quantizer.quantize(values).detach()
    assert figures["distance"] == pytest.approx((2 * distance.abs() / step).mean().item(), rel=1e-4)
    assert figures["mse"] == pytest.approx((distance.square().mean() / prepared.square().mean()).item(), rel=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        {"bits": 2},
        {"bits": 2, "weight_grid": "symmetric"},
        {"weight_bits": 1},
        {"bits": 4, "per_channel": True},
        {"bits": 8},
        {"bits": 3, "weight_quantizer": "dorefa", "act_quantizer": "pact"},
    ],
)
def test_weights_are_counted_where_they_lie(tiny, images, config):
    qmodel = calibrated(tiny, images, **config)
    found = weight_histograms(qmodel)
    assert list(found) == ["conv1", "conv2", "fc"]
    for name, figures in found.items():
        layer = qmodel.get_submodule(name)
        assert_figures(figures, layer.weight_quantizer, layer.weight)
        assert len(figures["counts"]) <= 128
        assert ("codes" in figures) == (figures["bits"] <= 4)
        steps = layer.weight_quantizer.step
        wanted = [steps.min().item(), steps.max().item()] if config.get("per_channel") else None
        assert figures.get("step_range") == wanted
    statistics = brfx.WeightStatistics(qmodel)
    for name, figures in statistics(1, 1).items():
        assert found[name]["distance"] == pytest.approx(figures["distance"], rel=1e-5)
        assert found[name]["mse"] == pytest.approx(figures["mse"], rel=1e-5)


def test_the_edges_between_few_levels_are_edges_of_the_histogram(tiny, images):
    qmodel = calibrated(tiny, images, bits=2)
    for figures in [*weight_histograms(qmodel).values(), *activation_histograms(qmodel, images).values()]:
        if figures["bits"] == 2:
            first, last, apart = figures["levels"]
            between = np.arange(first + apart / 2, last, apart)
            assert np.all((between - figures["start"]) % figures["width"] == 0)


def test_dead_channels_are_counted(tiny, images):
    with torch.no_grad():
        tiny.conv1.weight[[1, 4]] = 0.0
    found = weight_histograms(calibrated(tiny, images, bits=2, weight_grid="signed"))
    assert (found["conv1"]["dead"], found["conv1"]["channels"]) == (2, 6)
    assert (found["conv2"]["dead"], found["fc"]["channels"]) == (0, 4)


def test_activations_are_counted_where_they_lie_over_all_calls(tiny, images):
    qmodel = calibrated(tiny, images, bits=2)
    given: dict[str, list[torch.Tensor]] = {}
    quantizers = {name: module for name, module in qmodel.named_modules() if isinstance(module, ActivationQuantizer)}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: given.setdefault(name, []).append(args[0]))
        for name, module in quantizers.items()
    ]
    with torch.no_grad():
        qmodel.eval()(images)
    for handle in handles:
        handle.remove()
    found = activation_histograms(qmodel.train(), images)
    assert list(found) == list(given) and set(found) == set(quantizers)
    for name, figures in found.items():
        values = torch.cat([part.flatten() for part in given[name]])
        assert_figures(figures, quantizers[name], values)
        assert len(figures["counts"]) <= 64
    assert any(len(parts) > 1 for parts in given.values())  # a stream's
    assert qmodel.training and not any(module._forward_pre_hooks for module in qmodel.modules())


def test_after_an_error_no_hook_is_left(tiny, images):
    qmodel = brfx.prepare_qat(tiny, brfx.QATConfig(bits=2))
    assert weight_histograms(qmodel) == {}
    with pytest.raises(NotCalibratedError):
        activation_histograms(qmodel, images)
    assert not any(module._forward_pre_hooks for module in qmodel.modules())


def test_what_is_no_number_is_in_no_bin():
    torch.manual_seed(0)
    qmodel = calibrated(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(8, 4), bits=2)
    values = torch.randn(8, 4)
    values[0, 0] = torch.nan
    figures = next(iter(activation_histograms(qmodel, values).values()))
    assert sum(figures["counts"]) + figures["below"] + figures["above"] == 31 and figures["mse"] > 0
