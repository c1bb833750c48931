import copy

import pytest
import torch
from torch import nn

import brfx
from brfx.calibration import quantizers
from brfx.graph.utils import dump
from brfx.models import build_model
from brfx.nn import (
    ActivationObserver,
    LSQActivationQuantizer,
    QuantizedClippedReLU,
    QuantizedLayer,
    StreamQuantizer,
)


def prepared(model, images, **config):
    qmodel = brfx.prepare_qat(model, brfx.QATConfig(**config))
    brfx.calibrate(qmodel, [images])
    return qmodel


def test_the_whole_rewrite_of_a_small_net(tiny):
    assert dump(brfx.prepare_qat(tiny)) == "\n".join(
        [
            "x = input",
            "conv1_input = LSQActivationQuantizer(x)",
            "conv1 = QuantizedConv2d(conv1_input)",
            "bn1 = BatchNorm2d(conv1)",
            "relu_4 = StreamQuantizer(bn1)",
            "conv2_input_observer = ActivationObserver(relu_4)",
            "conv2_input = LSQActivationQuantizer(conv2_input_observer)",
            "conv2 = QuantizedConv2d(conv2_input)",
            "relu_1 = StreamQuantizer(conv2)",
            "add = add(relu_4, relu_1)",  # both on one grid: no branch to quantize
            "relu_2 = StreamQuantizer(add)",
            "relu_2_observer = ActivationObserver(relu_2)",
            "relu_5 = QuantizedClippedReLU(relu_2_observer)",
            "relu6_observer = ActivationObserver(relu_5)",
            "relu6 = QuantizedClippedReLU(relu6_observer)",
            "mean = mean(relu6)",
            "fc_input = LSQActivationQuantizer(mean)",
            "fc = QuantizedLinear(fc_input)",
            "return fc",
        ]
    )


def test_paper_placement_leaves_the_image_and_the_average(tiny):
    assert dump(brfx.prepare_qat(tiny, brfx.QATConfig(placement="paper"))) == "\n".join(
        [
            "x = input",
            "conv1 = QuantizedConv2d(x)",
            "bn1 = BatchNorm2d(conv1)",
            "relu_1_observer = ActivationObserver(bn1)",
            "relu_4 = QuantizedClippedReLU(relu_1_observer)",
            "conv2 = QuantizedConv2d(relu_4)",
            "relu_observer = ActivationObserver(conv2)",
            "relu_1 = QuantizedClippedReLU(relu_observer)",
            "add = add(relu_4, relu_1)",
            "relu_3_observer = ActivationObserver(add)",
            "relu_2 = QuantizedClippedReLU(relu_3_observer)",
            "relu_2_observer = ActivationObserver(relu_2)",
            "relu_5 = QuantizedClippedReLU(relu_2_observer)",
            "relu6_observer = ActivationObserver(relu_5)",
            "relu6 = QuantizedClippedReLU(relu6_observer)",
            "mean = mean(relu6)",
            "fc = QuantizedLinear(mean)",
            "return fc",
        ]
    )


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "mobilenet_v2", "squeezenet1_1"])
@pytest.mark.parametrize("training", [False, True])
def test_with_quantizers_disabled_the_graph_equals_the_model_bit_for_bit(name, training):
    torch.manual_seed(0)
    model = build_model(name).train(training)
    x = torch.randn(2, 3, 64, 64)
    qmodel = brfx.prepare_qat(model)
    outputs = []
    with brfx.quantization_disabled(qmodel):
        for module in (model, qmodel):
            torch.manual_seed(1)  # dropout
            outputs.append(module(x))
    assert qmodel.training == training
    assert torch.equal(*outputs)


def test_every_site_of_resnet20_has_its_own_step_and_the_stream_has_one():
    qmodel = brfx.prepare_qat(build_model("resnet20"))
    kinds = [type(module) for module in qmodel.modules()]
    assert kinds.count(StreamQuantizer) == 1 and kinds.count(QuantizedClippedReLU) == 9
    assert kinds.count(ActivationObserver) == 18  # in front of each second convolution's input, and of each first's
    assert len({id(quantizer.step) for quantizer in quantizers(qmodel).values()}) == 41
    qmodel = brfx.prepare_qat(build_model("resnet20"), brfx.QATConfig(stream_bits=2))
    kinds = [type(module) for module in qmodel.modules()]
    assert sum(issubclass(kind, QuantizedLayer) for kind in kinds) == 20
    assert kinds.count(QuantizedClippedReLU) == kinds.count(ActivationObserver) == 19
    steps = {id(quantizer.step) for quantizer in quantizers(qmodel).values()}
    assert len(steps) == 41  # with those of the image and the average


def test_the_float_model_is_left_alone_and_shares_nothing(tiny, images):
    before = copy.deepcopy(tiny.state_dict())
    qmodel = prepared(tiny, images)
    qmodel(images).sum().backward()
    torch.optim.SGD(qmodel.parameters(), 1.0).step()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), tiny.state_dict().values(), strict=True))
    assert not {id(p) for p in tiny.parameters()} & {id(p) for p in qmodel.parameters()}


def test_a_changed_step_changes_the_output(tiny, images):
    qmodel = prepared(tiny, images).eval()
    reference = qmodel(images)
    for name, quantizer in quantizers(qmodel).items():
        kept = quantizer.step.data.clone()
        quantizer.step.data *= 1.9
        assert not torch.equal(qmodel(images), reference), name
        quantizer.step.data.copy_(kept)
    assert torch.equal(qmodel(images), reference)


def test_fp32_state_dict_round_trip(tiny, images):
    state = copy.deepcopy(tiny.state_dict())
    qmodel = prepared(tiny, images)
    out = brfx.float_state_dict(qmodel)
    assert list(out) == list(state)
    assert all(torch.equal(out[key], state[key]) for key in state)
    qmodel.load_state_dict(state)  # strict, though the steps are not in it
    with pytest.raises(brfx.BrfxError, match="calibrate"):
        qmodel(images)
    tiny.load_state_dict(out)


@pytest.mark.parametrize(("weight_bits", "act_bits"), [(4, 8), (2, 4), (1, 2), (32, 2), (2, 32), (8, 8), (1, 1)])
def test_mixed_bits(tiny, images, weight_bits, act_bits):
    qmodel = prepared(tiny, images, weight_bits=weight_bits, act_bits=act_bits)
    qmodel(images).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in qmodel.parameters())
    for module in qmodel.modules():
        if isinstance(module, QuantizedLayer):
            assert len(module.quantized_weight().unique()) <= 2**weight_bits
        if isinstance(module, LSQActivationQuantizer) and module.regularized:
            assert len(module(torch.randn(50, 50)).unique()) <= 2**act_bits


def test_nothing_to_quantize_is_an_error():
    with pytest.raises(brfx.BrfxError, match="nothing to quantize"):
        brfx.prepare_qat(nn.Sequential(nn.Flatten(), nn.GELU()))


@pytest.mark.parametrize("field", ["bits", "weight_bits", "act_bits", "input_bits", "residual_bits"])
@pytest.mark.parametrize("value", [0, 9, 16, -1])
def test_bits_out_of_range(field, value):
    with pytest.raises(brfx.BrfxError, match=rf"{field}=.*1 to 8, or 32"):
        brfx.QATConfig(**{field: value})


def test_wrappers_are_taken_off(tiny, images):
    wrapped = nn.DataParallel(torch.compile(nn.DataParallel(tiny)))
    assert dump(brfx.prepare_qat(wrapped)) == dump(brfx.prepare_qat(tiny))


def test_lazy_modules_must_have_run():
    with pytest.raises(brfx.BrfxError, match=r"0\.weight belongs to a lazy module"):
        brfx.prepare_qat(nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU()))


def test_a_model_that_does_not_run_on_the_example(tiny):
    with pytest.raises(brfx.BrfxError, match="does not run on example_inputs"):
        brfx.prepare_qat(tiny, example_inputs=torch.randn(2, 5, 8, 8))


def test_leaf_modules_and_concrete_args(images):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.conv(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.head = Block(), nn.Conv2d(3, 2, 1)

        def forward(self, x, double=False):
            x = self.head(self.block(x))
            return x * 2 if double else x

    model = Net()
    qmodel = brfx.prepare_qat(model, leaf_modules=[Block], concrete_args={"double": True})
    assert not isinstance(qmodel.block.conv, QuantizedLayer) and isinstance(qmodel.head, QuantizedLayer)
    with brfx.quantization_disabled(qmodel):
        assert torch.equal(qmodel(images, True), model(images, double=True))


@pytest.mark.parametrize("kind", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_parametrized_layers_quantize_what_the_parametrization_gives(kind, images):
    torch.manual_seed(0)
    model = nn.Sequential(kind(nn.Conv2d(3, 4, 3)), nn.ReLU()).eval()
    qmodel = brfx.prepare_qat(model).eval()
    with brfx.quantization_disabled(qmodel):
        assert torch.equal(qmodel(images), model(images))
    brfx.calibrate(qmodel, [images])
    layer = qmodel.get_submodule("0")
    assert len((layer.quantized_weight() / layer.weight_quantizer.step).round().unique()) <= 4
    qmodel(images).sum().backward()
    assert all(p.grad is not None for name, p in qmodel.named_parameters() if "original" in name)
    assert set(brfx.float_state_dict(qmodel)) == set(model.state_dict())


@pytest.mark.parametrize("name", ["googlenet", "densenet121", "efficientnet_b0"])
@pytest.mark.parametrize("training", [False, True])
def test_prepared_once_right_in_both_modes(name, training):
    """Auxiliary heads, functional dropout, stochastic depth; prepared in the other mode than it runs in."""
    torch.manual_seed(0)
    model = build_model(name)
    for module in model.modules():
        if hasattr(module, "drop_rate"):
            module.drop_rate = 0.3
    model.train(not training)
    qmodel = brfx.prepare_qat(model)
    assert list(brfx.float_state_dict(qmodel)) == list(model.state_dict())
    x = torch.randn(2, 3, 96, 96)
    outputs = []
    with brfx.quantization_disabled(qmodel), torch.no_grad():
        for module in (model, qmodel):
            torch.manual_seed(1)
            outputs.append(module.train(training)(x))
    first, second = (output if isinstance(output, tuple) else (output,) for output in outputs)
    assert type(outputs[0]) is type(outputs[1])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_eight_bits_keep_the_signal_of_a_trained_network(real_checkpoint, cifar10_batches):
    from itertools import islice

    from brfx.io.float_checkpoint import load_float

    model = build_model("resnet20", 10)
    load_float(model, real_checkpoint)
    *batches, last = (images for images, _ in islice(cifar10_batches, 0, 20, 10))
    qmodel = brfx.prepare_qat(model.eval(), brfx.QATConfig(bits=8)).eval()
    brfx.calibrate(qmodel, batches, start="mse")
    with torch.no_grad():
        signal, noise = model(last), qmodel(last) - model(last)
    assert 10 * torch.log10(signal.square().sum() / noise.square().sum()) >= 20
