import math

import pytest
import torch

import brfx
from brfx.calibration import quantizers
from brfx.errors import BrfxError
from brfx.nn import LSQQuantizer, ResidualAdd


def test_steps_are_lsqs_formula_averaged_over_batches(tiny, images):
    qmodel = brfx.prepare_qat(tiny, brfx.QATConfig(weight_bits=2, act_bits=3, placement="paper"))
    brfx.calibrate(qmodel, [images[:4], images[4:]], start="lsq")
    weight = qmodel.conv1.weight
    torch.testing.assert_close(qmodel.conv1.weight_quantizer.step.data, 2 * weight.abs().mean())
    first, seen = next(iter(brfx.observe(qmodel.eval(), images).items()))
    expected = (seen[:4].mean() + seen[4:].mean()) / 2 * 2 / math.sqrt(7)
    torch.testing.assert_close(qmodel.get_submodule(first).step.data, expected.detach())


def test_steps_start_at_least_squared_error_by_default(tiny, images):
    qmodel = brfx.prepare_qat(tiny, brfx.QATConfig(bits=8))
    brfx.calibrate(qmodel, [images])
    steps = {name: quantizer.step.clone() for name, quantizer in quantizers(qmodel).items()}
    brfx.calibrate(qmodel, [images], start="mse")
    assert all(torch.equal(quantizer.step, steps[name]) for name, quantizer in quantizers(qmodel).items())
    weight = qmodel.conv1.weight
    assert weight.abs().max() / 127 * 0.9 < qmodel.conv1.weight_quantizer.step < 2 * weight.abs().mean() / 127**0.5 / 2


def test_mode_and_buffers_come_back(tiny, images):
    qmodel = brfx.prepare_qat(tiny.train())
    before = {name: buffer.clone() for name, buffer in qmodel.named_buffers()}
    brfx.calibrate(qmodel, [images], batch_statistics=True)
    assert qmodel.training and all(module.training for module in qmodel.modules())
    assert all(torch.equal(buffer, before[name]) for name, buffer in qmodel.named_buffers())


def test_uncalibrated_refuses_everything_but_a_pass_through(tiny, images, tmp_path):
    qmodel = brfx.prepare_qat(tiny)
    loader = [(images, torch.zeros(8, dtype=torch.long))]
    for attempt in (
        lambda: qmodel(images),
        lambda: brfx.evaluate(qmodel, loader),
        lambda: brfx.fit(qmodel, loader, loader, brfx.TrainConfig(epochs=1)),
        lambda: brfx.save(qmodel, tmp_path / "model.pt"),
        lambda: brfx.export_onnx(qmodel, tmp_path / "model.onnx", images),
    ):
        with pytest.raises(brfx.BrfxError, match=r"brfx\.calibrate"):
            attempt()
    assert not list(tmp_path.iterdir())
    with brfx.quantization_disabled(qmodel):
        qmodel(images)


def test_errors(tiny, images):
    qmodel = brfx.prepare_qat(tiny)
    with pytest.raises(brfx.BrfxError, match="no batch"):
        brfx.calibrate(qmodel, [])
    with pytest.raises(brfx.BrfxError, match="NaN"):
        brfx.calibrate(qmodel, [images * math.nan])
    with pytest.raises(brfx.BrfxError, match="lsq or mse"):
        brfx.calibrate(qmodel, [images], start="best")


def test_dead_activations_get_a_usable_step(tiny, images):
    with torch.no_grad():
        tiny.conv2.weight.zero_()
        tiny.conv2.bias.fill_(-1)
    qmodel = brfx.prepare_qat(tiny)
    brfx.calibrate(qmodel, [images])
    assert all(quantizer.step > 0 for quantizer in quantizers(qmodel).values())
    assert qmodel(images).isfinite().all()


def test_a_batch_norm_written_as_a_function_keeps_its_statistics():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)

        def forward(self, x):
            bn = self.bn
            return torch.nn.functional.batch_norm(self.conv(x), bn.running_mean, bn.running_var, training=self.training)

    qmodel = brfx.prepare_qat(Net())
    brfx.calibrate(qmodel, [torch.randn(1, 3, 1, 1)])  # in training this would have one value a channel
    assert torch.equal(qmodel.bn.running_mean, torch.zeros(4))
    qmodel.train()(torch.randn(2, 3, 4, 4))
    assert not torch.equal(qmodel.bn.running_mean, torch.zeros(4))


class Auxiliary(torch.nn.Module):
    """A head that only training reaches, behind a batch norm whose statistics the graph itself changes."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.head = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2)
        self.aux_bn, self.aux = torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x))).mean((2, 3))
        if not self.training:
            return self.head(x)
        y = torch.nn.functional.batch_norm(x, self.aux_bn.running_mean, self.aux_bn.running_var, training=True)
        return self.head(x), self.aux(y)


def test_a_branch_that_only_training_reaches_is_calibrated_and_changes_nothing_else():
    torch.manual_seed(0)
    model, batches = Auxiliary(), [torch.randn(4, 3, 8, 8) for _ in range(3)]
    model.bn.running_mean.normal_()
    qmodel = brfx.prepare_qat(model, brfx.QATConfig(bits=4)).eval()
    before = {name: buffer.clone() for name, buffer in qmodel.named_buffers()}
    brfx.calibrate(qmodel, batches)
    assert all(torch.equal(buffer, before[name]) for name, buffer in qmodel.named_buffers())
    assert not qmodel.training and not isinstance(qmodel(batches[0]), tuple)
    assert {quantizer.mode for quantizer in quantizers(qmodel).values()} == {"quantize"}
    assert {quantizer.batches_seen for quantizer in quantizers(qmodel).values()} == {3}

    class Plain(Auxiliary):
        def forward(self, x):
            return self.head(torch.relu(self.bn(self.conv(x))).mean((2, 3)))

    plain = Plain()
    plain.load_state_dict(model.state_dict())
    plain = brfx.prepare_qat(plain, brfx.QATConfig(bits=4))
    brfx.calibrate(plain, batches)
    steps = {name: quantizer.step for name, quantizer in quantizers(qmodel).items()}
    assert all(torch.equal(quantizer.step, steps[name]) for name, quantizer in quantizers(plain).items())
    assert set(steps) - set(quantizers(plain)) == {"aux_input", "aux.weight_quantizer"}


def test_a_sign_that_only_training_shows_is_kept():
    """torch's own encoder layer is called as it is, so that no graph tells what its linears read."""

    class Net(Auxiliary):
        def __init__(self):
            super().__init__()
            self.aux = torch.nn.TransformerEncoderLayer(4, 1, 8, batch_first=True)

        def forward(self, x):
            x = torch.relu(self.bn(self.conv(x))).mean((2, 3))
            return (self.head(x), self.aux(x[:, None])) if self.training else self.head(x)

    torch.manual_seed(0)
    qmodel = brfx.prepare_qat(Net(), brfx.QATConfig(bits=2)).eval()
    batches = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    brfx.calibrate(qmodel, batches)
    found = {name: q for name, q in quantizers(qmodel).items() if getattr(q, "sign_from_data", False)}
    assert all(quantizer.signed == quantizer.negative for quantizer in found.values())
    assert found["aux.linear1.input_quantizer"].signed and not found["aux.linear2.input_quantizer"].signed


def test_a_step_that_python_code_never_asked_for_is_not_trained():
    class Branches(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)

        def forward(self, x):
            return self.a(x) if x.mean() > 0 else self.b(x)

    qmodel, x = brfx.prepare_qat(Branches()), torch.rand(3, 4)
    for batches, trained in (([x], {"a"}), ([-x], {"b"}), ([x, -x], {"a", "b"})):
        brfx.calibrate(qmodel, batches)
        steps = {name: quantizer.step for name, quantizer in quantizers(qmodel).items()}
        assert {name.partition(".")[0] for name, step in steps.items() if step.requires_grad} >= trained
        assert all(step.requires_grad == step.isfinite().all() for step in steps.values())


class Residual(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.bn = torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 4, 1), torch.nn.BatchNorm2d(4)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return torch.relu(self.bn(self.conv(x)) + x)


@pytest.mark.parametrize("fails", [False, True])
def test_the_modes_and_buffers_come_back_even_where_calibration_fails(images, fails):
    qmodel = brfx.prepare_qat(Residual(), brfx.QATConfig(bits=2)).train()
    qmodel.bn.eval()  # frozen by its user
    modes = {name: module.training for name, module in qmodel.named_modules()}
    before = {name: buffer.clone() for name, buffer in qmodel.named_buffers()}
    batches = [images, images * math.nan] if fails else [images]
    if fails:
        with pytest.raises(brfx.BrfxError, match="NaN"):
            brfx.calibrate(qmodel, batches, batch_statistics=True)
    else:
        brfx.calibrate(qmodel, batches, batch_statistics=True)
    assert {name: module.training for name, module in qmodel.named_modules()} == modes
    assert all(torch.equal(buffer, before[name]) for name, buffer in qmodel.named_buffers())
    found = [module for module in qmodel.modules() if isinstance(module, (LSQQuantizer, ResidualAdd))]
    assert {module.mode for module in found} == {"quantize"} and any(isinstance(m, ResidualAdd) for m in found)


def test_within_quantization_disabled_and_behind_it_modes_are_what_they_were(tiny, images):
    qmodel = brfx.prepare_qat(tiny)
    brfx.calibrate(qmodel, [images])
    expected = qmodel.eval()(images)
    with brfx.quantization_disabled(qmodel):
        off = qmodel(images)
        with brfx.quantization_disabled(qmodel):
            assert torch.equal(qmodel(images), off)
        assert torch.equal(qmodel(images), off)
    assert torch.equal(qmodel(images), expected) and not torch.equal(off, expected)
    with pytest.raises(ZeroDivisionError), brfx.quantization_disabled(qmodel):
        raise ZeroDivisionError
    assert torch.equal(qmodel(images), expected)


def test_batches_that_are_dicts_are_told_about_forward(tiny, images):
    qmodel = brfx.prepare_qat(tiny)
    with pytest.raises(brfx.BrfxError, match=r"a dict of 'image', 'mask' .*: say how it is run with forward="):
        brfx.calibrate(qmodel, [{"image": images, "mask": None}])
    brfx.calibrate(qmodel, [{"image": images}], forward=lambda model, batch: model(batch["image"]))


def test_a_quantizer_without_a_step_is_named(tiny, images):
    qmodel = brfx.prepare_qat(tiny)
    with pytest.raises(brfx.BrfxError, match=r"^conv1_input has no step yet: run brfx\.calibrate"):
        qmodel(images)
    with pytest.raises(brfx.BrfxError, match=r"^conv1_input met NaN or infinite values"):
        brfx.calibrate(qmodel, [images * torch.nan])


def test_a_model_that_was_not_rewritten_is_refused(tiny, images):
    for use in (lambda: brfx.calibrate(tiny, [images]), lambda: brfx.BinPenalty(tiny)):
        with pytest.raises(BrfxError, match=r"this TinyNet was not made by brfx\.prepare_qat"):
            use()
