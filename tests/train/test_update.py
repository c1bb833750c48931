"""What an update does on the device alone, and what of it the host asks for. The looks of a CUDA device, by which a
batch is judged up to nine batches late, are taken here on a CPU."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset

import brfx
from brfx.data import BatchLoader
from brfx.errors import TrainingError
from brfx.train import fit, loop
from brfx.train.step import loss_step
from brfx.train.update import Update

from .helpers import small_net

NAN = float("nan")


def quantized(batches):
    qmodel = brfx.prepare_qat(small_net(), brfx.QATConfig(bits=2))
    brfx.calibrate(qmodel, [batches[0]])
    return qmodel


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(25, 16, 3, 16, 16, generator=generator)
    return list(zip(images, torch.randint(0, 10, (25, 16), generator=generator), strict=True))


@pytest.fixture
def looks_late(monkeypatch):
    monkeypatch.setattr(loop, "always_syncs", lambda config: False)


def values(update, model):
    """Every parameter, and every tensor that the optimizer holds."""
    held = [value for state in update.optimizer.state.values() for value in state.values()]
    return [value.detach().clone() for value in (*model.parameters(), *held)]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    ("where", "precision"),
    [("loss", "fp32"), ("loss", "bf16"), ("loss", "fp16"), ("gradient", "fp32"), ("gradient", "bf16")],
)
def test_nothing_changes_after_a_batch_that_is_not_finite(batches, optimizer, precision, where):
    model = quantized(batches).train()
    update = Update(model, brfx.TrainConfig(optimizer=optimizer, precision=precision, clip_grad=1.0), 100)
    step = loss_step(model, None, precision=precision)
    for images, labels in batches[:3]:
        assert update(step(images, labels)[0]) == 0
    before = values(update, model)
    assert update(step(*batches[3])[0], sync=False) == 0
    between = values(update, model)
    assert not all(map(torch.equal, before, between))
    loss = step(*batches[4])[0]
    if where == "loss":
        loss = loss * torch.tensor(NAN)
    else:
        loss.register_hook(lambda grad: grad * torch.inf)
    assert update(loss, sync=False) == 0
    for images, labels in batches[5:7]:
        assert update(step(images, labels)[0], sync=False) == 0
    assert all(map(torch.equal, between, values(update, model)))
    assert update(step(*batches[7])[0]) == 4
    update.forgive()
    assert update(step(*batches[8])[0]) == 0
    assert not all(map(torch.equal, between, values(update, model)))


def test_a_loss_that_is_not_finite_is_no_overflow_in_fp16(batches):
    model = small_net()
    update = Update(model, brfx.TrainConfig(precision="fp16"), 100)
    step = loss_step(model, None, precision="fp16")
    assert update(step(*batches[0])[0]) == 0
    scale = update.scaler.get_scale()
    assert update(step(*batches[1])[0] * torch.tensor(NAN)) == 1
    update.forgive()
    assert update(step(*batches[2])[0]) == 0
    assert update.scaler.get_scale() == scale


def test_fp16_goes_on_after_a_gradient_that_overflows(batches):
    model = small_net()
    update = Update(model, brfx.TrainConfig(precision="fp16"), 100)
    step = loss_step(model, None, precision="fp16")
    scale = update.scaler.get_scale()
    before = values(update, model)
    loss = step(*batches[0])[0]
    loss.register_hook(lambda grad: grad * torch.inf)
    assert update(loss) == 0
    assert all(map(torch.equal, before, values(update, model)))
    assert update.scaler.get_scale() == scale / 2
    assert update(step(*batches[1])[0]) == 0
    assert not all(map(torch.equal, before, values(update, model)))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_first_update_that_is_left_out_leaves_no_trace(optimizer, precision, monkeypatch):
    """Nor memory that nobody wrote: what is allocated without values is filled with NaN here."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        ends = []
        for left_out in (0, 2):
            torch.manual_seed(0)
            model, x = nn.Linear(4, 3), torch.randn(8, 4)
            config = brfx.TrainConfig(optimizer=optimizer, precision=precision, lr=0.1, lr_warmup=0.0)
            update = Update(model, config, 10**9)
            for _ in range(left_out):
                loss = model(x).square().sum()
                loss.register_hook(lambda grad: grad * torch.inf)
                if update(loss):
                    update.forgive()
            for _ in range(2):
                assert update(model(x).square().sum()) == 0
            ends.append(model.weight.detach().clone())
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(*ends, rtol=1e-6, atol=0)


@pytest.mark.parametrize("clip", [0.01, 1e9])
def test_fp16_clips_the_gradients_and_not_their_scaled_ones(clip):
    """A loss of float32 values, so that FP16 differs by its scale alone, a power of two."""
    ends = []
    for precision in ("fp32", "fp16"):
        torch.manual_seed(0)
        model, x = nn.Linear(4, 3), torch.randn(8, 4)
        before = model.weight.detach().clone()
        config = brfx.TrainConfig(precision=precision, clip_grad=clip, lr=0.1, weight_decay=0.0, lr_warmup=0.0)
        assert Update(model, config, 100)(model(x).square().sum()) == 0
        ends.append(model.weight.detach() - before)
    torch.testing.assert_close(*ends, rtol=1e-5, atol=0)
    assert (ends[0].norm() < 2 * 0.01 * 0.1) == (clip == 0.01)


class Reads(TorchDispatchMode):
    """Notes each number that the host asks the device for, and each shape that depends on one."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "_unique2")

    def __init__(self):
        super().__init__()
        self.events = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.WAITS:
            self.events.append("read")
        return func(*args, **(kwargs or {}))


class Noted(list):
    """Batches whose numbers, from 1, are noted when they are asked for."""

    def __init__(self, batches, events):
        super().__init__(batches)
        self.events = events

    def __iter__(self):
        for number, batch in enumerate(super().__iter__(), 1):
            self.events.append(number)
            yield batch


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_host_reads_nothing_between_two_looks(batches, looks_late, optimizer, precision):
    settings = brfx.TrainConfig(
        epochs=2, warmup_epochs=1, compile="off", optimizer=optimizer, precision=precision, ema=0.9, clip_grad=1.0,
        distill=0.5,
    )  # fmt: skip
    model, reads = quantized(batches), Reads()
    data = Noted(batches, reads.events)
    with reads:
        fit(model, data, batches[:1], settings, penalty=brfx.BinPenalty(model), teacher=small_net())
    number, read = 0, set()
    for event in reads.events:
        if event == "read":
            read.add(number)
        else:
            number = event
    assert read - {0} == {10, 20, 25}


@pytest.mark.parametrize("form", [lambda penalty: penalty, lambda penalty: penalty.training_form(False)])
def test_a_step_is_on_the_model_s_device_alone(batches, form, monkeypatch):
    """On the meta device, whose tensors hold no numbers that could be read, and which takes no other device's."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # which knows no meta device
    model = quantized(batches)
    penalty = brfx.BinPenalty(model).to("meta").train()
    penalty.begin()
    images, labels = torch.empty(16, 3, 16, 16, device="meta"), torch.empty(16, dtype=torch.long, device="meta")
    logits, terms = form(penalty)(images)
    (F.cross_entropy(logits, labels) + terms.total).backward()
    assert all(parameter.grad.is_meta for parameter in model.parameters())
    assert all(value.is_meta for value in terms)


class Images(Dataset):
    def __init__(self, batches):
        self.images, self.labels = (torch.cat(parts) for parts in zip(*batches, strict=True))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.labels[index]


@pytest.mark.parametrize("number", [1, 3, 10, 14, 25])
@pytest.mark.parametrize("kind", ["list", "torch"])
def test_a_late_look_names_the_batch_and_the_image(batches, looks_late, kind, number):
    batches[number - 1][0][5, 1, 3, 3] = NAN
    data = batches if kind == "list" else DataLoader(Images(batches), 16)
    settings = brfx.TrainConfig(epochs=1, compile="off")
    with pytest.raises(TrainingError, match=rf"epoch 1, batch {number}: image 5 of the batch holds NaN or infinity;"):
        fit(small_net(), data, batches[:1], settings)


def test_a_late_look_draws_the_batch_again_as_it_was(batches, looks_late):
    """Of a shuffled epoch: the images that were seen when the batch was drawn first."""
    images = Images(batches)
    images.images[77, 0, 0, 0] = NAN
    settings = brfx.TrainConfig(epochs=1, compile="off", seed=5)
    seen = []

    class Seen(DataLoader):
        def __iter__(self):
            for batch in super().__iter__():
                seen.append(batch[0])
                yield batch

    with pytest.raises(TrainingError) as caught:
        fit(small_net(), Seen(images, 16, shuffle=True), batches[:1], settings)
    number, image = map(int, re.search(r"batch (\d+): image (\d+) of", str(caught.value)).groups())
    assert bool(seen[number - 1][image].isnan().any())


def test_a_late_look_in_brfx_s_own_loader(digits, looks_late):
    data = BatchLoader(digits.train, digits.preprocessing, 64, augment=True, flip=False, drop_last=True)
    data.set_epoch(1)
    thirteenth = list(data)[12][0]

    class Fails(nn.Module):
        def forward(self, x):
            return torch.where((x == thirteenth).all(), torch.nan, x)

    model = nn.Sequential(Fails(), *small_net())
    with pytest.raises(TrainingError, match=r"epoch 1, batch 13: the output of 0 is not finite"):
        fit(model, data, data, brfx.TrainConfig(epochs=1, compile="off", channels_last=False))


class Explodes(nn.Module):
    """The identity; its gradient is infinite where an input is large."""

    def forward(self, x):
        if x.requires_grad:
            large, x = (x.detach().abs() > 1e3).any(), x * 1
            x.register_hook(lambda grad: grad * torch.where(large, torch.inf, 1.0))
        return x


def test_a_late_look_names_the_gradient(batches, looks_late):
    batches[12][0][5, 1, 3, 3] = 1e6
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), Explodes(), *small_net()[6:8])
    model.append(nn.Linear(4, 10))
    weights = []
    model.register_forward_hook(lambda *rest: weights.append(model[0].weight.detach().clone()))
    with pytest.raises(TrainingError, match=r"epoch 1, batch 13: the gradient of 2\.bias is not finite"):
        fit(model, batches, batches[:1], brfx.TrainConfig(epochs=1, compile="off"))
    assert not torch.equal(weights[11], weights[12])
    assert all(torch.equal(weight, weights[12]) for weight in weights[12:20])


def test_a_late_look_says_so_where_the_batch_is_finite_when_run_again(batches, looks_late):
    class Once(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x * NAN if self.calls == 13 else x

    with pytest.raises(TrainingError, match=r"epoch 1, batch 13: its loss or gradient was not finite, but is when run"):
        fit(nn.Sequential(Once(), *small_net()), batches, batches[:1], brfx.TrainConfig(epochs=1, compile="off"))
