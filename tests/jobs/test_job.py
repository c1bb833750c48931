import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

import brfx
from brfx.config import JobConfig, QATConfig, TrainConfig
from brfx.data import Split
from brfx.errors import CheckpointError, ConfigError, DataError, Interrupted
from brfx.io.float_checkpoint import read_state_dict
from brfx.jobs.data import _limited
from brfx.jobs.evaluate import evaluate_file
from brfx.jobs.files import export_file
from brfx.jobs.inspect import dry_run, dry_run_float, inspect
from brfx.jobs.job import NORM_IMAGES, banner, quantize, train_float
from brfx.train import Callback

NET = """
from torch import nn

def net(num_classes=10):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, num_classes),
    )
"""


@pytest.fixture
def job(digits, tmp_path):
    """Two epochs of a network whose third filter lets nothing pass; returns what other settings make of it."""
    file = tmp_path / "net.py"
    file.write_text(NET)
    torch.manual_seed(0)
    model = brfx.build_model(f"{file}:net", 10)
    assert isinstance(model[1], nn.BatchNorm2d)
    with torch.no_grad():
        model[1].weight[2], model[1].bias[2] = 1e-4, -1e-2
    torch.save(model.state_dict(), tmp_path / "net.pth")

    def with_settings(name, **settings):
        train = TrainConfig(epochs=2, warmup_epochs=1, compile="off", seed=3)
        common = {"command": "quantize", "model": f"{file}:net", "ckpt": tmp_path / "net.pth", "data": "digits"}
        return JobConfig(**common, train=train, output_dir=tmp_path / name, **settings)

    return with_settings


def test_settings_of_regularizer_and_filters_reach_the_run_and_its_figures_its_metrics(job, caplog, monkeypatch):
    told_to_calibrate = {}
    monkeypatch.setattr(
        "brfx.jobs.job.calibrate",
        lambda *args, **given: told_to_calibrate.update(given) or brfx.calibrate(*args, **given),
    )
    caplog.set_level(logging.INFO, "brfx")
    weights = {}
    for name, settings in {
        "paper": {},
        "per value": {"br_form": "per_value", "lambda_br": 2.0, "dead_filters": "revive"},
        "lsq": {"lambda_br": 0.0, "lambda_br_act": 0.0},
    }.items():
        caplog.clear()
        run = quantize(job(name, **settings))
        lines = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
        weights[name] = [line["weights"] for line in lines]
        assert [set(layers) for layers in weights[name]] == [{"0", "5"}] * 2
        assert all(figures["closed"] == 0 for figures in weights[name][0].values())
        config = json.loads((run.run_dir / "config.json").read_text())
        assert config["br_form"] == settings.get("br_form", "mean")
        assert config["dead_filters"] == settings.get("dead_filters", "keep")
        assert (told_to_calibrate["dead_filters"], told_to_calibrate["seed"]) == (config["dead_filters"], 3)
        logged = "revived" if "dead_filters" in settings else "kept as they are"
        assert f"let nothing pass; {logged}: 0 2" in caplog.text
        assert ("BR lambda 2 per value" in caplog.text) == (name == "per value")
    for layer in ("0", "5"):
        assert weights["per value"][1][layer]["closed"] > 0.5
        assert weights["lsq"][1][layer]["closed"] < 0.2


def test_an_export_that_fails_in_any_way_leaves_the_trained_network(job, monkeypatch, caplog):
    def fails(*args):
        raise AssertionError("no such form")

    monkeypatch.setattr("brfx.jobs.job.snap_biases", fails)
    monkeypatch.setattr("brfx.jobs.run_folder.export_onnx", fails)
    run = quantize(job("fails"))
    assert run.onnx is None and run.onnx_problem == "AssertionError: no such form"
    assert "biases stay as they are: no such form" in caplog.text
    assert (run.run_dir / "model.pt").is_file() and (run.run_dir / "result.json").is_file()


def test_a_package_that_the_export_misses_is_named_before_anything_is_trained(job, monkeypatch, caplog):
    monkeypatch.setattr("brfx.jobs.job.missing", lambda extra: ["onnx>=1.18"])
    monkeypatch.setattr("brfx.extras.missing", lambda extra: ["onnx>=1.18"])
    caplog.set_level(logging.INFO, "brfx")
    monkeypatch.setattr("brfx.jobs.job.read_data", lambda *_: pytest.fail("reached"))
    with pytest.raises(pytest.fail.Exception, match="reached"):
        quantize(job("none"))
    assert "There will be no model.onnx: ONNX export needs onnx, which is not installed: pip install" in caplog.text


@pytest.mark.parametrize("begin", [quantize, dry_run, dry_run_float])
def test_a_device_that_there_is_not_is_refused_before_data_are_read(job, monkeypatch, begin):
    for module in ("job", "inspect"):
        monkeypatch.setattr(f"brfx.jobs.{module}.read_data", lambda *_: pytest.fail("reached"))
    ours = job("none")
    with pytest.raises(ConfigError, match="--device cuda:77"):
        begin(replace(ours, train=replace(ours.train, device="cuda:77")))


def test_phases_are_told_in_their_order(job):
    class Phases(Callback):
        seen: ClassVar = []

        def on_phase(self, phase):
            if not self.seen or self.seen[-1] != phase.name:
                self.seen.append(phase.name)

    quantize(job("phases"), [Phases()])
    start = ["reading data", "rewriting the model", "evaluating FP32", "validating", "calibrating", "validating"]
    assert Phases.seen == [*start, *["training", "validating"] * 2, "exporting", "evaluating on test images"]


def test_ctrl_c_outside_of_training_says_how_to_go_on(job, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("brfx.jobs.job.calibrate", interrupted)
        with pytest.raises(Interrupted, match=r"stopped; go on with --resume .*cut"):
            quantize(job("cut"))
    assert quantize(job("cut"), resume=True).onnx is not None


def test_the_trained_network_is_on_disk_before_anything_is_exported(job, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("brfx.jobs.job.snap_biases", killed)
    with pytest.raises(Interrupted):
        quantize(job("killed"))
    assert (job("killed").output_dir / "model.pt").is_file()


def test_a_run_of_other_methods_and_another_regularizer(job, caplog):
    caplog.set_level(logging.INFO, "brfx")
    qat = QATConfig(bits=2, act_quantizer="pact", weight_quantizer="dorefa", weight_grid="symmetric")
    run = quantize(job("other", qat=qat, lambda_br=0.0, lambda_br_act=0.0, lambda_kurtosis=0.5))
    assert "tanh and s fixed at max|tanh(w)| (DoReFa); no BR, kurtosis lambda 0.5" in caplog.text
    warm, last = (
        json.loads(line)["train"]["terms"] for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()
    )
    assert not warm and set(last) == {"kurtosis"} and run.onnx_problem is None
    assert run.onnx is None or run.onnx.reference_difference == 0
    with pytest.raises(ConfigError, match=r"--lambda-br-act 0 --lambda-kurtosis 0$"):
        quantize(replace(job("none", lambda_kurtosis=0.5), train=TrainConfig(epochs=2, warmup_epochs=2)))


def test_the_banner_says_what_happens_to_weights_and_activations():
    def lines(lambda_br, lambda_br_act, epochs=2, **bits):
        qat, train = brfx.QATConfig(**bits), TrainConfig(epochs=epochs)
        common = {"command": "quantize", "model": "resnet20", "data": "digits", "lambda_br": lambda_br}
        return banner(JobConfig(**common, lambda_br_act=lambda_br_act, qat=qat, train=train))

    assert lines(0.5, 0.0, weight_bits=1, act_bits=2) == [
        "Weights: 2 levels, signed 1-bit [-s, s], s learned by LSQ; BR lambda 0.5",
        "Activations: 4 levels, unsigned 2-bit [0, s, 2s, 3s], s learned by LSQ; no BR",
    ]
    assert lines(0.0, 2.0, weight_bits=32, act_bits=1)[0] == "Weights: FP32"
    assert lines(1.0, 0.0, weight_bits=8, act_bits=32)[1:] == ["Activations: FP32"]


@pytest.mark.parametrize(
    ("qat", "coarse"),
    [
        (QATConfig(bits=8), False),
        (QATConfig(bits=4), True),
        (QATConfig(bits=8, overrides=[("0", {"weight_bits": 2})]), True),
    ],
)
def test_batch_norms_keep_the_float_networks_statistics_where_all_has_8_bits(job, monkeypatch, qat, coarse):
    seen = {}
    monkeypatch.setattr(
        "brfx.jobs.job.calibrate",
        lambda *args, **given: seen.update(given) or brfx.calibrate(*args, **given),
    )
    monkeypatch.setattr(
        "brfx.jobs.job.reestimate_batch_norm",
        lambda model, batches: seen.update(images=sum(len(images) for images in batches)),
    )
    train = TrainConfig(epochs=0)
    quantize(replace(job("run", qat=qat, lambda_br=0.0, lambda_br_act=0.0), train=train))
    assert seen["batch_statistics"] == coarse
    assert seen.get("images", 0) == (min(NORM_IMAGES, 1294 // 16 * 16) if coarse else 0)


def test_a_checkpoint_of_other_classes_is_fine_tuned_and_quantized_and_never_measured(job, tmp_path, caplog):
    caplog.set_level(logging.INFO, "brfx")
    ours = job("fp32")
    trained = torch.load(ours.ckpt)
    other = brfx.build_model(ours.model, 7)
    trained |= {key: value for key, value in other.state_dict().items() if key.startswith("5.")}
    torch.save(trained, tmp_path / "seven.pth")
    common = {"ckpt": tmp_path / "seven.pth"}
    fine_tuning = {"command": "train", "train": replace(ours.train, epochs=1, lr=1e-9, weight_decay=0.0)}
    run = train_float(replace(ours, **common, **fine_tuning))
    line = f"{tmp_path / 'seven.pth'}: 5 made anew, from 7 to 10 classes"
    assert line in caplog.messages
    tuned = read_state_dict(run.run_dir / "last.pth")
    torch.testing.assert_close(tuned["0.weight"], trained["0.weight"])
    assert tuned["5.weight"].shape == (10, 8)

    common["train"] = replace(ours.train, epochs=0, warmup_epochs=0)
    caplog.clear()
    run = quantize(replace(job("w2"), **common))
    assert line in caplog.messages and "FP32 on validation" not in caplog.text
    assert run.test_float is None
    again = quantize(replace(job("again"), **common))
    states = [torch.load(path.run_dir / "model.pt")["state_dict"] for path in (run, again)]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())  # the head follows the seed

    for call in (quantize, evaluate_file):
        with pytest.raises(CheckpointError, match=r"its 5 has 7 classes, 10 are wanted: `brfx train .*best.pth"):
            call(replace(job("strict"), strict=True, **common))
    with pytest.raises(CheckpointError, match="its 5 has 7 classes"):
        evaluate_file(replace(ours, **common))
    with pytest.raises(ConfigError, match=r"--distill 0.5: .*no FP32 network to distill from: `brfx train"):
        quantize(replace(job("distilled"), **common | {"train": replace(ours.train, distill=0.5)}))
    assert not job("strict").output_dir.exists() and not job("distilled").output_dir.exists()


def test_published_weights_are_used_where_they_are_and_else_their_address_is_told(job, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    caplog.set_level(logging.INFO, "brfx")
    ours = replace(job("run"), model="squeezenet1_1", image_size=32, ckpt=None)
    url = "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth"
    with pytest.raises(ConfigError, match=f"`brfx train` makes one; torchvision's are at {url}"):
        quantize(ours)
    named = replace(ours, ckpt=Path("torchvision"))
    with pytest.raises(ConfigError, match=f"squeezenet1_1 are not at .*1-b8a52dc0.pth: get them from {url}"):
        dry_run(named)
    older = replace(ours, model="resnet50", ckpt=Path("IMAGENET1K_V1"))
    with pytest.raises(ConfigError, match=r"resnet50 are not at .*resnet50-0676ba61.pth: get them from https://"):
        dry_run(older)
    with pytest.raises(CheckpointError, match="IMAGENET1K_V2: no such file"):  # of a model that has no such weights
        quantize(replace(named, ckpt=Path("IMAGENET1K_V2")))
    with pytest.raises(ConfigError, match="torchvision has no weights of resnet20"):
        dry_run(replace(named, model="resnet20"))

    file = tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    file.parent.mkdir(parents=True)
    torch.save(brfx.build_model("squeezenet1_1", 1000).state_dict(), file)
    with pytest.raises(ConfigError, match="`brfx train` makes one; torchvision's are on disk: --ckpt torchvision"):
        dry_run(ours)
    assert dry_run(named).layers
    assert caplog.messages[1] == f"{file}: classifier.1 made anew, from 1000 to 10 classes"
    assert caplog.messages[2:4] == [
        f"{file} was trained on images of another mean: --mean 0.485,0.456,0.406",
        f"{file} was trained on images of another std: --std 0.229,0.224,0.225",
    ]
    with pytest.raises(CheckpointError, match=r"its classifier.1 has 1000 classes, 10 are wanted"):
        evaluate_file(named)
    caplog.clear()
    dry_run(replace(named, ckpt=file, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)))
    assert not any("was trained on images" in message for message in caplog.messages)
    with pytest.raises(DataError, match="nowhere"):
        train_float(replace(ours, command="train", data="nowhere"))
    assert caplog.messages[-1] == "Training from random weights; torchvision's are on disk: --ckpt torchvision"


def test_a_model_of_one_channel_sees_grey_images_in_training_evaluation_and_export(job, tmp_path):
    file = tmp_path / "grey.py"
    file.write_text(NET.replace("nn.Conv2d(3,", "nn.Conv2d(1,"))
    model = f"{file}:net"
    torch.save(brfx.build_model(model, 10).state_dict(), tmp_path / "grey.pth")
    grey = replace(job("grey"), model=model, ckpt=tmp_path / "grey.pth", mean=(0.5,), std=(0.25,))
    with pytest.raises(ConfigError, match=r"does not run on images of 3x16x16 .*numbers are the channels"):
        quantize(replace(grey, mean=None, std=None))
    with pytest.raises(ConfigError, match="--mean of 1 and --std of 3 numbers"):
        quantize(replace(grey, std=None))
    assert inspect(replace(grey, image_size=16)).layers
    run = quantize(grey)
    ours = replace(grey, command="evaluate", ckpt=run.run_dir / "model.pt", mean=None, std=None)
    kind, evaluation = evaluate_file(ours)
    assert (kind, evaluation) == ("W2A2", run.test)
    assert inspect(ours).layers
    if run.onnx is not None:
        assert export_file(run.run_dir / "model.pt", tmp_path / "grey.onnx", model).reference_difference == 0


def test_a_run_of_few_batches_uses_images_from_all_over_each_split(job, caplog):
    caplog.set_level(logging.INFO, "brfx")
    run = quantize(job("few", batch_size=20, limit_batches=2))
    assert any(message.startswith("Calibrated on 2 batches") for message in caplog.messages)
    assert run.test.count == run.test_float.count == 40
    limited = _limited(job("few", batch_size=20, limit_batches=2), Split(torch.zeros(100, 1), torch.arange(100)))
    assert limited.labels.tolist() == [5 * (i // 2) + (2 * (i % 2)) for i in range(40)]
    whole = Split(torch.zeros(30, 1), torch.arange(30))
    assert _limited(job("few", batch_size=20, limit_batches=2), whole) is whole
    with pytest.raises(ConfigError, match="limit_batches=0: takes 1 or more"):
        job("none", limit_batches=0)


def test_weights_are_rounded_to_keep_outputs_where_the_job_says_so(job, caplog):
    caplog.set_level(logging.INFO, "brfx")
    losses = {}
    for reconstruct in (False, True):
        settings = job(f"reconstruct-{reconstruct}", reconstruct=reconstruct, qat=QATConfig(bits=2))
        run = quantize(replace(settings, train=TrainConfig(epochs=0)))
        losses[reconstruct] = run.test.loss - run.test_float.loss
    assert "Rounded the weights of 2 layers to keep their outputs" in caplog.text
    assert abs(losses[True]) < abs(losses[False])
    with pytest.raises(ConfigError, match="--reconstruct takes --weight-quantizer lsq, not dorefa"):
        job("none", reconstruct=True, qat=QATConfig(weight_quantizer="dorefa"))


def test_a_dry_run_of_training_says_what_it_begins_with_and_writes_nothing(job, tmp_path, caplog):
    caplog.set_level(logging.INFO, "brfx")
    ours = replace(job("run"), command="train", ckpt=None)
    torch.manual_seed(0)
    line = dry_run_float(ours)
    assert re.fullmatch(
        r".*net.py:net: 322 parameters, 2 epochs of 20 batches of 64; before .* a batch is 2\.\d{4}", line
    )
    assert line == dry_run_float(ours) and caplog.messages[0].startswith(
        "digits: 1,294 train, 143 val, 360 test images"
    )
    for call in (train_float, quantize):
        with pytest.raises(DataError, match="--class-weights has 2 numbers, digits has 10 classes"):
            call(replace(ours, ckpt=job("run").ckpt, class_weights="1,2"))
    assert not ours.output_dir.exists()
    with pytest.raises(DataError, match="is not in"):
        dry_run_float(replace(ours, data="cifar10", data_dir=tmp_path))
