"""Lines that name the task's metric, and tables that fit into a terminal."""

import json

import pytest
from brfx_cli import render
from rich.console import Console

from brfx.analysis.sensitivity import LayerSensitivity
from brfx.config import QATConfig
from brfx.jobs.bits import BitsReport
from brfx.train import EpochMetrics, Evaluation, Means, Score


def test_an_epochs_line_stands_below_its_names_and_leaves_out_what_is_not_counted():
    def lines(means, value, metric, stage="penalty"):
        return render.epoch_lines(EpochMetrics(2, stage, 0.5, means, 1.5, value, 38.2, 64.0, metric=metric), 30)

    names, figures = lines(Means(1.23456, 0.25, {"weight": 0.5, "act": 19.234}), 0.5, "accuracy")
    assert names == "epoch            rate     loss    train      val     BR_W     BR_A    time"
    assert figures == "2/30 [BR]         0.5     1.23   25.00%   50.00%      0.5     19.2    38 s"
    names, figures = lines(Means(1.23456, None), 0.5, "mIoU", "plain")
    assert names == "epoch            rate     loss  val mIoU    time"
    assert figures == "2/30              0.5     1.23    50.00%    38 s"
    assert lines(Means(1.23456, None), None, "mAP50")[1].split() == ["2/30", "[BR]", "0.5", "1.23", "-", "38", "s"]
    assert lines(Means(1.0, 0.5, {"kurtosis": 0.25}), 0.5, "accuracy")[0].split()[-2:] == ["kurtosis", "time"]


@pytest.mark.parametrize("stage", ["warm-up", "penalty"])
def test_the_widest_epoch_of_the_default_options_fits_80_columns(stage):
    means = Means(1.23456e-5, 1.0, {"weight": 0.00123456, "act": 0.00123456})
    metrics = EpochMetrics(100, stage, 1.23456e-5, means, 1.5, 1.0, 99 * 60, 64.0)
    names, figures = render.epoch_lines(metrics, 100)
    assert len(names) == len(figures) <= 80
    assert figures.split()[-2:] == ["99", "min"]


def test_what_was_measured_is_said_with_its_name():
    assert render.evaluation(Evaluation(3, 4, 0.5)) == "75.00 % (3 of 4)"
    assert render.evaluation(Score(0.5, "mIoU", 4, 1.0)) == "50.00 % mIoU (4 images)"
    further = Score(0.5, "mAP50", 4, further={"mAP": 0.25})
    assert render.evaluation(further) == "50.00 % mAP50, 25.00 % mAP (4 images)"


@pytest.fixture
def report():
    losses = {2: 4.50392, 3: 0.06703, 4: 0.00772, 8: 0.0000512}
    name = "features.17.conv.0[1]"
    layers = (
        LayerSensitivity("layer2.0.conv1", "weights", 3, 4608, losses),
        LayerSensitivity(name, "weights", 3, 12_345_678, losses),
        LayerSensitivity(f"{name}_input", "activations", 8, 802_816, losses),
    )
    overrides = (("layer2.0.conv1", {"weight_bits": 8}), ("features.17.conv.0[[]1]", {"weight_bits": 2}))
    return BitsReport(layers, QATConfig(bits=3, overrides=overrides), 256)


def test_sensitivities_fit_into_80_columns(report, monkeypatch, capsys):
    monkeypatch.setattr(render, "console", Console(width=80, highlight=False, soft_wrap=True))
    render.sensitivity(report, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines]
    assert rows[0] == ["layer", "weights", "2", "bits", "3", "bits", "4", "bits", "8", "bits", "budget"]
    assert rows[1] == ["layer2.0.conv1", "4,608", "4.5039", "0.0670", "0.0077", "5.1e-05", "8"]
    assert rows[2] == ["features.17.conv.0[1]", "12,345,678", "4.5039", "0.0670", "0.0077", "5.1e-05", "2"]
    assert rows[5] == ["features.17.conv.0[1]_input", "802,816", "4.5039", "0.0670", "0.0077", "5.1e-05", "8"]
    assert lines[-1] == "Divergence from the FP32 network in nats an image, of 256 training images."


def test_sensitivities_as_json_are_the_whole_output(report, capsys):
    render.sensitivity(report, as_json=True)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(report.as_dict()))
    assert [layer["assigned"] for layer in report.as_dict()["layers"]] == [8, 2, None]
