"""Models of timm and Hugging Face, by name or folder: built, trained, exported, on the images that they want."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import brfx
from brfx.config import JobConfig, TrainConfig
from brfx.data import Preprocessing
from brfx.errors import CheckpointError, ConfigError
from brfx.hubs import HubSegmenter, hub_transform
from brfx.io.float_checkpoint import load_float
from brfx.jobs.data import own_preprocessing, read_data
from brfx.jobs.evaluate import evaluate_file
from brfx.jobs.inspect import dry_run
from brfx.jobs.job import quantize, train_float
from brfx.jobs.networks import with_checkpoint
from brfx.jobs.tasks import task_of

HALF = (0.5, 0.5, 0.5)


def folder_of(root, size=20):
    for part, each in (("train", 8), ("test", 4)):
        for number, name in enumerate(("cat", "dog")):
            (root / part / name).mkdir(parents=True)
            for i in range(each):
                Image.new("RGB", (size + i, size), (40 + 150 * number, 9 * i, 100)).save(
                    root / part / name / f"{i}.png"
                )
    return str(root)


def job_of(tmp_path, command, model, **settings):
    train = TrainConfig(epochs=1, warmup_epochs=0, compile="off", lr=0.01)
    common = {"data": folder_of(tmp_path / "data") if not (tmp_path / "data").exists() else str(tmp_path / "data")}
    return JobConfig(
        command=command,
        model=model,
        output_dir=tmp_path / command,
        batch_size=8,
        workers=0,
        train=train,
        **common,
        **settings,
    )


def test_a_name_of_timm_is_trained_quantized_exported_and_loaded(tmp_path):
    pytest.importorskip("timm", reason="its models come with it: pip install 'brfx[timm]'")
    job = job_of(tmp_path, "train", "timm/test_resnet", image_size=32)
    assert own_preprocessing(job) == Preprocessing(160, HALF, HALF, resize=168)
    assert read_data(job).preprocessing == Preprocessing(32, HALF, HALF, resize=34)
    train_float(job)
    run = quantize(replace(job, command="quantize", ckpt=tmp_path / "train" / "best.pth", output_dir=tmp_path / "q"))
    assert run.onnx_problem is None and run.test.count == 8
    loaded = brfx.load(tmp_path / "q" / "model.pt")
    assert loaded(torch.zeros(2, 3, 32, 32)).shape == (2, 2)
    with pytest.raises(ConfigError, match="timm has no model 'test_resnit': did you mean timm/test_resnet"):
        brfx.build_model("timm/test_resnit")


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="its models come with it: pip install 'brfx[hf]'")


def save_classifier(transformers, folder, classes=2):
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=classes
    )
    transformers.ResNetForImageClassification(config).save_pretrained(folder)
    transformers.ConvNextImageProcessor(size={"shortest_edge": 28}).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")
def test_a_classifier_of_hugging_face_is_evaluated_as_there_then_trained_and_exported(tmp_path, transformers, caplog):
    folder = save_classifier(transformers, tmp_path / "hf")
    job = job_of(tmp_path, "evaluate", f"hf/{folder}")
    caplog.set_level(logging.INFO, "brfx")
    _, found = evaluate_file(job)
    assert f"Starting from {folder}/model.safetensors" in caplog.messages
    assert read_data(job).preprocessing == Preprocessing(28, HALF, HALF, resize=32, interpolation="bicubic")
    theirs = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    correct = 0
    for path in sorted((tmp_path / "data" / "test").rglob("*.png")):
        best = theirs(**processor(Image.open(path), return_tensors="pt")).logits.argmax().item()
        correct += ("cat", "dog")[best] == path.parent.name
    assert (found.correct, found.count) == (correct, 8)

    assert dry_run(replace(job, command="quantize")).layers
    run = quantize(replace(job, command="quantize", output_dir=tmp_path / "q"))
    assert run.onnx_problem is None and run.onnx.reference_difference == 0
    assert brfx.load(tmp_path / "q" / "model.pt")(torch.zeros(2, 3, 28, 28)).shape == (2, 2)


@pytest.mark.filterwarnings("ignore")
def test_a_classifier_of_other_classes_is_fine_tuned(tmp_path, transformers, caplog):
    folder = save_classifier(transformers, tmp_path / "hf", classes=5)
    job = job_of(tmp_path, "train", f"hf/{folder}")
    caplog.set_level(logging.INFO, "brfx")
    with pytest.raises(CheckpointError, match=r"its model.classifier.1 has 5 classes, 2 are wanted"):
        evaluate_file(job)
    train_float(job)
    assert f"{folder}/model.safetensors: model.classifier.1 made anew, from 5 to 2 classes" in caplog.messages
    _, found = evaluate_file(replace(job, ckpt=tmp_path / "train" / "best.pth"))
    assert found.count == 8


@pytest.mark.filterwarnings("ignore")
def test_a_segmenter_of_hugging_face_gives_logits_of_each_pixel_and_is_saved_and_loaded(tmp_path, transformers):
    config = transformers.SegformerConfig(
        depths=[1] * 4, hidden_sizes=[8, 8, 16, 16], decoder_hidden_size=8, num_attention_heads=[1] * 4, num_labels=3
    )
    torch.manual_seed(0)
    model = transformers.SegformerForSemanticSegmentation(config).eval()
    model.save_pretrained(tmp_path / "hf")  # under the names of older files
    transformers.SegformerImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "hf")
    job = JobConfig(command="train", model=f"hf/{tmp_path}/hf")
    assert task_of(job).model == "segmenter"
    assert own_preprocessing(job) == Preprocessing(32, stretch=True)
    ours = brfx.build_model(job.model).eval()
    load_float(ours, tmp_path / "hf" / "model.safetensors")
    images = torch.randn(2, 3, 32, 32)
    coarse = model(images).logits
    assert coarse.shape == (2, 3, 8, 8)
    fine = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear", align_corners=False)
    torch.testing.assert_close(ours(images), fine)
    qmodel = brfx.prepare_qat(brfx.build_model(job.model), brfx.QATConfig(bits=4), images)
    brfx.calibrate(qmodel, [images])
    brfx.save(qmodel, tmp_path / "model.pt")
    assert torch.equal(brfx.load(tmp_path / "model.pt")(images), qmodel.eval()(images))
    fresh = HubSegmenter(transformers.SegformerForSemanticSegmentation(config))
    with pytest.raises(ConfigError, match=r"HubSegmenter: its first call registers hooks, .*stages.0: call the model"):
        brfx.load(tmp_path / "model.pt", model=fresh)
    fresh(images)
    assert torch.equal(brfx.load(tmp_path / "model.pt", model=fresh)(images), qmodel(images))


@pytest.mark.filterwarnings("ignore")
def test_weights_that_lack_something_are_refused(tmp_path, transformers):
    folder = save_classifier(transformers, tmp_path / "hf")
    state = load_file(folder / "model.safetensors")
    save_file({key: value for key, value in state.items() if "classifier" not in key}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"its weights lack classifier.1.bias, classifier.1.weight: fine-tune it"):
        load_float(brfx.build_model(f"hf/{folder}"), folder / "model.safetensors")


@pytest.mark.filterwarnings("ignore")
def test_weights_in_several_files_are_read_and_their_network_is_the_same(tmp_path, transformers, caplog):
    one, several = save_classifier(transformers, tmp_path / "one"), tmp_path / "several"
    transformers.AutoModelForImageClassification.from_pretrained(one).save_pretrained(several, max_shard_size="3KB")
    assert len(list(several.glob("model-*.safetensors"))) > 1
    caplog.set_level(logging.INFO, "brfx")
    job = with_checkpoint(job_of(tmp_path, "train", f"hf/{several}"))
    assert caplog.messages == [f"Starting from {several}/model.safetensors.index.json"]
    image, outputs = torch.rand(1, 3, 28, 28), []
    for folder, ckpt in ((one, one / "model.safetensors"), (several, job.ckpt)):
        model = brfx.build_model(f"hf/{folder}")
        load_float(model, ckpt)
        outputs.append(model.eval()(image))
    assert torch.equal(*outputs)


def test_what_is_no_such_model_is_named(tmp_path, transformers, monkeypatch):
    with pytest.raises(ConfigError, match=r"there is no /nowhere/config.json: give the folder that save_pretrained"):
        brfx.build_model("hf//nowhere")
    bert = transformers.BertConfig(architectures=["BertForMaskedLM"])
    bert.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"config.json has BertForMaskedLM: takes an image classifier or a segmenter"):
        brfx.build_model(f"hf/{tmp_path}")
    assert hub_transform(f"hf/{tmp_path}") is None
    (tmp_path / "code.py").write_text("raise SystemExit('its code was run')\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever is asked says yes
    code = {"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(code))
    with pytest.raises(ConfigError, match=r"config.json: transformers cannot read it \(.* custom code"):
        brfx.build_model(f"hf/{tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard of"}))
    with pytest.raises(ConfigError, match=r"config.json: transformers cannot read it"):
        brfx.build_model(f"hf/{tmp_path}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("ViTImageProcessor", {}, Preprocessing(224, HALF, HALF, stretch=True)),
        (
            "MobileViTImageProcessor",
            {"size": {"shortest_edge": 288}},
            Preprocessing(256, (0.0,) * 3, (1.0,) * 3, resize=288, interpolation="bicubic", channel_order="bgr"),
        ),
        ("DeiTImageProcessor", {}, Preprocessing(224, HALF, HALF, resize=256, stretch=True, interpolation="bicubic")),
        ("ConvNextImageProcessor", {}, Preprocessing(384, HALF, HALF, stretch=True, interpolation="bicubic")),
        ("MobileNetV2ImageProcessor", {}, Preprocessing(224, HALF, HALF, resize=256)),
        ("EfficientNetImageProcessor", {"resample": 2}, Preprocessing(346, HALF, (0.25,) * 3, stretch=True)),
    ],
)
def test_a_transform_does_what_the_folders_image_processor_does(
    tmp_path, transformers, caplog, kind, settings, expected
):
    getattr(transformers, kind)(**settings).save_pretrained(tmp_path)
    assert Preprocessing.from_dict(hub_transform(f"hf/{tmp_path}")) == expected
    assert not caplog.records  # its output was compared


@pytest.mark.filterwarnings("ignore")
def test_a_processor_that_does_what_no_setting_says_is_told(tmp_path, transformers, caplog):
    transformers.LevitImageProcessor().save_pretrained(tmp_path)  # resizes to 256 where it says 224
    hub_transform(f"hf/{tmp_path}")
    assert "its LevitImageProcessor does more than its settings say; images are read as 3x224x224" in caplog.text
