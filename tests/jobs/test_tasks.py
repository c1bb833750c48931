"""The command line's tasks: which one a model is of, and a segmenter from training to its exported file."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from brfx.config import JobConfig, QATConfig, TrainConfig
from brfx.errors import BrfxError
from brfx.jobs.job import evaluate_file, quantize, train_float
from brfx.jobs.runs import read_runs
from brfx.jobs.tasks import TASKS, task_of

NUCLEI = Path(__file__).resolve().parents[3] / "shared" / "data" / "nuclei"

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
    assert of(model="net.py:net", task="segmentation") == "segmenter"
    with pytest.raises(BrfxError, match="task='depth': takes classification or segmentation, or None"):
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


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("ssdlite320_mobilenet_v3_large", r"is a detector: .*use brfx.fit with task=brfx.train.detection\(\)"),
        ("raft_small", "is an optical flow model: .*a loss= and a metric= of your own"),
    ],
)
def test_a_model_of_another_task_is_refused_before_anything_is_read(tmp_path, model, message):
    job = JobConfig(command="train", model=model, data="nowhere", output_dir=tmp_path / "run")
    with pytest.raises(BrfxError, match=message):
        train_float(job)


def test_a_model_that_is_not_of_the_task_is_refused(nuclei):
    common = {"command": "train", "data": str(nuclei / "data"), "image_size": 32, "output_dir": nuclei / "run"}
    with pytest.raises(BrfxError, match="resnet20 is no segmenter"):
        train_float(JobConfig(**common, model="resnet20", task="segmentation"))
    with pytest.raises(BrfxError, match="has images/ and masks/, not a folder a class: add --task segmentation"):
        train_float(JobConfig(**common, model="resnet20"))
    assert not (nuclei / "run").exists()


@pytest.mark.parametrize("output", [torch.zeros(2, 3), [torch.zeros(2, 3, 4, 4)], {"boxes": torch.zeros(2, 4)}])
def test_logits_of_pixels_are_told_from_other_outputs(output):
    assert TASKS["segmentation"].logits(output) is None
    assert TASKS["segmentation"].logits({"out": torch.zeros(2, 3, 4, 4)}).shape == (2, 3, 4, 4)
    assert TASKS["classification"].logits(nn.Identity()(torch.zeros(2, 3, 4, 4))) is None
