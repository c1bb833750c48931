import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import brfx
from brfx.config import JobConfig, QATConfig, TrainConfig
from brfx.config.recipes import read_settings
from brfx.errors import ConfigError
from brfx.io.model_file import load
from brfx.jobs.bits import BITS_FILE, SENSITIVITY_FILE, kind_of, require_output, settings_toml
from brfx.jobs.evaluate import evaluate_file
from brfx.jobs.inspect import dry_run, sensitivity
from brfx.jobs.job import quantize
from brfx.jobs.runs import read_run

NET = """
from torch import nn

def net(num_classes=10):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes),
    )
"""
#: 216, 1152 and 160 weights.


@pytest.fixture
def job(digits, tmp_path):
    file = tmp_path / "net.py"
    file.write_text(NET)
    torch.manual_seed(0)
    torch.save(brfx.build_model(f"{file}:net", 10).state_dict(), tmp_path / "net.pth")
    return JobConfig(
        command="quantize",
        model=f"{file}:net",
        ckpt=tmp_path / "net.pth",
        data="digits",
        train=TrainConfig(epochs=0, compile="off"),
        output_dir=tmp_path / "run",
        limit_batches=4,
    )


def test_a_budget_gives_each_layer_its_bits_and_the_run_says_which(job, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "brfx")
    job = replace(
        job,
        bit_budget=3.0,
        qat=QATConfig(bits=2, weight_grid="symmetric", overrides=(("7", {"bits": 8, "weight_grid": "signed"}),)),
    )
    result = quantize(job)
    qmodel = load(result.run_dir / "model.pt", brfx.build_model(job.model, 10))
    bits = {name: module.bits for name, module in qmodel.named_modules() if name.endswith("weight_quantizer")}
    mean = (216 * bits["0.weight_quantizer"] + 1152 * bits["3.weight_quantizer"] + 160 * 8) / 1528
    assert bits["7.weight_quantizer"] == 8 and 2 < mean <= 3
    assert (
        result.kind
        == kind_of(qmodel)
        == f"W{mean:.3g}A2"
        == evaluate_file(replace(job, ckpt=result.run_dir / "model.pt"))[0]
    )
    assert read_run(result.run_dir).bits == result.kind
    assert f"Weights: {mean:.3g} bits on average: 1 layer of 8 bits, " in caplog.text

    saved = json.loads((result.run_dir / "config.json").read_text())
    assert saved["bit_budget"] == 3.0 and [name for name, _ in saved["qat"]["overrides"]] == ["0", "3", "7"]
    measured = json.loads((result.run_dir / SENSITIVITY_FILE).read_text())
    assert [(row["name"], row["kind"]) for row in measured["layers"]] == [(name, "weights") for name in "037"]
    text = (result.run_dir / BITS_FILE).read_text()
    assert 'match = "3"  # 1,152 weights; ' in text and " at 2 bits, " in text
    for file in ("config.json", BITS_FILE):
        again = QATConfig(**read_settings(result.run_dir / file).qat)
        assert again == QATConfig(**saved["qat"] | {"overrides": tuple(map(tuple, saved["qat"]["overrides"]))})

    # A run that begins with these settings, or goes on, measures nothing.
    monkeypatch.setattr("brfx.jobs.bits.sensitivity", None)
    again = quantize(replace(job, qat=again, output_dir=result.run_dir.parent / "again"))
    assert again.kind == result.kind
    with pytest.raises(ConfigError, match=r"2\.5 bits a weight are too few"):
        quantize(replace(job, qat=qmodel.meta["brfx"].config, bit_budget=2.5, output_dir=result.run_dir.parent / "no"))


def test_a_folder_that_nobody_named_has_the_mean_bits_of_its_layers(job, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = quantize(replace(job, output_dir=None, qat=QATConfig(bits=2, overrides=(("7", {"bits": 8}),))))
    assert result.kind == "W2.63A2"  # (2 * 1368 + 8 * 160) / 1528
    assert result.run_dir == Path("runs/net-w2.63a2")


def test_a_size_reaches_the_dry_run_and_the_command(job):
    qat = QATConfig(bits=2, skip=("7",))
    audit = dry_run(replace(job, size_budget=216 + 288 + 640, qat=qat))
    assert [row.weight_bits for row in audit.layers if row.macs] == [8, 2, None]
    report = sensitivity(replace(job, command="sensitivity", size_budget=216 + 288 + 640, qat=qat), batches=2)
    assert report.images == 128 and [report.assigned(layer) for layer in report.layers][:3] == [8, 2, None]
    assert [(layer.name, layer.kind) for layer in report.layers][:2] == [("0", "weights"), ("3", "weights")]
    plain = json.loads(json.dumps(report.as_dict()))
    assert plain["images"] == 128 and plain["layers"][1]["losses"].keys() == {"2", "3", "4", "8"}
    assert plain["layers"][0] | {"losses": 0} == {
        "name": "0", "kind": "weights", "bits": 2, "values": 216, "losses": 0, "assigned": 8,
    }  # fmt: skip
    assert plain["overrides"] == [["0", {"weight_bits": 8}], ["3", {"weight_bits": 2}], ["7", None]]


def test_settings_as_a_file_are_the_settings(tmp_path):
    qat = QATConfig(
        weight_bits=3,
        act_bits=4,
        weight_grid="symmetric",
        per_channel=True,
        clip_value=6.0,
        overrides=(('a"b[[]0]', {"weight_bits": 8, "weight_grid": "signed"}), ("type:Linear", None)),
    )
    file = tmp_path / "bits.toml"
    file.write_text(settings_toml(qat))
    assert QATConfig(**read_settings(file).qat) == replace(qat, bits=2)


def test_budgets_that_cannot_be_are_refused_before_anything_is_written(job, tmp_path):
    with pytest.raises(ConfigError, match="--bit-budget and --size-budget: give one of the two"):
        replace(job, bit_budget=3.0, size_budget=1000)
    with pytest.raises(ConfigError, match="bit_budget=0: takes a number above 0"):
        replace(job, bit_budget=0)
    with pytest.raises(ConfigError, match="100 bytes are too few: the weights take 382"):
        quantize(replace(job, size_budget=100))
    state = torch.load(job.ckpt)
    torch.save(
        {name: value[:4] if name.startswith("7.") else value for name, value in state.items()}, tmp_path / "4.pth"
    )
    with pytest.raises(ConfigError, match="is of other classes: `brfx train"):
        quantize(replace(job, ckpt=tmp_path / "4.pth", bit_budget=3.0))
    assert not job.output_dir.exists()
    with pytest.raises(ConfigError, match="give --bit-budget or --size-budget"):
        require_output(job, tmp_path / "bits.toml")
    with pytest.raises(ConfigError, match="exists already: choose another --output"):
        require_output(replace(job, bit_budget=3.0), job.ckpt)
