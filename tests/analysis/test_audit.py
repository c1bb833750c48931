"""The audit against a dispatch mode that knows nothing of brfx; where they disagree, the dispatch mode is right."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import brfx
from benchmarks.dispatch_count import DistinctValues
from brfx.analysis.audit import percent, scaled
from brfx.models import build_model


def both(model, *inputs, **config):
    qmodel = brfx.prepare_qat(model, brfx.QATConfig(**config)).eval()
    brfx.calibrate(qmodel, [inputs], forward=lambda m, batch: m(*batch))
    report = brfx.audit(qmodel, *inputs)
    with torch.no_grad(), DistinctValues() as seen:
        qmodel(*inputs)
    return report, seen


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5", "squeezenet1_1", "efficientnet_b0"])
def test_by_default_every_multiplication_is_on_a_grid_by_both_counts(name):
    torch.manual_seed(0)
    report, seen = both(build_model(name), torch.randn(2, 3, 64, 64), bits=2)
    assert report.macs == seen.macs > 0
    assert report.mac_share == seen.share == 1.0
    assert report.exceptions == () and report.never_hit == ()
    assert report.footer.startswith("100.0 % of") and report.footer.endswith("left: nothing")


def test_paper_placement_is_reported_as_what_it_is():
    torch.manual_seed(0)
    report, seen = both(build_model("mobilenet_v2"), torch.randn(2, 3, 64, 64), bits=2, placement="paper")
    assert report.macs == seen.macs
    assert 0.2 < report.mac_share <= seen.share < 0.9  # few values in a random network may be so by chance
    assert "placement 'paper'" in report.exceptions[0]


def test_a_skipped_layer_is_named_with_its_reason(tiny, images):
    report, seen = both(tiny, images, bits=2, skip=("fc",))
    assert report.quantized_macs == report.macs - 8 * 6 * 4
    assert report.mac_share == pytest.approx(seen.share)
    (exception,) = report.exceptions
    assert exception.startswith("fc (Linear)") and "override" in exception
    row = next(layer for layer in report.layers if layer.name == "fc")
    assert (row.weight_bits, row.act_bits, row.quantized_macs, row.macs) == (None, None, 0, 192)
    assert "fc" in str(report)


def test_a_product_behind_the_graphs_back_is_caught(images):
    class Sneaky(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.conv(x)

    qmodel = brfx.prepare_qat(Sneaky())
    brfx.calibrate(qmodel, [images])
    qmodel.register_forward_hook(lambda module, args, output: F.conv2d(output, torch.ones(2, 4, 1, 1)))
    report = brfx.audit(qmodel, images)
    assert report.mac_share == pytest.approx(3 * 4 / (3 * 4 + 4 * 2))


def test_an_uncalibrated_model_may_be_audited_and_stays_uncalibrated(tiny, images):
    qmodel = brfx.prepare_qat(tiny)
    assert brfx.audit(qmodel, images).mac_share == 1.0
    with pytest.raises(brfx.BrfxError):
        qmodel(images)


def test_no_step_is_told_of_a_model_without_steps(tiny, images):
    qmodel = brfx.prepare_qat(tiny)
    assert all(math.isnan(row.step) for row in brfx.audit(qmodel, images).layers)
    brfx.calibrate(qmodel, [images])
    assert all(row.step > 0 for row in brfx.audit(qmodel, images).layers)


def test_a_weight_of_two_layers_is_counted_once(images):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 3, bias=False), nn.Conv2d(3, 3, 3)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(self.first(x)))

    report = brfx.audit(brfx.prepare_qat(Tied()), images)
    assert report.parameters == 81 + 3
    assert [row.parameters for row in report.layers if row.macs] in ([81, 3], [81, 0, 3])


@pytest.mark.parametrize(
    ("part", "whole", "shown"),
    [(0, 9, "0.0 %"), (1, 10**6, "0.1 %"), (9_999_999, 10**7, "99.9 %"), (10, 10, "100.0 %"), (8487, 10000, "84.9 %")],
)
def test_a_hundred_percent_is_all_and_nothing_is_nothing(part, whole, shown):
    assert percent(part, whole) == shown


def test_counts_have_three_digits():
    assert [scaled(count) for count in (640, 9_995, 40_551_000, 1_810_000_000, 999_600)] == [
        *("640", "10.0 k", "40.6 M", "1.81 G", "1.00 M")
    ]


def test_the_mode_and_the_tensors_come_back_clean(tiny, images):
    qmodel = brfx.prepare_qat(tiny).train()
    brfx.calibrate(qmodel, [images])
    brfx.audit(qmodel, images)
    assert qmodel.training and not any(hasattr(p, "brfx_grid") for p in qmodel.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in qmodel.modules())


def test_a_calibrated_model_is_audited_itself_though_a_branch_was_never_taken(tiny, images, monkeypatch):
    qmodel = brfx.prepare_qat(tiny)
    brfx.calibrate(qmodel, [images])
    qmodel.fc_input.optional, qmodel.fc_input.calibrated = True, False
    qmodel.fc_input.step.data.fill_(math.nan)
    monkeypatch.setattr("brfx.analysis.audit.calibrate", lambda *args, **kwargs: pytest.fail("calibrated again"))
    with pytest.raises(brfx.BrfxError, match="no step yet"):  # the audit ran the model as it is
        brfx.audit(qmodel, images)


class Recurrent(nn.Module):
    """A convolution, and a layer that multiplies inside an operator."""

    def __init__(self, inner):
        super().__init__()
        self.conv, self.inner = nn.Conv2d(3, 8, 1), inner

    def forward(self, x):
        y = self.inner(self.conv(x).relu().flatten(2).transpose(1, 2))
        return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize(
    ("inner", "macs"),
    [
        (nn.LSTM(8, 16, num_layers=2, bidirectional=True, batch_first=True), 2 * (4 * 16 * (8 + 16 + 32 + 16))),
        (nn.GRU(8, 16, batch_first=True), 3 * 16 * (8 + 16)),
        (nn.RNN(8, 16, batch_first=True), 16 * (8 + 16)),
    ],
)
def test_a_recurrent_layer_counts_every_multiplication_that_it_makes(inner, macs):
    images = torch.randn(2, 3, 4, 4)
    qmodel = brfx.prepare_qat(Recurrent(inner))
    brfx.calibrate(qmodel, [images])
    report = brfx.audit(qmodel, images)
    assert report.macs == 2 * 16 * (3 * 8 + macs) and report.quantized_macs == 2 * 16 * 3 * 8
    (exception,) = report.exceptions
    assert exception.startswith("inner (")


def counted(function, *inputs):
    """What the audit counts of a function behind one linear of 8 by 8, called on ``(2, 5, 8)``."""
    qmodel = brfx.prepare_qat(nn.Sequential(nn.Linear(8, 8)))
    brfx.calibrate(qmodel, [torch.randn(2, 5, 8)])
    qmodel.register_forward_hook(lambda module, args, output: function(output))
    report = brfx.audit(qmodel, torch.randn(2, 5, 8))
    assert report.quantized_macs == 2 * 5 * 8 * 8
    return report.macs - report.quantized_macs


@pytest.mark.parametrize(
    ("function", "macs"),
    [
        (lambda x: F.scaled_dot_product_attention(x, x, x), 2 * 5 * 5 * (8 + 8)),
        (lambda x: F.scaled_dot_product_attention(x[:, :3], x, x), 2 * 3 * 5 * (8 + 8)),
        (lambda x: torch.tensordot(x, torch.ones(8, 3), 1), 2 * 5 * 8 * 3),
        (lambda x: torch.einsum("bnc,cd,de->bne", x, torch.ones(8, 3), torch.ones(3, 4)), 2 * 5 * (8 * 3 + 3 * 4)),
        (lambda x: F.bilinear(x, x, torch.ones(3, 8, 8)), 2 * 5 * 8 * 8 + 2 * 5 * 3 * 8 * 8),
        (lambda x: torch.mv(x[0], torch.ones(8)), 5 * 8),
        (lambda x: torch.cdist(x, x), 2 * 5 * 5 * 8),
        (lambda x: x + 1, 0),
    ],
)
def test_whatever_multiplies_inside_an_operator_is_counted(function, macs):
    assert counted(function) == macs


def test_attention_left_in_fp32_counts_its_projections_and_its_products():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    assert counted(lambda x: attention(x, x, x)[0]) == 2 * 5 * (4 * 8 * 8) + 2 * 5 * 5 * (8 + 8)
