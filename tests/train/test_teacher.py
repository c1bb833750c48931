"""What is distilled from: run once a batch, compiled where the step is, and the same when a run is resumed."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import brfx
from brfx.train import fit, loop
from brfx.train.checkpoint import state_sha256
from brfx.train.step import build_teacher, how_to_compile, loss_step, objective

from .helpers import small_net


def batches(count=3):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 3, 16, 16, generator=generator), torch.arange(8)) for _ in range(count)]


class Branching(nn.Module):
    """Python that looks at values, which no single graph holds."""

    def __init__(self):
        super().__init__()
        self.net = small_net()

    def forward(self, x):
        y = self.net(x)
        return y if float(y.detach().sum()) > 0 else y + 1


@pytest.mark.parametrize("how", ["none", "kernels", "whole"])
@pytest.mark.parametrize("kind", [small_net, Branching])
def test_logits_are_the_teachers_for_every_shape_and_carry_no_gradient(how, kind):
    torch._dynamo.reset()
    teacher, run = kind().eval(), None
    run = build_teacher(teacher, how)
    (images, _), *_ = batches()
    for part in (images, images[:3], images):
        logits = run(part)
        assert not logits.requires_grad
        torch.testing.assert_close(logits, teacher(part).detach(), rtol=1e-5, atol=1e-5)


def test_it_is_run_once_a_batch_in_eval_mode_and_keeps_its_state():
    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.calls = small_net(), 0

        def forward(self, x):
            self.calls += 1
            assert not self.training and not torch.is_grad_enabled()
            return self.net(x)

    teacher = Counted().train()
    before = state_sha256(teacher)
    result = fit(small_net(), batches(), None, brfx.TrainConfig(epochs=2, compile="off", distill=0.5), teacher=teacher)
    assert teacher.calls == 6
    assert result.teacher_sha256 == state_sha256(teacher) == before


@pytest.mark.parametrize("compile", ["off", "kernels", "on"])
def test_fit_compiles_it_where_the_step_is_once_for_both_stages(monkeypatch, compile):
    asked = []
    monkeypatch.setattr(loop, "build_step", lambda *args, **options: loss_step(*args[:2], loss=options["loss"]))
    monkeypatch.setattr(loop, "build_teacher", lambda *args: asked.append(args) or torch.no_grad()(args[0]))
    qmodel = brfx.prepare_qat(small_net())
    brfx.calibrate(qmodel, batches())
    config = brfx.TrainConfig(epochs=2, warmup_epochs=1, compile=compile, distill=0.5)
    result = fit(qmodel, batches(), None, config, penalty=brfx.BinPenalty(qmodel), teacher=small_net())
    assert [how for _, how, _ in asked] == [result.compiled]
    assert result.compiled == how_to_compile(compile, 6, "cpu")


def test_its_share_of_the_loss_is_what_is_trained():
    """One step of SGD on the mixture of both losses, by hand and by fit."""
    teacher, (images, labels) = small_net().eval(), batches()[0]
    for parameter in teacher.parameters():
        parameter.data.mul_(1.5)
    config = brfx.TrainConfig(epochs=1, lr_warmup=0, momentum=0, weight_decay=0, compile="off", distill=0.7)
    trained, plain = small_net(), small_net()
    fit(trained, [(images, labels)], None, config, teacher=teacher)
    plain.train().to(memory_format=torch.channels_last)
    logits, soft = plain(images.to(memory_format=torch.channels_last)), teacher(images).detach()
    kl = F.kl_div(F.log_softmax(logits / 4, 1), F.log_softmax(soft / 4, 1), reduction="batchmean", log_target=True)
    loss = 0.3 * F.cross_entropy(logits, labels) + 0.7 * 16 * kl
    torch.testing.assert_close(loss, objective(config)(logits, labels, soft))
    loss.backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(trained.get_parameter(name), parameter - config.lr * parameter.grad, msg=name)


def test_a_run_is_not_resumed_with_another_teacher(tmp_path):
    config = brfx.TrainConfig(epochs=1, compile="off", distill=0.5)
    fit(small_net(), batches(), None, config, teacher=small_net(), run_dir=tmp_path)
    fit(small_net(), batches(), None, config, teacher=small_net(), run_dir=tmp_path, resume=True)
    other = small_net()
    other[0].bias.data[3] += 1e-6
    with pytest.raises(brfx.BrfxError, match="the run was begun with another teacher") as caught:
        fit(small_net(), batches(), None, config, teacher=other, run_dir=tmp_path, resume=True)
    assert "\n" not in str(caught.value)


def test_the_hash_is_of_names_types_shapes_and_values():
    first = nn.Linear(4, 2)
    same = nn.Linear(4, 2)
    same.load_state_dict(first.state_dict())
    assert state_sha256(same) == state_sha256(first)
    renamed, shaped, typed = nn.Sequential(same), nn.Linear(2, 4), nn.Linear(4, 2).half()
    shaped.weight.data.copy_(first.weight.reshape(4, 2))
    assert len({state_sha256(model) for model in (first, renamed, shaped, typed)}) == 4
    same.weight.data[1, 3] = -same.weight.data[1, 3]
    assert state_sha256(same) != state_sha256(first)
