import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import brfx
from brfx.models import build_model
from brfx.nn import LSQWeightQuantizer, QuantizedLayer, ResidualAdd, StreamAdd, StreamQuantizer
from brfx.regularizers import Regularizers
from brfx.regularizers.bin_penalty import per_value
from brfx.regularizers.bin_regularizer import bin_loss
from brfx.regularizers.kurtosis import KurtosisTerm
from brfx.train.optim import build_optimizer
from brfx.train.step import build_step, loss_step


def calibrated(model, images, **config):
    qmodel = brfx.prepare_qat(model, brfx.QATConfig(**config))
    brfx.calibrate(qmodel, [images], start="lsq")
    return qmodel


def test_output_is_the_models_and_terms_are_the_regularizers_sums(tiny, images):
    qmodel = calibrated(tiny, images).eval()
    output, br = brfx.BinPenalty(qmodel, weight=0.5, act=0.25)(images)
    assert torch.equal(output, qmodel(images))
    weight = sum(
        brfx.BinRegularizer(2)(m.weight, m.weight_quantizer.step)
        for m in qmodel.modules()
        if isinstance(m, QuantizedLayer)
    )
    act = sum(
        brfx.BinRegularizer(2, signed=False)(values, qmodel.get_submodule(site).step)
        for site, values in brfx.observe(qmodel, images).items()
    )
    torch.testing.assert_close(br.weight, weight.detach())
    torch.testing.assert_close(br.act, act.detach())
    torch.testing.assert_close(br.total, 0.5 * weight + 0.25 * act)


def test_the_lambdas_are_no_part_of_the_state(tiny):
    qmodel = brfx.prepare_qat(tiny)
    assert list(brfx.BinPenalty(qmodel).state_dict()) == [f"model.{name}" for name in qmodel.state_dict()]


def grads(penalty, images):
    penalty.zero_grad()
    penalty(images)[1].total.backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in penalty.model.named_parameters()}


def test_weight_regularizer_reaches_weights_and_their_steps_only(tiny, images):
    found = grads(brfx.BinPenalty(calibrated(tiny, images), weight=1, act=0), images)
    reached = {name for name, grad in found.items() if grad is not None and grad.abs().sum() > 0}
    assert reached == {
        f"{layer}.{p}" for layer in ("conv1", "conv2", "fc") for p in ("weight", "weight_quantizer.step")
    }


def test_activation_regularizer_trains_the_layers_above_and_its_steps_only_when_asked(tiny, images):
    qmodel = calibrated(tiny, images)
    above = grads(brfx.BinPenalty(qmodel, weight=0, act=1), images)
    assert above["conv1.weight"].abs().sum() > 0
    last = list(brfx.observe(qmodel, images))[-1]  # no other site is behind the last: its step is reached by L_BR alone
    assert above[f"{last}.step"] is None
    asked = grads(brfx.BinPenalty(qmodel, weight=0, act=1, act_gradient_to_step=True), images)
    assert asked[f"{last}.step"].abs().sum() > 0


def test_a_step_with_the_activation_regularizer_alone_changes_the_first_convolution(tiny, images):
    qmodel = calibrated(tiny, images)
    before = qmodel.conv1.weight.detach().clone()
    optimizer = torch.optim.SGD(qmodel.parameters(), 0.1)
    brfx.BinPenalty(qmodel, weight=0, act=1)(images)[1].total.backward()
    optimizer.step()
    assert not torch.equal(qmodel.conv1.weight, before)


@pytest.mark.parametrize(("weights", "acts"), [(True, False), (False, True), (True, True), (False, False)])
def test_begin_freezes_the_steps_that_were_asked_for(tiny, images, weights, acts):
    qmodel = calibrated(tiny, images)
    penalty = brfx.BinPenalty(qmodel, freeze_weight_steps=weights, freeze_act_steps=acts)
    steps = {n: p for n, p in qmodel.named_parameters() if n.endswith("step")}
    assert all(step.requires_grad for step in steps.values())
    penalty.begin()
    for name, step in steps.items():
        assert step.requires_grad != (weights if "weight_quantizer" in name else acts)


def test_fp32_weights_or_activations_have_no_regularizer(tiny, images):
    for config, zero in (({"weight_bits": 32, "act_bits": 2}, "weight"), ({"weight_bits": 2, "act_bits": 32}, "act")):
        _, br = brfx.BinPenalty(calibrated(tiny, images, **config))(images)
        assert getattr(br, zero) == 0
        assert br.total > 0


def test_per_value_each_weight_is_pulled_alike_whatever_its_layers_size(tiny, images):
    """SGD at rate 0.5 and lambda 0.25 closes an eighth of every distance; the steps are left alone."""
    qmodel = calibrated(tiny.double(), images.double())
    layers = (qmodel.conv1, qmodel.conv2, qmodel.fc)
    distances = [(layer.weight - layer.quantized_weight()).detach() for layer in layers]
    optimizer = torch.optim.SGD(qmodel.parameters(), 0.5)
    br = brfx.BinPenalty(qmodel, weight=0.25, act=0, form="per_value")(images.double())[1]
    torch.testing.assert_close(br.weight, sum(distance.square().sum() / 2 for distance in distances))
    torch.testing.assert_close(br.total, 0.25 * br.weight)
    br.total.backward()
    for layer, distance in zip(layers, distances, strict=True):
        torch.testing.assert_close(layer.weight.grad, 0.25 * distance, rtol=1e-12, atol=1e-15)
        assert layer.weight_quantizer.step.grad is None
    optimizer.step()
    for layer, distance in zip(layers, distances, strict=True):
        torch.testing.assert_close(layer.weight - layer.quantized_weight(), 0.875 * distance)


def test_per_value_activations_count_as_a_mean_over_the_batch(tiny, images):
    qmodel = calibrated(tiny.double(), images.double()).eval()
    penalty = brfx.BinPenalty(qmodel, weight=0, act=1, form="per_value")
    expected = 0.0
    for site, values in brfx.observe(qmodel, images.double()).items():
        quantizer = qmodel.get_submodule(site)
        values = values.detach().requires_grad_()
        distance = (values - quantizer.quantize(values)).detach()
        expected += distance.square().sum() / 2 / len(images)
        bin_loss(*per_value(quantizer, values)).backward()
        torch.testing.assert_close(values.grad, distance / len(images), rtol=1e-12, atol=1e-15)
        assert quantizer.step.grad is None
    torch.testing.assert_close(penalty(images.double())[1].act, expected)
    torch.testing.assert_close(penalty(torch.cat([images, images]).double())[1].act, expected)


class FunctionalWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3))

    def forward(self, x):
        return F.relu(F.conv2d(x, self.kernel)).mean((2, 3))


@pytest.mark.parametrize("act", [0.0, 1.0])
def test_per_value_weights_of_functions_too(images, act):
    torch.manual_seed(0)
    qmodel = calibrated(FunctionalWeight().double(), images.double()).train()
    (quantizer,) = (m for m in qmodel.modules() if isinstance(m, LSQWeightQuantizer))
    distance = (qmodel.kernel - quantizer(qmodel.kernel)).detach()
    penalty = brfx.BinPenalty(qmodel, weight=1, act=act, form="per_value")
    for run in (penalty, penalty.training_form(False)):
        br = run(images.double())[1]
        torch.testing.assert_close(br.weight, distance.square().sum() / 2)
        if not act:
            qmodel.zero_grad()
            br.total.backward()
            torch.testing.assert_close(qmodel.kernel.grad, distance, rtol=1e-12, atol=1e-15)
            assert quantizer.step.grad is None


@pytest.mark.parametrize("lambdas", [(0.5, 0.0), (0.5, 0.25), (0.0, 0.25)])
def test_weights_of_functions_have_the_regularizer_of_weights(images, lambdas):
    """They count in ``weight`` alone, with lambda_w, and their steps learn from it."""
    torch.manual_seed(0)
    qmodel = calibrated(FunctionalWeight().double(), images.double()).train()
    (quantizer,) = (m for m in qmodel.modules() if isinstance(m, LSQWeightQuantizer))
    expected = brfx.BinRegularizer(2)(qmodel.kernel, quantizer.step)
    penalty = brfx.BinPenalty(qmodel, *lambdas)
    acts = list(brfx.observe(qmodel, images.double()).items())
    act = sum(
        brfx.BinRegularizer(m.bits, m.signed)(m.prepare(values), m.step)
        for m, values in ((qmodel.get_submodule(site), values) for site, values in acts)
        if not isinstance(m, LSQWeightQuantizer)
    )
    br = penalty(images.double())[1]
    torch.testing.assert_close((br.weight, br.act), (expected.detach(), act.detach()))
    torch.testing.assert_close(br.total, lambdas[0] * expected + lambdas[1] * act)
    if not lambdas[1]:
        found = torch.autograd.grad(br.total, (qmodel.kernel, quantizer.step))
        torch.testing.assert_close(found, torch.autograd.grad(lambdas[0] * expected, (qmodel.kernel, quantizer.step)))


def test_forms_that_there_are_not(tiny, images):
    qmodel = calibrated(tiny, images)
    with pytest.raises(brfx.BrfxError, match="form='sum': takes mean or per_value"):
        brfx.BinPenalty(qmodel, form="sum")
    with pytest.raises(brfx.BrfxError, match="trains no step"):
        brfx.BinPenalty(qmodel, form="per_value", act_gradient_to_step=True)


@pytest.mark.parametrize("name", ["weight", "act"])
def test_a_lambda_below_zero_is_refused(tiny, name):
    for value in (-1, -1e-3, float("nan")):
        with pytest.raises(brfx.BrfxError, match=f"{name}={value}: a lambda takes 0 or more"):
            brfx.BinPenalty(brfx.prepare_qat(tiny), **{name: value})


def forms(qmodel, penalty, compiled):
    """The step as the modules are called, and the forms in which ``fit`` trains; each calls for its gradients."""
    eager = {"plain": loss_step(qmodel, penalty), "codes": loss_step(qmodel, penalty, kernels=False)}
    return eager | {how: build_step(qmodel, penalty, how) for how in compiled}


def gradients(qmodel, step, images, labels):
    """What the step tells, once backward is through, and the gradients."""
    qmodel.zero_grad()
    loss, numbers = step(images, labels)
    loss.backward()
    return {k: v.clone() for k, v in numbers.items()}, {name: p.grad.clone() for name, p in qmodel.named_parameters()}


def assert_forms_agree(qmodel, penalty, images, compiled=("kernels", "whole")):
    """Codes change no bit; compiled code is held to in float64, where no rounding moves a value across a bin's border.

    The batch norms' statistics are put back, so that every form starts from the same model.
    """
    torch._dynamo.reset()
    labels, start = torch.arange(len(images)) % 4, {k: v.clone() for k, v in qmodel.state_dict().items()}
    found, ends = {}, {}
    for name, step in forms(qmodel, penalty, compiled).items():
        qmodel.load_state_dict(start)
        found[name] = gradients(qmodel, step, images, labels)
        ends[name] = {k: v.clone() for k, v in qmodel.state_dict().items()}
    numbers, expected = found.pop("plain")
    assert all(grad.abs().sum() > 0 for grad in expected.values())
    assert all(found["codes"][0][name] == numbers[name] for name in numbers if name != "act")  # summed in backward
    streams = any(isinstance(module, StreamQuantizer) for module in qmodel.modules())
    for name, grad in found["codes"][1].items():  # the gradients of a stream's readers are added in another order
        torch.testing.assert_close(grad, expected[name], rtol=1e-12 if streams else 0, atol=1e-15 if streams else 0)
    for form, (logged, grads) in found.items():
        torch.testing.assert_close(logged, numbers, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(ends[form], ends["plain"])
        for name, grad in grads.items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-8, atol=1e-12, msg=f"{form}: {name}")


@pytest.mark.parametrize(
    "lambdas",
    [(1.0, 1.0), *(pytest.param(slow, marks=pytest.mark.slow) for slow in ((1.0, 0.0), (0.0, 1.0), None))],
)
def test_every_form_of_the_step_has_the_gradients_of_plain_calls(tiny, images, lambdas):
    qmodel = calibrated(tiny.double(), images.double()).train()
    assert_forms_agree(qmodel, brfx.BinPenalty(qmodel, *lambdas) if lambdas else None, images.double())


@pytest.mark.parametrize("compiled", [(), pytest.param(("kernels", "whole"), marks=pytest.mark.slow)])
@pytest.mark.parametrize("lambdas", [(0.5, 0.25), (0.5, 0.0)])
def test_so_has_the_regularizer_per_value(tiny, images, lambdas, compiled):
    qmodel = calibrated(tiny.double(), images.double()).train()
    assert_forms_agree(qmodel, brfx.BinPenalty(qmodel, *lambdas, form="per_value"), images.double(), compiled)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_lambda_that_is_raised_later_trains(tiny, images, compiled):
    qmodel = calibrated(tiny, images)
    penalty, raised = brfx.BinPenalty(qmodel, 1, 0.5), brfx.BinPenalty(copy.deepcopy(qmodel), 0, 0)
    if compiled:
        raised.compile()
    raised.train()(images)
    raised.weight.fill_(1), raised.act.fill_(0.5)
    for each in (penalty, raised):
        each.train()(images)[1].total.backward()
    for (name, wanted), found in zip(qmodel.named_parameters(), raised.model.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, msg=name)


def test_a_penalty_is_pickled_and_copied_with_its_model(images):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    qmodel = calibrated(net, images)
    penalty = Regularizers(brfx.BinPenalty(qmodel, weight=1, act=0.5), KurtosisTerm(qmodel, 0.1))
    wanted = penalty(images)[1]
    for twin in (pickle.loads(pickle.dumps(penalty)), copy.deepcopy(penalty)):
        assert twin.run.model is not qmodel
        assert torch.equal(twin(images)[1].total, wanted.total) and twin(images)[1]._fields == wanted._fields
        with torch.no_grad():
            next(twin.run.model.parameters()).mul_(2)
        assert twin(images)[1].weight != wanted.weight


@pytest.mark.parametrize(("lambdas", "terms"), [((1, 0), ("weight",)), ((0, 1), ("act",)), ((1, 1), ("weight", "act"))])
def test_what_has_a_lambda_of_zero_is_neither_computed_nor_told(tiny, images, lambdas, terms):
    qmodel = calibrated(tiny, images).train()
    penalty = brfx.BinPenalty(qmodel, *lambdas)
    for kernels in (None, False):
        loss, logged = loss_step(qmodel, penalty, kernels=kernels)(images, torch.arange(8) % 4)
        loss.backward()
        assert set(logged) == {"task", "correct", *terms}
    br = penalty.training_form(False)(images)[1]
    br.total.backward()
    assert [name for name in ("weight", "act") if getattr(br, name) > 0] == list(terms)


@pytest.mark.parametrize("compiled", [(), pytest.param(("kernels", "whole"), marks=pytest.mark.slow)])
def test_binary_weights_have_a_finite_loss_and_every_forms_gradients(tiny, images, compiled):
    """No layer of the network has a multiple of 1,024 weights."""
    qmodel = calibrated(tiny.double(), images.double(), weight_bits=1).train()
    penalty = brfx.BinPenalty(qmodel)
    expected = sum(
        brfx.BinRegularizer(1)(layer.weight, layer.weight_quantizer.step)
        for layer in (qmodel.conv1, qmodel.conv2, qmodel.fc)
    )
    torch.testing.assert_close(penalty.weight_loss(), expected)
    assert_forms_agree(qmodel, penalty, images.double(), compiled)


class Residual(nn.Module):
    """An aligned shortcut and an aligned projection, the default placement of a ResNet."""

    def __init__(self, width):
        super().__init__()
        self.stem, self.project, self.head = nn.Conv2d(3, width, 2), nn.Conv2d(width, width, 1), nn.Linear(width, 4)
        self.a, self.b = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norm_a, self.norm_b = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(self.norm_a(self.a(x)) + x)
        x = F.relu(self.norm_b(self.b(x)) + self.project(x))
        return self.head(x.mean((2, 3)))


def test_hooks_of_a_layer_run_in_every_form(tiny, images):
    tiny.conv2.register_forward_hook(lambda layer, inputs, output: 3 * output)
    qmodel = calibrated(tiny, images).train()
    steps = [loss_step(qmodel, None, kernels=kernels) for kernels in (None, False)]
    (logged, grads), (with_codes, coded_grads) = [
        gradients(qmodel, step, images, torch.arange(8) % 4) for step in steps
    ]
    assert logged == with_codes and all(torch.equal(grad, coded_grads[name]) for name, grad in grads.items())


@pytest.mark.parametrize(
    ("settings", "streams", "width"),  # of 16 channels sums are made line by line (brfx.kernels.channel_sums)
    [
        ({"stream_bits": 2}, 0, 4),
        ({"stream_bits": 8, "weight_grid": "symmetric"}, 1, 16),
        pytest.param({"stream_bits": 2}, 0, 16, marks=pytest.mark.slow),
        pytest.param({"stream_bits": 8, "weight_grid": "symmetric"}, 1, 4, marks=pytest.mark.slow),
    ],
)
def test_residual_adds_and_symmetric_weights_too(images, width, settings, streams):
    torch.manual_seed(0)
    qmodel = calibrated(Residual(width).double(), images.double(), **settings).double().train()  # steps too
    adds = [module for module in qmodel.modules() if isinstance(module, ResidualAdd)]
    assert len(adds) == 2 and sum(isinstance(add, StreamAdd) for add in adds) == streams
    assert_forms_agree(qmodel, brfx.BinPenalty(qmodel, 1.0, 1.0), images.double())


@pytest.mark.parametrize("how", ["kernels", "whole"])
def test_a_smaller_batch_and_another_lambda_compile_nothing(tiny, images, how):
    torch._dynamo.reset()
    qmodel = calibrated(tiny, images).train()
    penalty = brfx.BinPenalty(qmodel)
    step = build_step(qmodel, penalty, how)
    step(images, torch.arange(8) % 4)[0].backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        step(images[:3], torch.arange(3))
        penalty.weight.fill_(0.25)
        penalty.act.fill_(0.5)
        loss, numbers = step(images, torch.arange(8) % 4)
        loss.backward()
    expected, parts = loss_step(qmodel, penalty)(images, torch.arange(8) % 4)
    torch.testing.assert_close(numbers, parts)
    torch.testing.assert_close(loss.detach() + 0.5 * numbers["act"], expected.detach())  # act comes with backward


@pytest.mark.parametrize("how", ["none", pytest.param("kernels", marks=pytest.mark.slow), "whole"])
def test_bfloat16_trains_with_codes_in_full_precision(tiny, images, how):
    torch._dynamo.reset()
    qmodel = calibrated(tiny, images).train()
    labels = torch.arange(8) % 4
    full, _ = gradients(qmodel, loss_step(qmodel, brfx.BinPenalty(qmodel)), images, labels)
    logged, _ = gradients(qmodel, build_step(qmodel, brfx.BinPenalty(qmodel), how, "bf16"), images, labels)
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in qmodel.parameters())
    for name in ("task", "weight", "act"):
        torch.testing.assert_close(logged[name], full[name], rtol=0.05, atol=0.05)


def test_on_the_real_checkpoint_lambda_1_lowers_both_by_thirty_per_cent_in_100_steps(real_checkpoint, cifar10_test):
    from brfx.data import BatchLoader, Preprocessing
    from brfx.io.float_checkpoint import load_float

    model = build_model("resnet20", 10)
    load_float(model, real_checkpoint)
    loader = BatchLoader(cifar10_test, Preprocessing(32), 8, augment=True)
    batches = [batch for batch, _ in zip(loader, range(100), strict=False)]
    ends = {}
    for regularized in (False, True):
        qmodel = brfx.prepare_qat(model, brfx.QATConfig(bits=2, placement="paper"))
        brfx.calibrate(qmodel, [images for images, _ in batches[:8]], start="mse", batch_statistics=True)
        penalty = brfx.BinPenalty(qmodel.train(), weight=1.0, act=1.0)
        step = loss_step(qmodel, penalty if regularized else None)
        optimizer = build_optimizer(qmodel, brfx.TrainConfig())
        for images, labels in batches:
            step(images, labels)[0].backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            ends[regularized] = penalty(torch.cat([images for images, _ in batches[:8]]))[1]
    assert ends[True].weight < 0.7 * ends[False].weight
    assert ends[True].act < 0.7 * ends[False].act
