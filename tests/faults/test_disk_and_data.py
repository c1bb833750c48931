"""Full disks, numbers that are not finite, batches and rates that are no good: what is said, and what stays whole."""

import errno
import json
import os
import subprocess
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import brfx
from brfx.data import BatchLoader
from brfx.errors import TrainingError
from brfx.jobs import job as jobs
from brfx.jobs import networks, run_folder
from brfx.nn import LSQQuantizer
from brfx.train import Callback, Evaluation, FitResult, fit
from brfx.train.checkpoint import read_checkpoint
from brfx.train.optim import rate_factor

from .helpers import WORKER, fingerprint
from .worker import SHORT, net, train

ADVICE = "what was saved before is whole: free some space, then go on with --resume"


@pytest.mark.parametrize(
    ("name", "time"),
    [
        ("checkpoints/000000001.ckpt", 1), ("checkpoints/000000025.ckpt", 1), ("checkpoints/000000020.ckpt", 1),
        ("metrics.jsonl", 1), ("metrics.jsonl", 2), ("last.pth", 2), ("best.pth", 1),
    ],
)  # fmt: skip
def test_no_room_for_one_file(digits, short, tmp_path, monkeypatch, name, time):
    """``os.fsync`` of a file fails, as it does where a file system reserves space late."""
    run_dir, fsync, times = tmp_path / "run", os.fsync, 0

    def full(descriptor):
        nonlocal times
        times += os.readlink(f"/proc/self/fd/{descriptor}").endswith(f"{name}.partial")
        if times == time:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patched, pytest.raises(TrainingError) as caught:
        patched.setattr(os, "fsync", full)
        train(run_dir, digits, SHORT)
    assert str(caught.value) == f"{run_dir / name}: cannot write it (No space left on device); {ADVICE} {run_dir}"
    assert not list(run_dir.rglob("*.partial"))
    for path in run_dir.glob("checkpoints/*.ckpt"):
        read_checkpoint(path)
    train(run_dir, digits, SHORT)
    assert fingerprint(run_dir) == short


@pytest.mark.parametrize(("limit", "name"), [(8_000, "last.pth"), (20_000, "checkpoints/000000020.ckpt")])
def test_a_limit_to_the_size_of_files(worker, one_epoch, whole_epoch, tmp_path, limit, name):
    """RLIMIT_FSIZE: the kernel refuses the write itself."""
    run_dir = tmp_path / "run"
    assert worker.life(run_dir, *one_epoch, "--output-dir", run_dir, file_size=limit, fails=True) == 2
    assert worker.said().splitlines()[-1] == f"{run_dir / name}: cannot write it (File too large); {ADVICE} {run_dir}"
    assert "Traceback" not in worker.said() and not list(run_dir.rglob("*.partial"))
    assert worker.life(run_dir, "quantize", "--model", f"{WORKER}:net", "--resume", run_dir) == 0
    assert fingerprint(run_dir) == whole_epoch


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 200 kB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", folder], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a file system takes root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up(worker, one_epoch, whole_epoch, small_disk):
    run_dir = small_disk / "run"
    started = (*one_epoch, "--keep-checkpoints", 9, "--checkpoint-minutes", 1e-9, "--output-dir", run_dir)
    assert worker.life(run_dir, *started, fails=True) == 2
    last = worker.said().splitlines()[-1]
    assert last.startswith(f"{run_dir}/") and f"(No space left on device); {ADVICE} {run_dir}" in last
    assert "Traceback" not in worker.said() and not list(run_dir.rglob("*.partial"))
    saved = sorted(run_dir.glob("checkpoints/*.ckpt"))
    assert saved and [read_checkpoint(path)["batch"] for path in saved] == [int(path.stem) for path in saved]
    subprocess.run(["mount", "-o", "remount,size=10m", small_disk], check=True)
    assert worker.life(run_dir, "quantize", "--model", f"{WORKER}:net", "--resume", run_dir) == 0
    assert fingerprint(run_dir) == whole_epoch


def test_no_room_for_the_onnx_file_is_not_taken_for_a_model_without_one(digits, tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx")
    train(tmp_path, digits, replace(SHORT, epochs=1, warmup_epochs=0))
    qmodel = brfx.load(tmp_path / "model.pt", net())

    def full(proto, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(onnx, "save", full)
    with pytest.raises(TrainingError, match=r"model\.onnx: .*No space left on device.* --resume"):
        run_folder.write_onnx(qmodel, tmp_path, torch.zeros(1, 3, 16, 16))


# Numbers that are not finite.


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, 32, 3, 16, 16, generator=generator)
    return list(zip(images, torch.randint(0, 10, (6, 32), generator=generator), strict=True))


class Watched(list):
    """Batches, with the model's state when each is asked for."""

    def __init__(self, batches, model):
        super().__init__(batches)
        self.model, self.states = model, []

    def __iter__(self):
        for batch in super().__iter__():
            self.states.append({name: value.clone() for name, value in self.model.state_dict().items()})
            yield batch


PLAIN = brfx.TrainConfig(epochs=1, compile="off")


def test_an_image_with_nan_stops_the_run_and_is_named(batches):
    batches[2][0][5, 1, 3, 3] = float("nan")
    with pytest.raises(TrainingError, match=r"epoch 1, batch 3: image 5 of the batch holds NaN or infinity; try"):
        fit(net(), batches, batches[:1], PLAIN)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_skipped_batch_leaves_no_trace(batches, caplog, quantized):
    model = net()
    if quantized:
        model = brfx.prepare_qat(model, brfx.QATConfig(bits=2))
        brfx.calibrate(model, [batches[0]])
    batches[2][0][5, 1, 3, 3] = float("nan")
    data = Watched(batches, model)
    penalty = brfx.BinPenalty(model) if quantized else None
    settings = replace(PLAIN, on_nonfinite="skip", ema=0.9, warmup_epochs=0)
    result = fit(model, data, batches[:1], settings, penalty=penalty)
    assert result.skipped == 1
    assert [record.getMessage() for record in caplog.records] == [
        "epoch 1, batch 3: image 5 of the batch holds NaN or infinity; the batch was skipped"
    ]
    for name, value in data.states[2].items():
        assert torch.equal(data.states[3][name], value), name
        assert data.states[5][name].isfinite().all(), name
    assert not torch.equal(data.states[3]["0.weight"], data.states[4]["0.weight"])
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_skipped_batches_are_counted_in_the_result(tmp_path):
    result = FitResult((), 1, "plain", 0.5, "none", skipped=2)
    run_folder.close_run(run_folder.JobResult(tmp_path, result, Evaluation(1, 2, 0.0)))
    assert json.loads((tmp_path / "result.json").read_text())["skipped_batches"] == 2


class Grows(nn.Module):
    """What overflows is not a layer inside it, but its own arithmetic."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, x):
        return self.inner(x) * 1e30 * 1e30


@pytest.mark.parametrize("first", [nn.Conv2d(3, 8, 3), Grows()])
def test_a_layer_that_overflows_is_named(batches, first):
    """The batch norm after it has taken the infinity into its running statistics by then."""
    model = nn.Sequential(nn.Identity(), first, nn.BatchNorm2d(8 if isinstance(first, nn.Conv2d) else 3), *net()[6:8])
    model.append(nn.LazyLinear(10))(batches[0][0] * 0)
    if isinstance(first, nn.Conv2d):
        batches[0][0].mul_(1e30)
        nn.init.constant_(first.weight, 1e10)
    with pytest.raises(TrainingError, match=r"epoch 1, batch 1: the output of 1 is not finite"):
        fit(model, batches, batches[:1], PLAIN)


class Explodes(nn.Module):
    """The identity; its gradient grows by a factor."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        if x.requires_grad:
            x = x * 1
            x.register_hook(lambda grad: grad * self.factor)
        return x


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize(
    ("factor", "said"),
    [(float("inf"), r"the gradient of 2\.bias is not finite"), (1e25, "the gradient's norm overflows")],
)
def test_a_gradient_that_is_not_finite_is_named(batches, factor, said, clip):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), Explodes(factor), nn.Flatten(), nn.Linear(576, 10)
    )
    with pytest.raises(TrainingError, match=rf"epoch 1, batch 1: {said}"):
        fit(model, batches, batches[:1], replace(PLAIN, clip_grad=clip))


@pytest.mark.parametrize("compile", ["off", pytest.param("on", marks=pytest.mark.slow)])
def test_a_batch_of_one_that_a_batch_norm_cannot_take(batches, compile):
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 10))
    data = [batches[0], (batches[1][0][:1], batches[1][1][:1])]
    with pytest.raises(TrainingError) as caught:
        fit(model, data, batches[:1], replace(PLAIN, compile=compile))
    assert str(caught.value) == (
        "epoch 1, batch 2: a batch norm gets one value a channel, of which there is no variance: "
        "use a larger --batch-size"
    )


def test_calibration_with_batches_of_one(digits, tmp_path, monkeypatch):
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 10))
    torch.save(model.state_dict(), tmp_path / "one.pth")
    monkeypatch.setattr(networks, "build_model", lambda *arguments, **named: model)
    job = brfx.config.JobConfig(
        command="quantize", model="resnet20", data="digits", ckpt=tmp_path / "one.pth", batch_size=1,
        output_dir=tmp_path / "run",
    )  # fmt: skip
    with pytest.raises(TrainingError, match=r"calibration: a batch norm .* larger --batch-size"):
        jobs.quantize(job)


# What an update does.


def quantized(batches):
    model = brfx.prepare_qat(net(), brfx.QATConfig(bits=2))
    brfx.calibrate(model, [batches[0]], start="lsq")  # steps far from 0
    return model


def test_steps_stay_positive_whatever_the_rate(batches):
    model = quantized(batches)
    steps = [module.step for module in model.modules() if isinstance(module, LSQQuantizer)]
    least = min(LSQQuantizer.positive.values())
    hit = []

    class ObserveFn(Callback):
        def on_batch(self, progress):
            assert all(bool((step >= least).all()) for step in steps)
            hit.append(any(bool((step == least).any()) for step in steps))

    settings = replace(PLAIN, epochs=4, step_lr=1e4, on_nonfinite="skip")
    fit(model, batches, batches[:1], settings, callbacks=[ObserveFn()])
    assert any(hit)
    assert all(bool((step >= least).all()) for step in steps)


@pytest.fixture
def hooked():
    """Hooks on optimizers' steps that are gone after the test."""
    handles = []
    yield handles
    for handle in handles:
        handle.remove()


def gradients(optimizer):
    return [p.grad.clone() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def test_the_norm_of_gradients_is_bounded(batches, hooked):
    seen = []
    hooked.append(register_optimizer_step_pre_hook(lambda optimizer, *rest: seen.append(gradients(optimizer))))
    for clip in (None, 0.1, 1e6):
        fit(net(), batches, batches[:1], replace(PLAIN, clip_grad=clip))
    free, clipped, unbounded = seen[:6], seen[6:12], seen[12:]
    norms = [float(torch.cat([grad.flatten() for grad in step]).norm()) for step in clipped]
    assert norms == pytest.approx([0.1] * 6, rel=1e-4)
    norm = torch.cat([grad.flatten() for grad in free[0]]).norm()
    assert norm > 0.1
    for before, after in zip(free[0], clipped[0], strict=True):
        torch.testing.assert_close(after, before * (0.1 / norm), rtol=1e-4, atol=1e-8)
    for before, after in zip(free, unbounded, strict=True):
        assert all(map(torch.equal, before, after))


def test_the_moving_average_is_that_of_the_formula(batches, hooked, tmp_path):
    model = net()
    floats = [name for name, value in model.state_dict().items() if value.is_floating_point()]
    expected = {name: model.state_dict()[name].double() for name in floats}
    count = 0

    def follow(optimizer, *rest):
        nonlocal count
        count += 1
        decay = min(0.5, (1 + count) / (10 + count))
        for name in floats:
            expected[name] = decay * expected[name] + (1 - decay) * model.state_dict()[name].double()

    hooked.append(register_optimizer_step_post_hook(follow))
    fit(model, batches, batches[:1], replace(PLAIN, epochs=2, ema=0.5), run_dir=tmp_path)
    state = torch.load(tmp_path / "last.pth", weights_only=True)["state_dict"]
    assert count == 12
    for name in floats:
        torch.testing.assert_close(state[name].double(), expected[name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("regularized", [False, True])
def test_training_in_fp32_is_the_plain_loop_bit_for_bit(digits, optimizer, regularized):
    settings = replace(PLAIN, warmup_epochs=0, lr=0.05, step_lr=1e-3, weight_decay=1e-3, optimizer=optimizer)
    data = BatchLoader(digits.train, digits.preprocessing, 64, augment=True, flip=False, drop_last=True)
    val = BatchLoader(digits.val, digits.preprocessing, 256)
    data.set_epoch(1)
    first = next(iter(data))

    trained = quantized([first])
    fit(trained, data, val, settings, penalty=brfx.BinPenalty(trained, 0.1, 0.01) if regularized else None)

    plain = quantized([first]).to(memory_format=torch.channels_last)
    penalty = brfx.BinPenalty(plain, 0.1, 0.01) if regularized else None
    own = [module.step for module in plain.modules() if isinstance(module, LSQQuantizer)]
    rest = [p for p in plain.parameters() if all(p is not step for step in own)]
    groups = [
        {"params": [p for p in rest if p.dim() > 1], "lr": 0.05, "weight_decay": 1e-3},
        {"params": [p for p in rest if p.dim() <= 1], "lr": 0.05, "weight_decay": 0.0},
        {"params": own, "lr": 1e-3, "weight_decay": 0.0},
    ]
    kind = {"sgd": partial(torch.optim.SGD, momentum=0.9, nesterov=True), "adamw": torch.optim.AdamW}[optimizer]
    updates = kind(groups, fused=True)
    rates = [group["lr"] for group in groups]
    torch.manual_seed(0)
    plain.train()
    if penalty is not None:
        penalty.begin()
    for number, (images, labels) in enumerate(data):
        for group, rate in zip(updates.param_groups, rates, strict=True):
            group["lr"] = rate * rate_factor(number, len(data), settings.lr_warmup)
        images = images.to(memory_format=torch.channels_last)
        output, terms = (plain(images), None) if penalty is None else penalty(images)
        loss = F.cross_entropy(output, labels) + (0 if terms is None else terms.total)
        updates.zero_grad()
        loss.backward()
        updates.step()
        assert all(bool((step > LSQQuantizer.positive["step"]).all()) for step in own)  # fit would hold them there
    assert number == 19
    for name, value in plain.state_dict().items():
        assert torch.equal(trained.state_dict()[name], value), name
