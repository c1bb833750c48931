"""The command line as a person uses it: real processes, what they print, and their exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from brfx.io.float_checkpoint import load_float
from brfx.models import build_model
from brfx.train import evaluate
from brfx.train.checkpoint import state_sha256


def brfx(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "brfx_cli", *map(str, arguments)]
    env = os.environ | {"COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env)


@pytest.fixture(scope="module")
def float_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    root = tmp_path_factory.mktemp("runs") / "fp32"
    done = brfx("train", "--model", "resnet20", "--data", "digits", "--epochs", 8, "--output-dir", root)
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture(scope="module")
def quantized_run(float_run: Path) -> tuple[Path, str]:
    root = float_run.parent / "w2a2"
    done = brfx(
        *("quantize", "--model", "resnet20", "--data", "digits", "--ckpt", float_run / "best.pth", "--num-bits", 2),
        *("--qat-epochs", 3, "--warmup-epochs", 1, "--clip-value", "None", "--freeze-alpha", "--output-dir", root),
    )
    assert done.returncode == 0, done.stderr
    return root, done.stdout


def test_quantize_prints_levels_epochs_and_files(quantized_run):
    root, text = quantized_run
    assert "Weights: 4 levels, symmetric 2-bit [-1.5s, -0.5s, 0.5s, 1.5s]" in text
    assert "Activations: 4 levels, unsigned 2-bit [0, s, 2s, 3s]" in text
    epochs = [line for line in text.splitlines() if re.match(r"epoch  |\d/3 \[", line)]
    assert [line.split()[:2] for line in epochs] == [
        *(["epoch", "rate"], ["1/3", "[LSQ]"], ["epoch", "rate"], ["2/3", "[BR]"], ["3/3", "[BR]"])
    ]
    assert "BR_W" not in epochs[0] and epochs[2].split()[-3:] == ["BR_W", "BR_A", "time"]
    assert "Shipped: epoch 3 of 3 [BR], " in text and " on validation (eager training)" in text
    assert "Test: FP32" in text and "Test: W2A2" in text and text.count("Test:") == 2
    assert str(root / "model.pt") in text


def test_the_run_folder_is_complete(quantized_run):
    root, _ = quantized_run
    names = {path.name for path in root.iterdir()}
    files = {"model.pt", "model.onnx", "best.pth", "last.pth", "metrics.jsonl", "config.json", "result.json"}
    report = {"report.html"} if find_spec("matplotlib") else set()
    assert names == files | {"histograms.jsonl", "network.json"} | report
    config = json.loads((root / "config.json").read_text())
    assert config["qat"]["weight_bits"] == 2 and config["train"]["epochs"] == 3 and config["lambda_br"] == 0.1
    assert config["versions"]["torch"] == torch.__version__.split("+")[0]
    result = json.loads((root / "result.json").read_text())
    assert result["test"]["count"] == result["test_float"]["count"] == 360
    assert (result["epoch"], result["stage"]) == (3, "penalty")
    assert result["bytes"]["model.pt"] == (root / "model.pt").stat().st_size
    assert len((root / "metrics.jsonl").read_text().splitlines()) == 3


def test_evaluate_the_model_gives_the_accuracy_that_quantize_printed(quantized_run):
    root, text = quantized_run
    done = brfx("evaluate", "--ckpt", root / "model.pt", "--data", "digits")
    printed = next(line for line in text.splitlines() if "Test: W2A2" in line).removeprefix("Test: W2A2 ")
    assert done.stdout.strip() == f"W2A2 top-1 accuracy: {printed}"


def test_export_and_inspect_a_run(quantized_run, tmp_path):
    root, _ = quantized_run
    done = brfx("export", "--ckpt", root / "model.pt", "--output", tmp_path / "out.onnx")
    assert done.returncode == 0 and (tmp_path / "out.onnx").stat().st_size > 10_000
    again = brfx("export", "--ckpt", root / "model.pt", "--output", tmp_path / "out.onnx")
    assert again.returncode == 2 and "exists already" in again.stderr
    table = brfx("inspect", "--ckpt", root / "model.pt", "--wide").stdout
    assert "layer3.2.conv2" in table and "QuantizedConv2d" in table and " step " in table.splitlines()[0]


def test_runs_lists_a_quantized_run_and_a_damaged_one_beside_the_baseline(quantized_run, tmp_path):
    root, text = quantized_run
    for name in ("fp32", "w2a2"):
        shutil.copytree(root.parent / name, tmp_path / name, ignore=shutil.ignore_patterns("*.pt*", "*.onnx"))
    (tmp_path / "[red]half").mkdir()
    (tmp_path / "[red]half" / "config.json").write_text('{"command"')
    done = brfx("runs", tmp_path, "--wide")
    assert done.returncode == 0, done.stderr
    header, half, fp32, w2a2, why = done.stdout.splitlines()
    assert header.split()[:4] == ["run", "model", "bits", "epochs"]
    assert half.startswith("[red]half") and "unreadable" in half and why.startswith("[red]half: config.json: damaged")
    assert fp32.split()[:4] == ["fp32", "resnet20", "FP32", "8/8"] and "complete" in fp32
    assert w2a2.split()[:8] == ["w2a2", "resnet20", "W2A2", "3/3", "0.1", "0.01", "0.02", "0"]
    accuracy = next(line for line in text.splitlines() if line.startswith("Test: W2A2")).split()[2]
    assert w2a2.split()[8:10] == ["3", "[BR]"] and w2a2.split()[11] == f"{accuracy}%" and "complete" in w2a2
    assert_one_line(brfx("runs", tmp_path / "none"), "no such folder")
    assert_one_line(brfx("runs", Path(__file__).parent), "there is no run in it")


def test_zero_epochs_calibrate_and_export(float_run, tmp_path):
    done = brfx(
        *("quantize", "--model", "resnet20", "--data", "digits", "--ckpt", float_run / "best.pth", "--bits", 8),
        *("--qat-epochs", 0, "--output-dir", tmp_path / "ptq"),
    )
    assert done.returncode == 0, done.stderr
    accuracy = {
        kind: float(line.split()[2])
        for line in done.stdout.splitlines()
        for kind in ("FP32", "W8A8")
        if line.startswith(f"Test: {kind}")
    }
    assert abs(accuracy["FP32"] - accuracy["W8A8"]) < 1.5
    assert (tmp_path / "ptq" / "model.onnx").is_file()
    assert not (tmp_path / "ptq" / "metrics.jsonl").exists()


def test_bits_by_layer_are_measured_edited_and_used(float_run, tmp_path):
    common = ("--model", "resnet20", "--data", "digits", "--ckpt", float_run / "best.pth")
    done = brfx(
        *("sensitivity", *common, "--bits", 3, "--batches", 1, "--bit-budget", 3),
        *("--output", tmp_path / "bits.toml", "--json"),
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    weights = [layer for layer in report["layers"] if layer["kind"] == "weights"]
    assert len(weights) == 20 and report["images"] == 64
    assert sum(layer["assigned"] * layer["values"] for layer in weights) <= 3 * sum(
        layer["values"] for layer in weights
    )
    text = (tmp_path / "bits.toml").read_text().splitlines()
    at = next(index for index, line in enumerate(text) if line.startswith('match = "linear"'))
    (tmp_path / "bits.toml").write_text("\n".join([*text[: at + 1], "weight_bits = 7", *text[at + 2 :]]))
    done = brfx("quantize", *common, "--config", tmp_path / "bits.toml", "--qat-epochs", 0, "--dry-run", "--json")
    bits = {layer["name"]: layer["weight_bits"] for layer in json.loads(done.stdout)["layers"]}
    assert bits["linear"] == 7
    assert all(bits[layer["name"]] == layer["assigned"] for layer in weights[:-1])


def test_the_real_checkpoint_is_91_73_before_anything_is_quantized(real_checkpoint, cifar10_batches):
    """`brfx evaluate` on all 10,000 images is the same call; unpacking them for the command takes longer."""
    model = build_model("resnet20", 10)
    load_float(model, real_checkpoint)
    result = evaluate(model, cifar10_batches)
    assert (result.correct, result.count) == (9173, 10_000)


def test_the_real_checkpoint_through_the_command(real_checkpoint, cifar10_folder):
    done = brfx("evaluate", "--model", "resnet20", "--ckpt", real_checkpoint, "--data", cifar10_folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("FP32 top-1 accuracy: 9") and "of 600)" in done.stdout


def test_without_validation_every_image_is_trained_on(float_run, tmp_path):
    arguments = ("quantize", "--model", "resnet20", "--data", "digits", "--ckpt", float_run / "best.pth")
    whole = (*arguments, "--val-fraction", 0, "--qat-epochs", 1, "--lambda-br", 0, "--lambda-br-act", 0)
    done = brfx(*whole, "--output-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    row = next(line.split() for line in done.stdout.splitlines() if line.startswith("1/1 "))
    assert row[4] == "-" and "on validation" not in done.stdout
    assert "Shipped: epoch 1 of 1, no validation (eager training)" in done.stdout
    assert not (tmp_path / "run" / "best.pth").exists() and (tmp_path / "run" / "model.onnx").exists()
    assert brfx("runs", tmp_path).stdout.splitlines()[1].split()[6:8] == ["1", "-"]
    assert_one_line(brfx(*whole, "--keep", "best"), "--keep best chooses on validation images")


def test_models_lists_and_filters():
    assert brfx("models", "resnet2*").stdout.split() == ["resnet20"]
    assert len(brfx("models").stdout.split()) > 100


def test_report_writes_a_page_figures_and_a_short_form(quantized_run, tmp_path):
    pytest.importorskip("matplotlib", reason="figures need matplotlib, the extra 'report'")
    root, _ = quantized_run
    at_the_end = (root / "report.html").read_text()
    assert "resnet20 at W2A2 reaches" in at_the_end and "Histograms of latent weights" in at_the_end
    done = brfx("report", root, "-o", tmp_path / "page.html")
    assert (done.returncode, done.stdout.split()[0]) == (0, str(tmp_path / "page.html"))
    written = (tmp_path / "page.html").read_text()
    assert written == at_the_end
    done = brfx("report", root, "--figures", tmp_path / "figures", "--terminal")
    assert done.returncode == 0 and (tmp_path / "figures" / "metric.pdf").is_file()
    lines = done.stdout.splitlines()
    assert lines[0].startswith("resnet20 at W2A2 reaches ") and any("BR_W" in line for line in lines)
    assert any(line.startswith("layer1.0.conv1 ") for line in lines)
    assert not (tmp_path / "report.html").exists()


def test_report_of_what_is_no_run_is_one_line(tmp_path):
    for arguments, said in (
        (("report",), "Missing argument 'RUN...'"),
        (("report", tmp_path / "none"), f"{tmp_path / 'none'}: there is no such folder; give a run's"),
        (("report", tmp_path), f"{tmp_path}: this is no run's folder"),
    ):
        done = brfx(*arguments)
        assert done.returncode == 2 and done.stderr.startswith(said) and done.stderr.count("\n") == 1


def test_inspect_draws_the_graph_before_and_after(quantized_run, tmp_path):
    root, _ = quantized_run
    for name, arguments in {
        "run": ("--ckpt", root / "model.pt"),
        "model": ("--model", "resnet20", "--bits", 2),
    }.items():
        path = tmp_path / f"{name}.svg"
        done = brfx("inspect", *arguments, "--graph", path)
        assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith(str(path))
        text = path.read_text()
        assert ">layer1.0.conv1<" in text and ">layer1.0.conv1 W2 A2<" in text
    done = brfx("inspect", "--model", "resnet20", "--graph", tmp_path / "graph.png")
    assert done.returncode == 2 and "the picture of a graph is an .svg" in done.stderr


def test_inspect_a_model_by_name():
    arguments = ("inspect", "--model", "resnet20", "--weight-bits", 2, "--act-bits", 4)
    lines = brfx(*arguments, "--wide").stdout.splitlines()
    assert sum("QuantizedConv2d" in line for line in lines) == 19
    assert sum("QuantizedClippedReLU" in line for line in lines) == 9
    assert sum("StreamQuantizer" in line and "8  unsigned" in line for line in lines) == 1
    assert lines[-1] == "100.0 % of 40.6 M MACs quantized; left: nothing"
    assert brfx(*arguments).stdout.splitlines()[2].split()[:2] == ["layer1.{0..2}.conv{1,2}", "x6"]
    found = json.loads(brfx(*arguments, "--json").stdout)
    assert (found["macs"], found["quantized_macs"], found["layers"][0]["name"]) == (40_551_040, 40_551_040, "conv1")
    paper = brfx("inspect", "--model", "resnet20", "--placement", "paper").stdout.splitlines()[-1]
    assert paper.endswith("left: conv1, linear")


def test_a_dry_run_shows_what_would_be_quantized_and_writes_nothing(float_run, tmp_path):
    (tmp_path / "q.toml").write_text('bits = 4\n[[overrides]]\nmatch = "linear"\nfp32 = true\n')
    arguments = ("quantize", "--model", "resnet20", "--data", "digits", "--ckpt", float_run / "best.pth", "--dry-run")
    done = brfx(*arguments, "--config", "q.toml", "--skip", "conv1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("quantized; left: conv1, linear")
    assert [path.name for path in tmp_path.iterdir()] == ["q.toml"]
    assert_one_line(brfx(*arguments, "--skip", "conv9", cwd=tmp_path), "matches no layer")


def test_a_segmentation_model_is_inspected_and_wants_masks(tmp_path, digits):
    ckpt = tmp_path / "seg.pth"
    torch.save(build_model("lraspp_mobilenet_v3_large", 10).state_dict(), ckpt)
    arguments = ("--model", "lraspp_mobilenet_v3_large")
    done = brfx("quantize", *arguments, "--ckpt", ckpt, "--data", "digits", "--image-size", 32, cwd=tmp_path)
    assert_one_line(done, "digits: expected digits/train/images with digits/train/masks")
    assert "QuantizedConv2d" in brfx("inspect", *arguments, "--wide").stdout


def assert_one_line(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_mistakes_are_one_line_with_exit_code_2_and_touch_nothing(float_run, tmp_path):
    ckpt = float_run / "best.pth"
    other = tmp_path / "other.pth"
    torch.save(build_model("resnet32").state_dict(), other)
    half = tmp_path / "half.pth"
    half.write_bytes(ckpt.read_bytes()[:5000])
    (tmp_path / "empty").mkdir()
    base = ("quantize", "--model", "resnet20", "--data", "digits")
    cases = [
        ((*base,), "--ckpt FILE"),
        ((*base, "--ckpt", tmp_path / "absent.pth"), "no such file"),
        (("inspect", "--ckpt", tmp_path / "absent.pth"), "absent.pth: no such file"),
        (("evaluate", "--ckpt", tmp_path / "absent.pth"), "absent.pth: no such file"),
        (("evaluate", "--ckpt", float_run), f"is a folder, not a checkpoint: give {ckpt}"),
        (("verify", ckpt, tmp_path / "absent.onnx"), "absent.onnx: no such file"),
        ((*base, "--config", tmp_path / "absent.toml"), "absent.toml: no such file or folder"),
        ((*base, "--ckpt", ckpt, "--output-dir", "/proc/x"), "/proc/x: no such file or folder"),
        ((*base, "--ckpt", half), "truncated"),
        ((*base, "--ckpt", other), "layer1.3.conv1.weight"),
        (("quantize", "--model", "resnet21", "--ckpt", ckpt, "--data", "digits"), "did you mean resnet32, resnet20"),
        ((*base, "--ckpt", ckpt, "--bits", 9), "--bits 9: takes 1 to 8"),
        ((*base, "--ckpt", ckpt, "--bits", "two"), "--bits"),
        ((*base, "--ckpt", ckpt, "--num-classes", 7), "has 10 classes"),
        ((*base, "--ckpt", ckpt, "--qat-epochs", 3, "--warmup-epochs", 3), "leaves none of 3"),
        ((*base, "--ckpt", ckpt, "--output-dir", float_run), "is not empty"),
        (("quantize", "--model", "resnet20", "--ckpt", ckpt, "--data", tmp_path / "empty"), "expected"),
        (("quantize", "--model", "resnet20", "--ckpt", ckpt, "--data-dir", tmp_path / "none"), "--download"),
        (("evaluate", "--ckpt", ckpt, "--data", "digits"), "--model NAME"),
        ((*base, "--ckpt", ckpt, "--device", "cuda:77"), "--device cuda:77"),
        ((*base, "--ckpt", ckpt, "--std", "1,0,1"), "above 0"),
        ((*base, "--ckpt", ckpt, "--output-dir", half / "run"), "half.pth"),
        (("quantise",), "quantise"),
    ]
    before = {path: path.stat().st_mtime_ns for path in [*tmp_path.rglob("*"), *float_run.rglob("*")]}
    with ThreadPoolExecutor(2) as pool:
        for done, (_, message) in zip(pool.map(lambda case: brfx(*case[0], cwd=tmp_path), cases), cases, strict=True):
            assert_one_line(done, message)
    after = {path: path.stat().st_mtime_ns for path in [*tmp_path.rglob("*"), *float_run.rglob("*")]}
    assert after == before


def test_debug_shows_the_traceback(tmp_path):
    done = brfx("--debug", "evaluate", "--model", "resnet20", "--ckpt", tmp_path / "absent.pth")
    assert done.returncode != 0 and "Traceback" in done.stderr


def test_a_model_of_the_users_own_and_a_teacher(float_run, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def make(num_classes=10):\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), "
        "nn.Linear(8 * 49, num_classes))\n"
    )
    model = "mine.py:make"
    done = brfx("train", "--model", model, "--data", "digits", "--epochs", 2, "--output-dir", "a", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    quantize = ("quantize", "--model", model, "--data", "digits", "--ckpt", "a/best.pth", "--qat-epochs", 2)
    teacher = f"resnet20={float_run / 'best.pth'}"
    done = brfx(*quantize, "--teacher", teacher, "--output-dir", "b", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (config["teacher"], config["train"]["distill"]) == (teacher, 0.5)
    taught = build_model("resnet20", 10)
    load_float(taught, float_run / "best.pth")
    assert json.loads((tmp_path / "b" / "result.json").read_text())["teacher_sha256"] == state_sha256(taught)
    done = brfx(*quantize, "--teacher", f"resnet32={float_run / 'best.pth'}", cwd=tmp_path)
    assert_one_line(done, "is it another architecture than --teacher says?")
    assert_one_line(brfx("evaluate", "--ckpt", "b/model.pt", "--data", "digits", cwd=tmp_path), "no code is run")
    done = brfx("evaluate", "--ckpt", "b/model.pt", "--data", "digits", "--model", model, cwd=tmp_path)
    assert done.stdout.startswith("W2A2 top-1")
