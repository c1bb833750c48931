import copy

import torch

import brfx


def calibrated(model, images, **config):
    qmodel = brfx.prepare_qat(model, brfx.QATConfig(**config))
    brfx.calibrate(qmodel, [images])
    return qmodel


def test_each_site_is_seen_after_relu_and_clip_and_before_the_grid(tiny, images):
    qmodel = calibrated(tiny, images, clip_value=0.5, stream_bits=2)
    seen = brfx.observe(qmodel, images)
    assert list(seen) == ["relu_1", "relu", "relu_3", "relu_2", "relu6"]
    for site, values in seen.items():
        assert values.min() >= 0 and values.max() <= 0.5
        assert len(values.unique()) > 4 or site in ("relu_2", "relu6")  # these two stand behind another quantizer
        assert values.requires_grad


def test_the_first_site_is_what_the_layers_above_computed(tiny, images):
    qmodel = calibrated(tiny, images, stream_bits=2).eval()
    expected = qmodel.bn1(qmodel.conv1(qmodel.conv1_input(images))).relu()
    assert torch.equal(brfx.observe(qmodel, images)["relu_1"], expected)


def test_of_a_stream_the_inputs_of_its_layers_are_seen(tiny, images):
    qmodel = calibrated(tiny, images).eval()
    seen = brfx.observe(qmodel, images)
    assert list(seen) == ["conv2_input", "relu_2", "relu6"]
    assert len((seen["conv2_input"] / qmodel.relu_1.step.detach()).round().unique()) > 10


def test_a_deepcopy_observes_its_own_weights(tiny, images):
    qmodel = calibrated(tiny, images, stream_bits=2).eval()
    other = copy.deepcopy(qmodel)
    with torch.no_grad():
        other.conv1.weight.mul_(2)
    a, b = (brfx.observe(model, images)["relu_1"] for model in (qmodel, other))
    assert not torch.equal(a, b)
