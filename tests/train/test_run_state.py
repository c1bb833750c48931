"""A run that was cut off goes on as it was."""

import random
from itertools import islice

import numpy as np
import pytest
import torch
from torch import nn

import brfx
from brfx.train import Callback, fit
from brfx.train.checkpoint import Checkpoints

from .helpers import loaders, quantized, small_net


class Cut(Exception):
    """Ends a run between two batches."""


def test_a_run_of_an_older_brfx_is_not_resumed_under_settings_that_it_did_not_have(tmp_path):
    batches = [(torch.randn(4, 3, 16, 16), torch.arange(4))]
    config = brfx.TrainConfig(epochs=1, compile="off")
    fit(small_net(), batches, None, config, run_dir=tmp_path)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    state = checkpoints.newest()
    del state["config"]["keep"]
    checkpoints.write(2, state)
    with pytest.raises(brfx.BrfxError, match="begun by an older brfx, which had no 'keep': begin a new run"):
        fit(small_net(), batches, None, config, run_dir=tmp_path, resume=True)


def test_a_run_with_frozen_steps_goes_on_in_the_same_process_bit_for_bit(digits, tmp_path):
    config = brfx.TrainConfig(epochs=2, warmup_epochs=1, compile="off", checkpoint_minutes=1e-9)
    batches = list(islice(loaders(digits)[0], 6))

    def trained(run_dir, cut=0):
        """The weights of a run, cut off at ``cut`` batches before it goes on."""
        qmodel = quantized(digits)

        class Cutting(Callback):
            def on_batch(self, progress):
                if (progress.epoch, progress.batch) == (2, 6) and cut:
                    raise Cut

        settings = {"penalty": brfx.BinPenalty(qmodel, freeze_weight_steps=True, freeze_act_steps=True)}
        if cut:
            with pytest.raises(Cut):
                fit(qmodel, batches, None, config, run_dir=run_dir, callbacks=[Cutting()], **settings)
        assert all(parameter.requires_grad for parameter in qmodel.parameters())
        fit(qmodel, batches, None, config, run_dir=run_dir, resume=bool(cut), **settings)
        assert all(parameter.requires_grad for parameter in qmodel.parameters())
        return qmodel.state_dict()

    (tmp_path / "whole").mkdir(), (tmp_path / "cut").mkdir()
    whole, cut = trained(tmp_path / "whole"), trained(tmp_path / "cut", cut=1)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_a_resumed_run_draws_the_numbers_of_python_and_numpy_that_it_would_have_drawn(digits, tmp_path):
    """Its loader jitters the images by both."""

    class Jittering:
        def __init__(self, batches):
            self.batches = batches

        def __len__(self):
            return len(self.batches)

        def __iter__(self):
            for images, labels in self.batches:
                yield images * random.uniform(0.9, 1.1) + np.random.uniform(-0.1, 0.1), labels

    batches = list(islice(loaders(digits)[0], 4))
    config = brfx.TrainConfig(epochs=3, compile="off", checkpoint_minutes=1e-9)

    class Cutting(Callback):
        def on_epoch(self, metrics):
            if metrics.epoch == 2:
                raise Cut

    whole = small_net()
    fit(whole, Jittering(batches), None, config)
    with pytest.raises(Cut):
        fit(small_net(), Jittering(batches), None, config, run_dir=tmp_path, callbacks=[Cutting()])
    random.seed(99), np.random.seed(99)
    resumed = small_net()
    fit(resumed, Jittering(batches), None, config, run_dir=tmp_path, resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_run_in_fp16_goes_on_at_the_scale_that_it_had(digits, tmp_path):
    """Images so bright that gradients overflow at the scale of the start: there, an update would be left out."""
    batches = [(100 * images, labels) for images, labels in islice(loaders(digits)[0], 8)]
    config = brfx.TrainConfig(epochs=2, precision="fp16", compile="off", lr=1e-8, checkpoint_minutes=1e-9)

    class Cutting(Callback):
        def on_epoch(self, metrics):
            if metrics.epoch == 1:
                raise Cut

    def net():
        model = small_net()
        model[1], model[4] = nn.Identity(), nn.Identity()
        return model

    whole, resumed = net(), net()
    fit(whole, batches, None, config)
    with pytest.raises(Cut):
        fit(net(), batches, None, config, run_dir=tmp_path, callbacks=[Cutting()])
    state = Checkpoints(tmp_path / "checkpoints", keep=1).newest()
    assert state is not None and 0 < state["scaler"]["scale"] < 2**16
    fit(resumed, batches, None, config, run_dir=tmp_path, resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
