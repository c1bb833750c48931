"""The last lines of a run."""

from dataclasses import replace
from pathlib import Path

import pytest
from brfx_cli.main import cli
from brfx_cli.summary import came_to, next_commands

from brfx.config import JobConfig, QATConfig, TrainConfig
from brfx.export import OnnxReport
from brfx.jobs.run_folder import JobResult
from brfx.train import EpochMetrics, Evaluation, FitResult, Means, Score

EPOCHS = tuple(EpochMetrics(epoch, "plain", 0.1, Means(1.0, 0.5), 1.0, 0.5, 6.2, 64.0) for epoch in (1, 2))
FIT = FitResult(EPOCHS, 2, "plain", 0.5, "none")
RUN = JobResult(
    Path("my runs/a"),
    FIT,
    Evaluation(358, 360, 0.1),
    Evaluation(356, 360, 0.1),
    "W2A2",
    onnx=OnnxReport(Path("m.onnx"), 86_200),
    float_bytes=1_080_000,
)


def test_the_result_is_a_line():
    assert came_to(RUN) == (
        "Result: FP32 98.89 % -> W2A2 99.44 %; 1.08 MB -> 86.2 kB, 12.5 times smaller; trained in 12 s"
    )
    alone = JobResult(Path("a"), None, Score(0.5, "mIoU", 4, 1.0), kind="W4A4")
    assert came_to(alone) == "Result: W4A4 50.00 % mIoU; nothing trained"


def job(**settings):
    given = {"command": "quantize", "model": "resnet20", "data": "digits", **settings}
    return JobConfig(qat=QATConfig(), train=TrainConfig(epochs=2), **given)


def test_what_comes_next_can_be_copied():
    assert next_commands(RUN, job()) == [
        "brfx verify 'my runs/a/model.pt' 'my runs/a/model.onnx' --data digits",
        "brfx benchmark 'my runs/a/model.pt' 'my runs/a/model.onnx'",
        "brfx export --ckpt 'my runs/a/model.pt' --output 'my runs/a/model.safetensors'",
    ]
    own = next_commands(replace(RUN, onnx=None), job(model="mine.py:make", task="segmentation"))
    assert own[0] == (
        "brfx evaluate --ckpt 'my runs/a/model.pt' --model mine.py:make --data digits --task segmentation"
    )
    segmented = next_commands(replace(RUN, test=Score(0.5, "mIoU", 4, 1.0)), job(data="DIR"))
    assert segmented[0].endswith("model.onnx'")  # verify reads no masks
    trained = next_commands(RUN, job(command="train", mean=(0.5,), std=(0.25,), image_size=16))
    assert trained[2] == (
        "brfx quantize --model resnet20 --ckpt 'my runs/a/last.pth' --data digits "
        "--image-size 16 --mean 0.5 --std 0.25 --bits 2"
    )


@pytest.mark.parametrize("settings", [{}, {"model": "mine.py:make"}, {"command": "train", "cifar_stem": True}])
@pytest.mark.parametrize("run", [RUN, replace(RUN, onnx=None)])
def test_every_command_is_one_that_there_is(run, settings):
    import shlex

    for line in next_commands(run, job(**settings)):
        _, name, *arguments = shlex.split(line)
        command = cli.commands[name]
        command.make_context(name, arguments, parent=cli.make_context("brfx", [name]))


def test_the_checkpoint_that_comes_next_is_the_one_that_was_kept(tmp_path):
    kept = JobConfig(command="train", model="resnet20", train=TrainConfig(epochs=2, keep="best"))
    assert "last.pth" in next_commands(replace(RUN, run_dir=tmp_path), kept)[2]  # there was no validation
    (tmp_path / "best.pth").write_bytes(b"")
    assert "best.pth" in next_commands(replace(RUN, run_dir=tmp_path), kept)[2]
    last = replace(kept, train=TrainConfig(epochs=2))
    assert "last.pth" in next_commands(replace(RUN, run_dir=tmp_path), last)[2]
