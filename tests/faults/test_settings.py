"""A run that was stopped and went on is the one that was not, under each setting that has a state of its own."""

import os
import signal
from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import brfx
from brfx.data import BatchLoader
from brfx.errors import Interrupted
from brfx.train import Callback, fit

from .helpers import fingerprint
from .worker import SHORT, net


class StopAt(Callback):
    """SIGTERM to this process at a batch of an epoch."""

    def __init__(self, epoch, batch):
        self.at = (epoch, batch)

    def on_batch(self, progress):
        if (progress.epoch, progress.batch) == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


class Noisy(Dataset):
    """Images with noise from torch's global generator, as many augmentations have it."""

    def __init__(self, split, preprocessing):
        self.split, self.preprocessing = split, preprocessing

    def __len__(self):
        return 960

    def __getitem__(self, index):
        image = self.preprocessing.normalize(self.split.images[index : index + 1])[0]
        return image + 0.1 * torch.randn(image.shape), self.split.labels[index]


def batches(digits, kind):
    """brfx's own loader, torch's with and without processes, and a list, in which image 700 may hold NaN."""
    if kind == "own":
        return BatchLoader(digits.train, digits.preprocessing, 48, augment=True, flip=False, drop_last=True)
    if kind in ("torch", "workers"):
        workers = 2 if kind == "workers" else 0
        return DataLoader(Noisy(digits.train, digits.preprocessing), 48, shuffle=True, num_workers=workers)
    whole = list(BatchLoader(digits.train, digits.preprocessing, 48, drop_last=True))
    if kind == "nan":
        for number in (3, 15):
            whole[number][0][7] = float("nan")
    return whole


def train(digits, run_dir, *, data="own", callbacks=(), resume=False, **changes):
    penalty = {name: changes.pop(name) for name in list(changes) if name.startswith(("freeze", "act_gradient"))}
    run_dir.mkdir(exist_ok=True)
    qmodel = brfx.prepare_qat(net(), brfx.QATConfig(bits=2))
    own = batches(digits, "own")
    brfx.calibrate(qmodel, [next(iter(own))], start="mse", batch_statistics=True)
    settings = replace(SHORT, **changes)
    val = BatchLoader(digits.val, digits.preprocessing, 256)
    result = fit(
        qmodel, batches(digits, data), val, settings, penalty=brfx.BinPenalty(qmodel, 0.1, 0.01, **penalty),
        teacher=net() if settings.distill else None, run_dir=run_dir, resume=resume, callbacks=callbacks,
    )  # fmt: skip
    brfx.save(qmodel, run_dir / "model.pt")
    return fingerprint(run_dir) | {"skipped": result.skipped}


@pytest.mark.parametrize(
    "settings",
    [
        {"data": "torch"},
        pytest.param({"data": "list"}, marks=pytest.mark.slow),
        {"data": "nan", "on_nonfinite": "skip"},
        pytest.param({"optimizer": "adamw"}, marks=pytest.mark.slow),
        {"freeze_weight_steps": True, "freeze_act_steps": True},
        {"distill": 0.5, "label_smoothing": 0.1},
        pytest.param({"ema": 0.0, "reestimate_bn": 0}, marks=pytest.mark.slow),
        pytest.param({"act_gradient_to_step": True, "clip_grad": None}, marks=pytest.mark.slow),
        pytest.param({"data": "workers"}, marks=pytest.mark.slow),
        pytest.param({"precision": "bf16"}, marks=pytest.mark.slow),
        pytest.param({"channels_last": False}, marks=pytest.mark.slow),
        pytest.param({"compile": "kernels"}, marks=pytest.mark.slow),
        pytest.param({"compile": "kernels", "distill": 0.5}, marks=pytest.mark.slow),
        pytest.param({"compile": "on"}, marks=pytest.mark.slow),
    ],
    ids=lambda settings: ",".join(f"{name}={value}" for name, value in settings.items()),
)
def test_stopped_twice(digits, tmp_path, settings):
    """In the warm-up, and in the epoch of the regularizer."""
    expected = train(digits, tmp_path / "whole", **settings)
    run_dir = tmp_path / "run"
    for epoch, resume in ((1, False), (2, True)):
        with pytest.raises(Interrupted, match=f"stopped at epoch {epoch}, batch 10; go on with --resume"):
            train(digits, run_dir, callbacks=[StopAt(epoch, 10)], resume=resume, **settings)
    assert train(digits, run_dir, resume=True, **settings) == expected
    assert expected["skipped"] == (4 if settings.get("data") == "nan" else 0)
