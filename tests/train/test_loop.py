import io
import json
import random

import numpy as np
import pytest
import torch
from torch import nn

import brfx
from brfx.data import BatchLoader
from brfx.models import build_model
from brfx.train import Callback, Evaluation, fit, step
from brfx.train.optim import build_optimizer, rate_factor
from brfx.train.random_state import random_state, set_random_state
from brfx.train.step import compiles_pieces, how_to_compile

from .helpers import loaders, quantized, small_net


class Recorder(Callback):
    def __init__(self):
        self.progress, self.epochs = [], []

    def on_batch(self, progress):
        self.progress.append(progress)

    def on_epoch(self, metrics):
        self.epochs.append(metrics)


def test_warm_up_has_no_regularizer_and_steps_freeze_after_it(digits, tmp_path):
    qmodel = quantized(digits)
    penalty = brfx.BinPenalty(qmodel, freeze_weight_steps=True, freeze_act_steps=True)

    class Steps(Recorder):
        def __init__(self):
            super().__init__()
            self.steps = []

        def on_epoch(self, metrics):
            super().on_epoch(metrics)
            self.steps.append([p.detach().clone() for n, p in qmodel.named_parameters() if n.endswith("step")])

    seen = Steps()
    config = brfx.TrainConfig(epochs=4, warmup_epochs=2, compile="off")
    result = fit(qmodel, *loaders(digits), config, penalty=penalty, run_dir=tmp_path, callbacks=[seen])
    assert [m.stage for m in seen.epochs] == ["warm-up", "warm-up", "penalty", "penalty"]
    assert [set(m.train.terms) for m in seen.epochs] == [set(), set(), {"weight", "act"}, {"weight", "act"}]
    assert all(not torch.equal(a, b) for a, b in zip(seen.steps[0], seen.steps[1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(seen.steps[1], seen.steps[3], strict=True))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert lines[2]["train"]["terms"]["act"] > 0
    assert (result.epoch, result.stage, result.val_accuracy) == (4, "penalty", seen.epochs[3].val_accuracy)
    last = torch.load(tmp_path / "last.pth", weights_only=True)
    assert last["metrics"]["epoch"] == 4
    for key, value in qmodel.state_dict().items():
        assert torch.equal(value, last["state_dict"][key]), key


@pytest.mark.parametrize(
    ("keep", "warmup", "accuracies", "kept", "best"),
    [
        ("last", 2, [0.9, 0.5, 0.7, 0.6], 4, 3),
        ("best", 2, [0.9, 0.9, 0.7, 0.6], 3, 3),  # the warm-up has another objective
        ("best", 1, [0.9, 0.7, 0.6, 0.7], 4, 4),  # of equals the later one
        ("best", None, [0.9, 0.7, 0.6, 0.7], 1, 1),  # no penalty: every epoch is of the final objective
    ],
)
def test_the_epoch_that_is_kept(tmp_path, monkeypatch, keep, warmup, accuracies, kept, best):
    left = iter(accuracies)
    monkeypatch.setattr("brfx.train.loop.evaluate", lambda *_: Evaluation(round(10 * next(left)), 10, 0.0))
    qmodel = brfx.prepare_qat(small_net())
    batches = [(torch.randn(4, 3, 16, 16), torch.arange(4))]
    brfx.calibrate(qmodel, batches)
    weights = []

    class Seen(Callback):
        def on_epoch(self, metrics):
            weights.append({key: value.clone() for key, value in qmodel.state_dict().items()})

    penalty = None if warmup is None else brfx.BinPenalty(qmodel)
    config = brfx.TrainConfig(epochs=4, warmup_epochs=warmup, compile="off", keep=keep)
    result = fit(qmodel, batches, batches, config, penalty=penalty, run_dir=tmp_path, callbacks=[Seen()])
    assert (result.epoch, result.val_accuracy) == (kept, accuracies[kept - 1])
    assert result.stage == ("plain" if warmup is None else "penalty")
    assert all(torch.equal(value, weights[kept - 1][key]) for key, value in qmodel.state_dict().items())
    files = {name: torch.load(tmp_path / name, weights_only=True) for name in ("best.pth", "last.pth")}
    assert {name: content["metrics"]["epoch"] for name, content in files.items()} == {"best.pth": best, "last.pth": 4}
    assert all(torch.equal(value, weights[best - 1][key]) for key, value in files["best.pth"]["state_dict"].items())


def test_without_validation_the_last_epoch_is_kept_and_nothing_is_chosen(tmp_path):
    batches = [(torch.randn(4, 3, 16, 16), torch.arange(4))]
    result = fit(small_net(), batches, None, brfx.TrainConfig(epochs=2, compile="off"), run_dir=tmp_path)
    assert (result.epoch, result.stage, result.val_accuracy) == (2, "plain", None)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["val_loss"], line["val_accuracy"]) for line in lines] == [(None, None)] * 2
    assert (tmp_path / "last.pth").is_file() and not (tmp_path / "best.pth").exists()
    with pytest.raises(brfx.BrfxError, match="keep='best' chooses on validation data, and there is none"):
        fit(small_net(), batches, None, brfx.TrainConfig(epochs=1, keep="best"))


def test_a_short_run_reaches_what_chance_cannot(digits):
    """2 bits everywhere on real digits; chance is 10 %, and the floor is eleven standard deviations above it."""
    qmodel = quantized(digits)
    config = brfx.TrainConfig(epochs=8, lr=0.05, compile="off")
    fit(qmodel, *loaders(digits, 32), config, penalty=brfx.BinPenalty(qmodel, weight=0.1, act=0.01))
    test = brfx.evaluate(qmodel, BatchLoader(digits.test, digits.preprocessing, 256))
    assert test.count == 360
    assert test.accuracy > 0.75


def test_binary_weights_train_with_both_regularizers(digits):
    """The weights' regularizer halves what it measures, against LSQ alone; chance is 10 %."""
    config, ends = brfx.TrainConfig(epochs=4, warmup_epochs=1, lr=0.05, compile="off"), []
    for regularized in (False, True):
        qmodel = quantized(digits, weight_bits=1, act_bits=2)
        penalty = brfx.BinPenalty(qmodel, weight=2.0, act=0.01)
        result = fit(qmodel, *loaders(digits), config, penalty=penalty if regularized else None)
        assert all(parameter.isfinite().all() for parameter in qmodel.parameters())
        assert result.history[-1].val_accuracy > 0.6
        ends.append(penalty.weight_loss().item())
    assert 0 < ends[True] < 0.5 * ends[False]


def test_same_seed_same_weights(digits):
    runs = []
    for _ in range(2):
        qmodel = quantized(digits)
        fit(qmodel, *loaders(digits), brfx.TrainConfig(epochs=1, compile="off"), penalty=None)
        runs.append(qmodel.state_dict())
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])


def test_a_warm_up_as_long_as_the_run_is_refused(digits):
    qmodel = quantized(digits)
    with pytest.raises(brfx.BrfxError, match="warm-up of 3 epochs leaves none of 3"):
        config = brfx.TrainConfig(epochs=3, warmup_epochs=3)
        fit(qmodel, *loaders(digits), config, penalty=brfx.BinPenalty(qmodel))


def test_a_loss_that_is_not_finite_is_named(digits):
    model = small_net()
    nn.init.constant_(model[0].weight, float("nan"))
    with pytest.raises(brfx.BrfxError, match=r"epoch 1, batch 1: 0.weight holds NaN"):
        fit(model, *loaders(digits), brfx.TrainConfig(epochs=1, compile="off"))


def test_no_batches(digits):
    with pytest.raises(brfx.BrfxError, match="no training batch"):
        fit(small_net(), [], [], brfx.TrainConfig(epochs=1))
    with pytest.raises(brfx.BrfxError, match="nothing to evaluate"):
        brfx.evaluate(small_net(), [])


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_steps_have_their_own_rate_and_no_decay(digits, kind):
    qmodel = quantized(digits)
    groups = build_optimizer(
        qmodel, brfx.TrainConfig(optimizer=kind, lr=0.1, step_lr=0.003, weight_decay=0.5)
    ).param_groups
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    for name, parameter in qmodel.named_parameters():
        expected = (0.003, 0) if name.endswith("step") else (0.1, 0.5 if parameter.dim() > 1 else 0)
        assert rates[id(parameter)] == expected, name


def test_the_rate_rises_and_falls():
    factors = [rate_factor(i, 100, 0.1) for i in range(100)]
    assert factors[0] == 0.1 and max(factors) == factors[9] == 1
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] < 0.001
    assert rate_factor(0, 10, 0) == 1


def test_without_a_compiler_nothing_is_compiled_and_the_log_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr("shutil.which", lambda name: None)
    step._can_compile.cache_clear()
    try:
        assert {how_to_compile(choice, 10**6, "cpu") for choice in ("auto", "on", "kernels", "off")} == {"none"}
    finally:
        step._can_compile.cache_clear()
    assert [record.message for record in caplog.records] == [
        "nothing is compiled, training is slower: a C++ compiler (g++ or clang++) was not found"
    ]


@pytest.mark.parametrize(("platform", "device"), [("win32", "cpu"), ("win32", "cuda"), ("darwin", "mps")])
def test_where_the_compiled_form_was_never_run_nothing_is_compiled(monkeypatch, caplog, platform, device):
    monkeypatch.setattr("sys.platform", platform)
    step._can_compile.cache_clear()
    try:
        assert {how_to_compile(choice, 10**6, device) for choice in ("auto", "on", "kernels", "off")} == {"none"}
    finally:
        step._can_compile.cache_clear()
    name = "Windows" if platform == "win32" else device
    assert [record.message for record in caplog.records] == [f"nothing is compiled on {name}, training is slower"]


def test_compile_is_decided_by_the_length_of_the_run():
    assert how_to_compile("on", 1, "cpu") == "whole" and how_to_compile("kernels", 1, "cpu") == "kernels"
    assert how_to_compile("off", 10**6, "cpu") == how_to_compile("auto", 50, "cpu") == "none"
    assert how_to_compile("auto", 500, "cpu") == "kernels" and how_to_compile("auto", 5000, "cpu") == "whole"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0}, "lr=0"),
        ({"epochs": -1}, "epochs=-1"),
        ({"optimizer": "adam"}, "sgd or adamw"),
        ({"compile": "maybe"}, "auto or on or kernels or off"),
        ({"lr_warmup": 1.0}, "share below 1"),
        ({"keep": "first"}, "keep='first': takes last or best"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(brfx.BrfxError, match=message):
        brfx.TrainConfig(**settings)


def test_reestimation_gives_the_mean_and_variance_of_the_batches():
    from brfx.train import reestimate_batch_norm

    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout()).train()
    batches = [torch.randn(50, 3) * 2 + 5 for _ in range(4)]
    reestimate_batch_norm(model, batches)
    torch.testing.assert_close(model[0].running_mean, torch.stack([b.mean(0) for b in batches]).mean(0))
    torch.testing.assert_close(model[0].running_var, torch.stack([b.var(0) for b in batches]).mean(0))
    assert model[0].momentum == 0.1 and model[0].training and model.training


def test_a_resnet_step_has_finite_gradients_everywhere():
    qmodel = brfx.prepare_qat(build_model("resnet20"))
    x = torch.randn(4, 3, 32, 32)
    brfx.calibrate(qmodel, [x])
    output, br = brfx.BinPenalty(qmodel.train())(x)
    (output.square().mean() + br.total).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in qmodel.parameters())


def test_python_and_numpy_draw_on_where_a_run_was_cut_off():
    random.seed(3), np.random.seed(4), torch.manual_seed(5)
    random.gauss(0, 1), np.random.standard_normal()  # each of these keeps a second value for the next call
    state = random_state()

    def drawn():
        return [
            (random.gauss(0, 1), random.random(), np.random.standard_normal(), np.random.rand(), float(torch.rand(())))
            for _ in range(3)
        ]

    first = drawn()
    assert drawn() != first
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    set_random_state(torch_read(state))
    assert drawn() == first


def test_dropout_on_mps_draws_on_where_a_run_was_cut_off(monkeypatch):
    given = []
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    monkeypatch.setattr("torch.mps.get_rng_state", lambda: torch.arange(3, dtype=torch.uint8))
    monkeypatch.setattr("torch.mps.set_rng_state", given.append)
    set_random_state(torch_read(random_state()))
    assert torch.equal(*given, torch.arange(3, dtype=torch.uint8))
    set_random_state(torch_read(random_state() | {"mps": None}))  # of a run on the CPU
    assert len(given) == 1


def torch_read(state):
    """``state`` written to a checkpoint and read again."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_kernels_are_reported_where_some_were_compiled(digits):
    data = BatchLoader(digits.train.take(torch.arange(64)), digits.preprocessing, 32)
    config = brfx.TrainConfig(epochs=1, compile="kernels")
    assert brfx.fit(small_net(), data, None, config).compiled == "none"  # an FP32 model has no form of its own
    qmodel = brfx.prepare_qat(small_net())
    assert compiles_pieces(qmodel, None) and compiles_pieces(qmodel, brfx.BinPenalty(qmodel))
    islands = torch.nn.Sequential(qmodel)
    assert not compiles_pieces(islands, None) and not compiles_pieces(islands, brfx.BinPenalty(islands))

    class Own(nn.Module):
        """A penalty that has no faster form."""

        def begin(self):
            pass

    assert not compiles_pieces(qmodel, Own())
