"""What images go through before a model: set once, written into every file, and read back by whatever needs it."""

import json
import logging
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import brfx
from brfx.config import JobConfig, TrainConfig
from brfx.data import Preprocessing
from brfx.errors import ConfigError, DataError, ExportError
from brfx.export.reading import preprocessing_of
from brfx.jobs.data import data_line, own_preprocessing, read_data
from brfx.jobs.evaluate import evaluate_file
from brfx.jobs.files import benchmark_files, export_file, verify_files
from brfx.jobs.inspect import dry_run
from brfx.jobs.job import quantize, train_float
from brfx.metadata import metadata_of

PAGE = Path(__file__).parents[2] / "docs" / "export.md"

NET = """
from torch import nn

def net(num_classes=3):
    return nn.Sequential(
        nn.Conv2d(CHANNELS, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, num_classes),
    )
"""

TRANSFORM = {
    "image_size": 14,
    "resize": 18,
    "interpolation": "bicubic",
    "channel_order": "bgr",
    "divisor": 127.5,
    "mean": (1.0, 0.9, 0.8),
    "std": (0.5, 0.6, 0.7),
}


def pictures(root: Path) -> Path:
    """Pictures of three colours and of any shape, some of them lying on their side, some grey or with alpha."""
    generator = np.random.default_rng(0)
    for part, each in (("train", 20), ("test", 12)):
        for number, name in enumerate(("blue", "green", "red")):
            (root / part / name).mkdir(parents=True)
            for i in range(each):
                height, width = generator.integers(15, 40, 2)
                values = generator.integers(0, 150, (height, width, 3), dtype=np.uint8)
                values[..., 2 - number] += 40
                image = Image.fromarray(values)
                exif = Image.Exif()
                if i % 3 == 0:
                    exif[0x0112] = 6
                image = {0: image, 1: image.convert("L"), 2: image.convert("RGBA")}.get(i, image)
                image.save(root / part / name / f"{i:02}.png", exif=exif)
    return root


def job_of(folder, name, channels=3, **settings):
    (folder / "net.py").write_text(NET.replace("CHANNELS", str(channels)))
    common = {"model": f"{folder}/net.py:net", "data": str(folder / "data"), "batch_size": 8, "workers": 0}
    train = TrainConfig(epochs=2, warmup_epochs=0, compile="off", lr=0.05)
    return JobConfig(command=name, output_dir=folder / name, train=train, **common | settings)


@pytest.mark.parametrize(("channels", "more"), [(3, {}), (3, {"stretch": True}), (1, {"mean": (0.9,), "std": (0.4,)})])
def test_a_file_counts_as_many_right_in_plain_onnxruntime_as_here(tmp_path, channels, more):
    pytest.importorskip("onnxruntime", reason="the snippet runs in it: pip install 'brfx[onnx]'")
    pictures(tmp_path / "data")
    job = job_of(tmp_path, "train", channels, **TRANSFORM | more)
    train_float(job)
    run = quantize(replace(job, command="quantize", ckpt=tmp_path / "train" / "best.pth", output_dir=tmp_path / "q"))
    snippet = re.search("plain: begin -->\n```py\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    assert "brfx" not in snippet and "torch" not in snippet
    script = tmp_path / "plain.py"
    script.write_text(snippet + "\nnp.save(sys.argv[3], np.concatenate([pixels(f) for f in files]))\n")
    arguments = [tmp_path / "q" / "model.onnx", tmp_path / "data" / "test", tmp_path / "seen.npy"]
    told = subprocess.run([sys.executable, script, *arguments], check=True, capture_output=True, text=True).stdout
    assert told == f"{run.test.correct} of {run.test.count}\n"
    data = read_data(job)
    assert torch.equal(torch.from_numpy(np.load(tmp_path / "seen.npy")), data.preprocessing.normalize(data.test.images))


def test_the_transform_is_in_every_file_and_read_back(tmp_path, caplog):
    pictures(tmp_path / "data")
    job = job_of(tmp_path, "train", **TRANSFORM)
    wanted = Preprocessing(**TRANSFORM)
    caplog.set_level(logging.INFO, "brfx")
    baseline = train_float(job)
    images = "54 train, 6 val, 36 test images of 3 classes (blue, green, red)"
    assert caplog.messages[0] == f"{tmp_path}/data: {images}, {wanted}, augmentation shift, flip"
    assert str(wanted).startswith(
        "3x14x14 (shorter side to 18, bicubic, the centre, BGR, divided by 127.5, mean 1,0.9,"
    )
    content = torch.load(tmp_path / "train" / "best.pth", weights_only=True)
    assert content["preprocessing"] == wanted.as_dict() and content["classes"] == ["blue", "green", "red"]

    # nothing is said of the transform any more
    bare = job_of(tmp_path, "evaluate", ckpt=tmp_path / "train" / "best.pth")
    kind, found = evaluate_file(bare)
    assert (kind, found.correct, found.count) == ("FP32", baseline.test.correct, 36)
    assert found.loss == pytest.approx(baseline.test.loss, rel=1e-5)
    run = quantize(replace(bare, command="quantize", output_dir=tmp_path / "q", lambda_br_act=0.0))
    assert run.test_float.correct == baseline.test.correct
    model = tmp_path / "q" / "model.pt"
    source = brfx.build_model(bare.model, 3)
    assert metadata_of(brfx.load(model, source)).preprocessing == wanted
    assert evaluate_file(replace(bare, ckpt=model))[1].correct == run.test.correct
    for path, read in {
        "a.safetensors": lambda path: json.loads(safe_open(path, "pt").metadata()["brfx"]),
        "a.pt2": _of_pt2,
    }.items():
        export_file(model, tmp_path / path, bare.model)
        assert Preprocessing.from_dict(read(tmp_path / path)["preprocessing"]) == wanted

    caplog.clear()
    evaluate_file(replace(bare, mean=(0.5, 0.5, 0.5)))
    other = replace(wanted, mean=(0.5, 0.5, 0.5))
    assert caplog.messages[0] == f"{bare.ckpt} was trained on images of {wanted}, and sees {other}"
    caplog.clear()
    evaluate_file(replace(bare, ckpt=model, mean=(0.5, 0.5, 0.5)))
    assert f"{model} was trained on images of {wanted}, and sees {other}" in caplog.messages
    caplog.clear()
    taught = {"teacher": f"{bare.model}={bare.ckpt}", "train": replace(bare.train, epochs=0, distill=0.5)}
    quantize(replace(bare, command="quantize", output_dir=tmp_path / "t", interpolation="nearest", **taught))
    assert sum("best.pth was trained on images of" in line for line in caplog.messages) == 2
    (tmp_path / "data" / "test" / "red").rename(tmp_path / "data" / "test" / "rose")
    (tmp_path / "data" / "train" / "red").rename(tmp_path / "data" / "train" / "rose")
    assert dry_run(replace(bare, command="quantize")).layers
    assert f"{bare.ckpt} knows other classes (blue, green, red ...), whose outputs it begins with" in caplog.messages
    with pytest.raises(DataError, match=r"best.pth knows 3 classes \(blue, green, red ...\), the data has 3"):
        evaluate_file(bare)


def _of_pt2(path):
    files = {"brfx.json": ""}
    torch.export.load(path, extra_files=files)
    return json.loads(files["brfx.json"])


def test_verify_and_benchmark_go_by_the_files(tmp_path):
    pytest.importorskip("onnxruntime", reason="the files run in it: pip install 'brfx[onnx]'")
    pictures(tmp_path / "data")
    job = job_of(tmp_path, "train", **TRANSFORM)
    train_float(job)
    start = {"ckpt": tmp_path / "train" / "best.pth", "command": "quantize"}
    runs = [
        quantize(replace(job, output_dir=tmp_path / name, train=replace(job.train, epochs=0), **start, **settings))
        for name, settings in {"a": {}, "b": {}, "other": {"resize": 20}}.items()
    ]
    files = [run.run_dir / "model.onnx" for run in runs]
    assert preprocessing_of(files[0]) == Preprocessing(**TRANSFORM)
    same = verify_files(files[0], files[1], data=job.data)
    assert same.bit_for_bit and same.accuracy == (runs[0].test.accuracy,) * 2
    assert verify_files(files[0], files[1]).images == 64
    with pytest.raises(ExportError, match=r"to 18, .*to 20, .*: these are not files of one model"):
        verify_files(files[0], files[2])
    import onnxruntime

    seen = []
    run = onnxruntime.InferenceSession.run

    class Watched(onnxruntime.InferenceSession):
        def run(self, names, feeds):
            seen.extend(value.shape for value in feeds.values())
            return run(self, names, feeds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "InferenceSession", Watched)
        benchmark_files([files[0]], 2, 1, 1, None)
    assert set(seen) == {(2, 3, 14, 14)}


def test_settings_of_a_picture_are_checked():
    for settings, message in [
        ({"image_size": 20, "resize": 10}, r"--resize 10 leaves no square of 20 pixels to cut out: give 20 or more"),
        ({"image_size": 20, "interpolation": "cubic"}, "interpolation='cubic': takes bilinear, bicubic"),
        ({"image_size": 20, "channel_order": "gbr"}, "channel_order='gbr': takes rgb, bgr"),
        ({"image_size": 20, "divisor": 0.0}, r"divisor=0.0, .*takes numbers above 0"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Preprocessing(**settings)
    with pytest.raises(ConfigError, match="knows no setting 'gamma'"):
        Preprocessing.from_dict(Preprocessing(8).as_dict() | {"gamma": 2})
    for name, value in [("interpolation", "cubic"), ("channel_order", "gbr"), ("divisor", 0.0), ("resize", 0)]:
        with pytest.raises(ConfigError, match=f"{name}="):
            JobConfig(command="train", **{name: value})


def test_published_weights_come_with_their_transform(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def of(model, file):
        return own_preprocessing(JobConfig(command="train", model=model, ckpt=file and Path(file)))

    assert of("resnet50", "resnet50-11ad3fa6.pth") == Preprocessing(224, resize=232)
    assert of("resnet50", "resnet50-0676ba61.pth") == Preprocessing(224, resize=256)
    assert of("resnet50", "mine.pth") == of("resnet50", None) == Preprocessing(224)
    assert of("swin_t", "swin_t-704ceda3.pth") == Preprocessing(224, resize=232, interpolation="bicubic")
    half = (0.5, 0.5, 0.5)  # it is torchvision that turns Inception's own normalization on
    assert of("inception_v3", "inception_v3_google-0cc3c7bd.pth") == Preprocessing(299, half, half, resize=342)
    assert of("lraspp_mobilenet_v3_large", None) == Preprocessing(224, stretch=True)
    assert of("resnet20", None) == Preprocessing(32)


def test_a_line_says_what_a_run_trains_on(digits):
    common = {"command": "train", "model": "resnet20", "data": "digits"}
    job = JobConfig(**common, batch_size=10, limit_batches=2, mixup=0.2)
    assert data_line(job, digits) == (
        "digits: 20 train, 20 val, 20 test images of 10 classes (0, 1, 2, 3 ...), 3x16x16 (shorter side to 16, "
        "bilinear, the centre, mean 0.5,0.5,0.5, std 0.5,0.5,0.5), augmentation shift, mixup 0.2"
    )
