"""The command line's tasks: which one a model is of, and a segmenter and a detector from training to their files."""

import json
import logging
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from brfx.config import JobConfig, QATConfig, TrainConfig
from brfx.errors import BrfxError, CheckpointError, ExportError, Interrupted
from brfx.io.float_checkpoint import load_float
from brfx.io.model_file import load
from brfx.jobs.data import read_data, train_and_val_loaders
from brfx.jobs.evaluate import evaluate_file
from brfx.jobs.files import export_file
from brfx.jobs.inspect import dry_run, dry_run_float, inspect
from brfx.jobs.job import quantize, train_float
from brfx.jobs.runs import read_runs
from brfx.jobs.tasks import _class_logits, _mask_logits, augmentation_of, task_of
from brfx.metadata import metadata_of
from brfx.models import build_model
from brfx.train import Callback

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
NUCLEI, RACCOON = SHARED / "nuclei", SHARED / "raccoon"

NET = """
from torch import nn

class Net(nn.Sequential):
    def forward(self, x):
        return {"out": super().forward(x)}

def net(num_classes=2):
    return Net(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, num_classes, 1),
    )
"""


def test_the_task_is_the_models_own_unless_it_is_named():
    def of(**settings):
        return task_of(JobConfig(command="train", **settings)).model

    assert of(model="lraspp_mobilenet_v3_large") == of(model="fcn_resnet50") == "segmenter"
    assert of(model="resnet20") == of(model="resnet18") == of(model="net.py:net") == "classifier"
    assert of(model="ssdlite320_mobilenet_v3_large") == of(model="fasterrcnn_resnet50_fpn_v2") == "detector"
    assert of(model="net.py:net", task="segmentation") == "segmenter"
    with pytest.raises(BrfxError, match="task='depth': takes classification, segmentation, detection, or None"):
        of(task="depth")


@pytest.fixture
def nuclei(tmp_path):
    """A few images of nuclei, linked."""
    pytest.importorskip("torchmetrics", reason="mIoU is measured by torchmetrics")
    if not NUCLEI.is_dir():
        pytest.skip(f"needs images of nuclei with masks, which are not at {NUCLEI}")
    for part, count in (("train", 8), ("test", 3)):
        for kind in ("images", "masks"):
            (tmp_path / "data" / part / kind).mkdir(parents=True)
            for path in sorted((NUCLEI / part / kind).iterdir())[:count]:
                (tmp_path / "data" / part / kind / path.name).symlink_to(path)
    (tmp_path / "net.py").write_text(NET)
    return tmp_path


def test_a_segmenter_is_trained_quantized_exported_and_evaluated(nuclei):
    def job(command, **settings):
        common = {"model": f"{nuclei}/net.py:net", "task": "segmentation", "data": str(nuclei / "data")}
        warmup = int(command == "quantize")
        train = TrainConfig(epochs=2, warmup_epochs=warmup, compile="off", keep="best", lr=0.1)
        sizes = {"image_size": 32, "batch_size": 2, "val_fraction": 0.25, "output_dir": nuclei / command}
        return JobConfig(command=command, train=train, **common, **sizes, **settings)

    first = train_float(job("train"))
    best = nuclei / "train" / "best.pth"
    run = quantize(job("quantize", ckpt=best, qat=QATConfig(bits=4)))
    assert first.test.metric == run.test.metric == "mIoU" and run.test.count == 3
    assert run.test_float.value == first.test.value and 0 < run.test.value < 1
    assert run.onnx_problem is None and (run.onnx is None or run.onnx.reference_difference == 0)
    for ckpt, kind, expected in ((best, "FP32", first.test), (nuclei / "quantize" / "model.pt", "W4A4", run.test)):
        found = evaluate_file(job("evaluate", ckpt=ckpt))
        assert (found[0], found[1].value, found[1].count) == (kind, expected.value, 3)
    result = json.loads((nuclei / "quantize" / "result.json").read_text())
    assert result["test"]["value"] == run.test.value and result["val_mIoU"] == run.fit.val_metric
    listed = {found.name: found for found in read_runs(nuclei)}
    assert listed["quantize"].metric == "mIoU" and listed["quantize"].test_accuracy == run.test.value
    assert listed["quantize"].val_accuracy == run.fit.val_metric


@pytest.mark.parametrize("task", [None, "detection"])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "keypointrcnn_resnet50_fpn",
            r"is a keypoint detector: .*brfx.train.detection\(\), targets that have keypoints",
        ),
        ("maskrcnn_resnet50_fpn_v2", r"is a detector of boxes and masks: .* and targets that have masks"),
        ("raft_small", "is an optical flow model: .*a loss= and a metric= of your own"),
        ("r3d_18", "is a video classifier: .*use brfx.fit with batches of clips"),
    ],
)
def test_a_model_of_another_task_is_refused_before_anything_is_read(tmp_path, model, message, task):
    job = JobConfig(command="train", model=model, task=task, data="nowhere", output_dir=tmp_path / "run")
    with pytest.raises(BrfxError, match=message):
        train_float(job)


def test_a_model_that_is_not_of_the_task_is_refused(nuclei):
    common = {"command": "train", "data": str(nuclei / "data"), "image_size": 32, "output_dir": nuclei / "run"}
    with pytest.raises(BrfxError, match="--skip-bad-images is not for a segmenter: remove such images and their masks"):
        train_float(JobConfig(**common, model="resnet20", task="segmentation", skip_bad_images=True))
    with pytest.raises(BrfxError, match="resnet20 is no segmenter"):
        train_float(JobConfig(**common, model="resnet20", task="segmentation"))
    with pytest.raises(BrfxError, match="has images/ and masks/, not a folder a class: add --task segmentation"):
        train_float(JobConfig(**common, model="resnet20"))
    assert not (nuclei / "run").exists()


@pytest.mark.parametrize("output", [torch.zeros(2, 3), [torch.zeros(2, 3, 4, 4)], {"boxes": torch.zeros(2, 4)}])
def test_logits_of_pixels_are_told_from_other_outputs(output):
    assert _mask_logits(output) is None
    assert _mask_logits({"out": torch.zeros(2, 3, 4, 4)}).shape == (2, 3, 4, 4)
    assert _class_logits(nn.Identity()(torch.zeros(2, 3, 4, 4))) is None


DETECTOR = """
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign

def net(num_classes=2):
    body = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
    body.out_channels = 8
    return FasterRCNN(
        body, rpn_anchor_generator=AnchorGenerator(((24,),), ((1.0,),)), box_roi_pool=MultiScaleRoIAlign(["0"], 3, 2),
        box_head=TwoMLPHead(8 * 3 * 3, 16), box_predictor=FastRCNNPredictor(16, num_classes), min_size=64, max_size=64,
    )

def small(num_classes=2):
    return net(num_classes - 1)
"""


@pytest.fixture
def squares(tmp_path):
    """Twelve images for training, three for the test, with a white square each but for one; returns a job on them."""
    for package in ("torchmetrics", "pycocotools"):
        pytest.importorskip(package, reason="mAP50 is measured by torchmetrics with pycocotools")
    random = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 3)):
        (tmp_path / "data" / part).mkdir(parents=True)
        images, annotations = [], []
        for number in range(count):
            pixels = random.integers(0, 64, (48, 64, 3), dtype=np.uint8)
            left, top = (int(value) for value in random.integers(4, 20, 2))
            if number:
                pixels[top : top + 24, left : left + 24] = 255
                box = [left, top, 24, 24]
                annotations.append({"id": number, "image_id": number, "category_id": number % 2, "bbox": box})
            Image.fromarray(pixels).save(tmp_path / "data" / part / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png", "width": 64, "height": 48})
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": 0, "name": "a"}, {"id": 1, "name": "b"}],
        }
        (tmp_path / "data" / f"{part}.json").write_text(json.dumps(content))
    (tmp_path / "net.py").write_text(DETECTOR)

    def job(command, *, train=None, **settings):
        common = {"model": f"{tmp_path}/net.py:net", "task": "detection", "data": str(tmp_path / "data"), "workers": 0}
        common |= {"batch_size": 1, "val_fraction": 0.15, "lambda_br_act": 0.001, "output_dir": tmp_path / command}
        quantizes = command == "quantize"
        best = tmp_path / "train" / "best.pth"
        defaults = {"epochs": 2, "warmup_epochs": int(quantizes), "keep": "best", "lr": 0.001}
        if quantizes:
            common |= {"ckpt": best, "qat": QATConfig(bits=4), "calibration_batches": 2}
        return JobConfig(command=command, train=TrainConfig(**defaults | (train or {})), **common | settings)

    return job


def test_a_detector_is_trained_quantized_and_evaluated(squares, tmp_path, caplog):
    caplog.set_level(logging.INFO, "brfx")
    first = train_float(squares("train"))
    run = quantize(squares("quantize", reconstruct=True))
    assert first.test.metric == run.test.metric == "mAP50" and run.test.count == 3
    assert run.test_float == first.test and set(run.test.further) == {"mAP"} and 0 <= run.test.value <= 1
    assert run.onnx is None and "chooses its boxes in Python code" in run.onnx_problem
    told, trained = (
        caplog.text.index(text) for text in ("No model.onnx will be written: a detector", "Calibrated on 2")
    )
    assert "Rounded the weights of" in caplog.text and told > trained and (tmp_path / "quantize" / "model.pt").is_file()
    for ckpt, kind, expected in (("train/best.pth", "FP32", first), ("quantize/model.pt", "W4A4", run)):
        assert evaluate_file(squares("evaluate", ckpt=tmp_path / ckpt)) == (kind, expected.test)
    lines = [json.loads(line) for line in (tmp_path / "quantize" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= line["val_mAP"] <= 1 for line in lines) and lines[-1]["train"]["terms"]["act"] > 0
    result = json.loads((tmp_path / "quantize" / "result.json").read_text())
    assert result["test"]["further"] == run.test.further and result["val_mAP50"] == run.fit.val_metric
    (listed,) = (found for found in read_runs(tmp_path) if found.name == "quantize")
    assert (listed.metric, listed.val_accuracy) == ("mAP50", run.fit.val_metric) and not listed.why
    assert metadata_of(load(tmp_path / "quantize" / "model.pt", build_model(f"{tmp_path}/net.py:net", 3))).classes == (
        "background", "a", "b",
    )  # fmt: skip


class Stop(Callback):
    """Ask for a stop, as Ctrl-C does, at the tenth batch of the second epoch."""

    def on_batch(self, progress):
        if (progress.epoch, progress.batch) == (2, 10):
            assert progress.batch < progress.batches
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("command", ["train", "quantize"])
def test_a_detectors_run_that_is_cut_off_in_an_epoch_goes_on_bit_for_bit(squares, tmp_path, command):
    if command == "quantize":
        train_float(squares("train", train={"epochs": 1}))
    run = {"train": train_float, "quantize": quantize}[command]
    settings = {"val_fraction": 0.05, "train": {"epochs": 3, "warmup_epochs": 1}}
    whole = squares(command, **settings, output_dir=tmp_path / "whole")
    cut = squares(command, **settings, output_dir=tmp_path / "cut")
    run(whole)
    with pytest.raises(Interrupted, match="stopped at epoch 2, batch 10"):
        run(cut, [Stop()])
    run(cut, resume=True)
    states = [torch.load(tmp_path / name / "last.pth", weights_only=True)["state_dict"] for name in ("whole", "cut")]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    whole_lines, cut_lines = (
        [json.loads(line) | {"seconds": 0, "images_per_second": 0} for line in path.read_text().splitlines()]
        for path in (tmp_path / "whole" / "metrics.jsonl", tmp_path / "cut" / "metrics.jsonl")
    )
    assert len(whole_lines) == 3 and whole_lines == cut_lines


def test_so_few_batches_and_a_dry_run_of_a_detector(squares, tmp_path):
    run = train_float(squares("train", limit_batches=2, val_fraction=0.3))
    assert run.test.count == 2 and run.fit.history[0].further.keys() == {"mAP"}
    before = sorted(tmp_path.rglob("*"))
    assert dry_run(squares("quantize")).mac_share > 0.9
    line = dry_run_float(squares("train"))
    assert ", 2 epochs of 10 batches of 1; before training, the loss of a batch is " in line
    assert line == dry_run_float(squares("train"))
    report = inspect(squares("inspect", ckpt=None, qat=QATConfig(bits=4), num_classes=3, image_size=64))
    assert report.mac_share > 0.9 and sorted(tmp_path.rglob("*")) == before


def test_images_of_a_detector_are_mirrored_unless_told_otherwise(squares):
    seen = {}
    for flip in (None, False):
        job = squares("train", val_fraction=0, flip=flip, train={"keep": "last"})
        dataset = read_data(job)
        train, _ = train_and_val_loaders(job, dataset)
        wanted = augmentation_of(job, None, flip=dataset.flip)
        assert (wanted.crop, wanted.flip) == ("none", flip is None)
        seen[flip] = [targets[0]["boxes"] for _, targets in train]
        assert [len(boxes) for boxes in seen[flip]] == [len(boxes) for boxes in seen[None]]
    moved = [not torch.equal(*boxes) for boxes in zip(seen[None], seen[False], strict=True)]
    assert any(moved) and not all(moved)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 64}, "--image-size is not for a detector: it resizes and normalizes images itself"),
        ({"mean": (0.5,) * 3}, "--mean is not for a detector: it resizes"),
        ({"std": (0.5,) * 3}, "--std is not for a detector: it resizes"),
        ({"stretch": False}, "--stretch is not for a detector: it resizes"),
        ({"channel_order": "bgr"}, "--channel-order is not for a detector: it resizes"),
        ({"crop": "resized"}, "--crop is not for a detector: its images are mirrored alone"),
        ({"rand_augment": 9}, "--rand-augment is not for a detector: its images are mirrored alone"),
        ({"mixup": 0.2}, "--mixup is not for a detector: its images are mirrored alone"),
        ({"class_weights": "1,2,3"}, "--class-weights is not for a detector: its losses are its own"),
        ({"skip_bad_images": True}, "--skip-bad-images is not for a detector: take such images out of the annotations"),
        ({"train": {"label_smoothing": 0.1}}, "--label-smoothing is not for a detector: its losses are its own"),
        ({"train": {"distill": 0.5}}, "--distill is not for a detector: nothing can be distilled"),
        ({"train": {"distill": 0.5}, "teacher": "a=b"}, "--teacher is not for a detector: nothing can be distilled"),
        ({"train": {"compile": "on"}}, "--compile on is not for a detector: a batch of it is no one graph"),
        ({"num_classes": 7}, "--num-classes 7: .* has 3, background included: a, b"),
        (
            {"model": "net.py:small"},
            r"net.py:small does not train as a detector \(.*\): .* and 3 classes, the background",
        ),
        (
            {"model": "resnet20", "task": None},
            r"train.json: has boxes of the images in .*train, .*: add --task detection",
        ),
        ({"model": "resnet20"}, r"resnet20 does not train as a detector \(.*\): it takes a list of images"),
        (
            {"val_fraction": 0.01, "train": {"seed": 2}},
            "mAP50 needs a box: there is none in 1 images: raise --val-fraction",
        ),
    ],
)
def test_what_is_not_for_a_detector_is_refused_before_anything_is_written(squares, tmp_path, settings, message):
    if settings.get("model") == "net.py:small":
        settings = settings | {"model": f"{tmp_path}/net.py:small"}
    with pytest.raises(BrfxError, match=message) as caught:
        train_float(squares("train", **settings))
    assert "\n" not in str(caught.value) and not (tmp_path / "train").exists()


def test_a_detectors_model_file_is_refused_by_exporters_by_name(squares, tmp_path):
    train_float(squares("train", train={"epochs": 1}))
    quantize(squares("quantize", train={"epochs": 0, "warmup_epochs": 0}))
    model = f"{tmp_path}/net.py:net"
    for suffix in ("onnx", "qonnx.onnx", "pt2", "safetensors"):
        with pytest.raises(ExportError, match=r"model.pt is a detector, which chooses its boxes in Python code: .*"):
            export_file(tmp_path / "quantize" / "model.pt", tmp_path / f"model.{suffix}", model)


@pytest.mark.parametrize(
    "name", ["ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn", "fcos_resnet50_fpn"]
)
def test_a_detectors_heads_are_made_anew_for_the_datas_classes(tmp_path, name, caplog):
    caplog.set_level(logging.INFO, "brfx")
    torch.save(build_model(name).state_dict(), tmp_path / "coco.pth")
    model = build_model(name, 2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="has 91 classes, 2 are wanted"):
        load_float(model, tmp_path / "coco.pth")
    head = load_float(model, tmp_path / "coco.pth", new_head=True)
    assert 0 < len(head) < 40 and "made anew, from 91 to 2 classes" in caplog.text
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in head)
    weights = [key for key, value in before.items() if value.dim() == 4 and key not in head]
    assert not any(torch.equal(model.state_dict()[key], before[key]) for key in weights)


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bf16"},
        {"accumulate": 4, "ema": 0.5, "reestimate_bn": 2},
        {"on_nonfinite": "skip", "clip_grad": 1.0},
    ],
)
def test_settings_of_training_hold_for_a_detector(squares, settings):
    train_float(squares("train", train={"epochs": 1}))
    run = quantize(squares("quantize", val_fraction=0.3, train=settings | {"patience": 1}))
    assert run.fit.history[-1].train.loss > 0 and run.fit.skipped == 0
    assert run.fit.compiled == "none" and run.test.count == 3


def test_trying_a_detector_out_leaves_it_and_the_random_numbers_as_they_are(squares, tmp_path):
    dataset = read_data(squares("train"))
    model = build_model(f"{tmp_path}/net.py:net", 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(0)
    task_of(squares("train")).require(model, "net", dataset)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3), drawn)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_torchvisions_detector_trains_on_photographs(tmp_path):
    """The task is the model's own; EXIF, sizes and boxes are those of real files."""
    pytest.importorskip("torchmetrics", reason="mAP50 is measured by torchmetrics")
    if not RACCOON.is_dir():
        pytest.skip(f"needs photographs of raccoons with boxes, which are not at {RACCOON}")
    train = TrainConfig(epochs=1, lr=0.01, compile="off")
    settings = {"batch_size": 2, "limit_batches": 1, "data": str(RACCOON), "val_fraction": 0.02, "train": train}
    job = JobConfig(command="train", model="ssdlite320_mobilenet_v3_large", output_dir=tmp_path / "run", **settings)
    run = train_float(job)
    assert run.test.metric == "mAP50" and run.test.count == 2 and 5 < run.fit.history[0].train.loss < 20
