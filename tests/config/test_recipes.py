"""Settings from files: recipes, TOML and a run's config.json, and what wins over what."""

import json
from dataclasses import asdict

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import brfx
from brfx.config import JobConfig, QATConfig, TrainConfig
from brfx.config.recipes import Settings, read_recipe, read_settings, recipe_names, recipe_summary, recipe_text
from brfx.errors import ConfigError


def test_the_recipes():
    assert recipe_names() == ["accurate", "br-paper", "fast", "lsq-paper", "seed"]
    read = {name: read_recipe(name) for name in recipe_names()}
    assert {name: recipe.train["epochs"] for name, recipe in read.items()} == {
        "accurate": 100, "br-paper": 100, "fast": 10, "lsq-paper": 90, "seed": 100,
    }  # fmt: skip
    lsq, br, seed = read["lsq-paper"], read["br-paper"], read["seed"]
    assert (lsq.job["lambda_br"], lsq.job["lambda_br_act"], lsq.job["start"]) == (0, 0, "lsq")
    assert (lsq.train["lr"], lsq.train["weight_decay"], lsq.qat["first_last_8bit"]) == (0.01, 0.25e-4, True)
    assert (br.job["lambda_br"], br.job["lambda_br_act"], br.train["warmup_epochs"]) == (1, 0, 30)
    assert (seed.job["lambda_br"], seed.job["lambda_br_act"], seed.job["freeze_weight_alpha"]) == (1, 1, True)
    assert {recipe.qat["placement"] for recipe in (lsq, br, seed)} == {"paper"}
    with pytest.raises(ConfigError, match="no recipe is called 'best'; there are accurate, br-paper, fast"):
        read_recipe("best")


#: What a recipe leaves to the machine, to the data, or to another setting.
LEFT = {
    "job": {"command", "model", "task", "ckpt", "num_classes", "cifar_stem", "data", "data_dir", "download",
            "image_size", "mean", "std", "workers", "skip_bad_images", "qat", "train", "teacher", "output_dir",
            "tensorboard", "ckpt_key", "strict", "limit_batches", "resize", "stretch", "interpolation", "channel_order",
            "divisor", "crop", "flip", "class_weights", "bit_budget", "size_budget", "reconstruct"},
    "qat": {"weight_bits", "act_bits", "clip_value", "overrides", "skip"},
    "train": {"step_lr", "device", "compile", "precision", "channels_last", "clip_grad", "on_nonfinite",
              "checkpoint_minutes", "keep_checkpoints", "patience", "epoch_batches"},
}  # fmt: skip


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_complete(name):
    recipe = read_recipe(name)
    for place, kind in (("job", JobConfig), ("qat", QATConfig), ("train", TrainConfig)):
        assert set(getattr(recipe, place)) | LEFT[place] >= set(kind.__dataclass_fields__), place


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_begins_with_a_sentence_that_says_what_it_is(name):
    summary = recipe_summary(name)
    assert summary[0].isupper() and summary.endswith(".") and ". " not in summary
    assert recipe_text(name).startswith(f"# {summary}\n")
    assert max(map(len, recipe_names())) + 2 + len(summary) <= 80  # a line of `brfx recipes`


def test_a_recipe_is_a_config_to_begin_with(tmp_path):
    (tmp_path / "mine.toml").write_text(recipe_text("seed"))
    assert read_settings(tmp_path / "mine.toml") == read_recipe("seed")


def test_a_whole_run_in_toml(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        'model = "resnet20"\nckpt = "a/b.pth"\nlambda_br = 1\nmean = [0.5, 0.5, 0.5]\n[train]\nepochs = 7\n'
        '[qat]\nbits = 3\n[[qat.overrides]]\nmatch = "fc"\nfp32 = true\n'
    )
    found = read_settings(path)
    job = JobConfig(command="quantize", qat=QATConfig(**found.qat), train=TrainConfig(**found.train), **found.job)
    assert (job.model, str(job.ckpt), job.lambda_br, job.mean) == ("resnet20", "a/b.pth", 1, (0.5, 0.5, 0.5))
    assert job.train == TrainConfig(epochs=7) and job.qat == QATConfig(bits=3, skip=("fc",))


def test_the_quantizers_settings_may_stand_at_the_top(tmp_path):
    path = tmp_path / "qat.toml"
    path.write_text(
        'act_bits = 4\n[[overrides]]\nmatch = "conv1"\nbits = 8\n[[overrides]]\nmatch = "fc"\nfp32 = true\n'
    )
    found = read_settings(path)
    assert (found.job, found.train) == ({}, {})
    config = brfx.QATConfig(**found.qat)
    assert config == brfx.QATConfig(act_bits=4, overrides=[("conv1", {"bits": 8}), ("fc", None)])


def test_the_config_json_of_a_run_gives_its_settings_but_for_its_folder(tmp_path):
    job = JobConfig(
        command="quantize", model="resnet20", ckpt=tmp_path / "a.pth", mean=(0.1, 0.2, 0.3), download=True,
        qat=QATConfig(bits=3, overrides=[("fc", None), ("conv1", {"bits": 8})]), train=TrainConfig(epochs=7, lr=0.3),
        output_dir=tmp_path / "run",
    )  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps(
            asdict(job) | {"versions": {"brfx": "1"}, "command_line": ["brfx"], "machine": {"cores": 2}}, default=str
        )
    )
    found = read_settings(path)
    assert not {"output_dir", "download", "qat", "train"} & set(found.job)
    again = JobConfig(qat=QATConfig(**found.qat), train=TrainConfig(**found.train), **found.job)
    assert asdict(again) == asdict(job) | {"output_dir": None, "download": False}
    path.write_text(json.dumps({"train": {}}))
    with pytest.raises(ConfigError, match=r"config\.json: not the settings of a run"):
        read_settings(path)


@pytest.mark.parametrize(
    ("below", "above", "result"),
    [
        ({"qat": {"weight_bits": 2, "act_bits": 4}}, {"qat": {"bits": 8}}, {"qat": {"bits": 8}}),
        ({"qat": {"bits": 8}}, {"qat": {"act_bits": 4}}, {"qat": {"bits": 8, "act_bits": 4}}),
        ({"train": {"epochs": 100, "warmup_epochs": 30}}, {"train": {"epochs": 10}}, {"train": {"epochs": 10}}),
        ({"train": {"warmup_epochs": 30}}, {"train": {"epochs": 10}}, {"train": {"epochs": 10}}),
        ({"train": {"epochs": 90, "warmup_epochs": 0}}, {"train": {"epochs": 9}},
         {"train": {"epochs": 9, "warmup_epochs": 0}}),
        ({"train": {"lr": 0.1, "step_lr": 0.1}}, {"train": {"lr": 0.2}}, {"train": {"lr": 0.2}}),
        ({"train": {"lr": 0.1, "step_lr": 0.01}}, {"train": {"lr": 0.2}}, {"train": {"lr": 0.2, "step_lr": 0.01}}),
        ({"job": {"lambda_br": 1.0, "start": "lsq"}}, {"job": {"start": "mse"}},
         {"job": {"lambda_br": 1.0, "start": "mse"}}),
        ({"job": {"br_form": "mean", "lambda_br": 0.1, "lambda_br_act": 0.02}}, {"job": {"br_form": "per_value"}},
         {"job": {"br_form": "per_value", "lambda_br_act": 0.02}}),
        ({"job": {"br_form": "per_value", "lambda_br": 0.001, "lambda_br_act": 0.0}}, {"job": {"br_form": "mean"}},
         {"job": {"br_form": "mean"}}),
        ({"job": {"lambda_br": 0.1}}, {"job": {"br_form": "per_value", "lambda_br": 0.2}},
         {"job": {"br_form": "per_value", "lambda_br": 0.2}}),
    ],
)  # fmt: skip
def test_what_follows_from_another_setting_follows_the_one_above(below, above, result):
    assert Settings(**below).under(Settings(**above)) == Settings(**result)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bits = ", "cannot read it as TOML"),
        ("tooth = 1", "no setting is called 'tooth'"),
        ("[train]\nbits = 1", "no setting is called 'bits'; there are accumulate, channels_last"),
        ("[qat]\nlr = 1", "no setting is called 'lr'; there are act_bits"),
        ("bits = 2\n[qat]\nbits = 3", r"stand in a table \[qat\], or at the top"),
        ("train = 3", r"train=3: takes a table, \[train\]"),
        ("qat = 3", r"stand in a table \[qat\]"),
        ("[train]\nlr = -1", "lr=-1: takes a number above 0"),
        ("lambda_br = -1", "lambda_br=-1: takes 0 or more"),
        ("ckpt = 3", "ckpt=3: takes a pathlib.Path, or None"),
        ('teacher = "a=b"\n[train]\ndistill = 0', "--teacher says nothing at --distill 0"),
        ("overrides = 3", "tables with a match"),
        ("[[overrides]]\nbits = 3", "tables with a match"),
        ("[[overrides]]\nmatch = 3", "tables with a match"),
        ('[[overrides]]\nmatch = "fc"\nfp32 = "no"', "tables with a match"),
    ],
)
def test_wrong_toml(tmp_path, text, message):
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(brfx.BrfxError, match=message) as caught:
        read_settings(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    with pytest.raises(brfx.BrfxError, match="no such file"):
        read_settings(tmp_path / "absent.toml")


QAT = QATConfig()
TOML_RIGHT = [f"{name} = {json.dumps(value)}" for name, value in vars(QAT).items() if value is not None]
TOML_WRONG = [
    "bits",
    "[skip]",
    "bits = nan",
    "bits.a = 1979-05-27",
    "skip = [[]]",
    "skip = {}",
    "fp32 = 1",
    "match = 1",
    "[train]",
    "[qat]",
    "train.epochs = 1",
    "qat.bits = 3",
    "mean = [1]",
]
TOML_OVERRIDES = ["[[overrides]]", '[[overrides]]\nmatch = "fc"', "fp32 = true", '[overrides]\n"*" = 8']
TOML_LINES = st.sampled_from(TOML_RIGHT) | st.sampled_from(TOML_WRONG + TOML_OVERRIDES)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.lists(TOML_LINES, max_size=4).map("\n".join).map(str.encode) | st.text().map(str.encode) | st.binary())
@example(b"bits = 0x" + b"f" * 20_000)
@example(b"skip = " + b"[" * 5000)
@example(b"bits = " + b"9" * 20_000)
@example(b"bits" + b".a" * 2_000 + b" = 1")
def test_any_toml_is_settings_or_a_config_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.toml"
    path.write_bytes(content)
    try:
        found = read_settings(path)
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        QATConfig(**found.qat), TrainConfig(**found.train)
