"""From what is typed to settings: flags over --config over --recipe over defaults."""

import json
from dataclasses import asdict

import click
import pytest
from brfx_cli.main import cli

from brfx.config import DATA_DIR, Augmentation, QATConfig, TrainConfig
from brfx.errors import ConfigError
from brfx.jobs import inspect as inspect_job
from brfx.jobs import job as jobs


class Reached(Exception):
    """The library was called."""


@pytest.fixture
def job_of(monkeypatch, capsys):
    """The settings that a command line gives the library."""

    def run(command, *arguments):
        found = []

        def call(job, *rest, **options):
            found.append(job)
            raise Reached

        home = inspect_job if command == "sensitivity" else jobs
        monkeypatch.setattr(home, {"train": "train_float"}.get(command, command), call)
        with pytest.raises(Reached):
            cli([command, *map(str, arguments)], standalone_mode=False)
        return found[0]

    return run


def test_defaults_are_those_of_the_fields(job_of):
    job = job_of("quantize")
    assert asdict(job) == asdict(type(job)(command="quantize", qat=QATConfig(weight_grid="symmetric")))
    job = job_of("quantize", "--qat-epochs", 10, "--lr", 0.5)
    assert job.train == TrainConfig(epochs=10, lr=0.5) and (job.train.warmup_epochs, job.train.step_lr) == (3, 0.5)
    assert job_of("train").train.keep == "best" and job.train.keep == "last"


def test_what_images_go_through_and_how_they_are_varied_is_a_setting_each(job_of):
    images = {"image_size": 20, "resize": 24, "interpolation": "bicubic", "channel_order": "bgr", "divisor": 127.5}
    job = job_of("train", *_flags(images), "--stretch", "--mean", "1,2,3", "--std", "0.5,1,1")
    assert {name: getattr(job, name) for name in images} == images
    assert (job.stretch, job.mean, job.std) == (True, (1.0, 2.0, 3.0), (0.5, 1.0, 1.0))
    varied = {"crop": "none", "rand_augment": 9, "mixup": 0.2, "cutmix": 1.0, "erasing": 0.25, "class_weights": "1,4"}
    for command in ("train", "quantize"):
        job = job_of(command, *_flags(varied), "--no-flip", "--no-stretch")
        assert {name: getattr(job, name) for name in varied} == varied
        assert (job.flip, job.stretch) == (False, False)
    assert job_of("train").augmentation("shift", flip=True) == Augmentation()
    assert job.augmentation("shift", flip=True) == Augmentation(
        crop="none", flip=False, rand_augment=9, mixup=0.2, cutmix=1.0, erasing=0.25
    )


def _flags(settings):
    return [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", value)]


def test_flags_win_over_the_config_and_that_over_the_recipe(job_of, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('model = "resnet20"\nlambda_br = 3.0\n[train]\nlr = 0.3\nmomentum = 0.5\n[qat]\nact_bits = 4\n')
    job = job_of("quantize", "--recipe", "seed", "--config", path, "--lr", 0.7, "--keep", "last", "--clip-value", "6")
    assert (job.lambda_br_act, job.train.seed, job.batch_size, job.qat.weight_bits) == (1.0, 42, 128, 2)  # the recipe's
    assert (job.model, job.lambda_br, job.train.momentum, job.qat.act_bits) == ("resnet20", 3.0, 0.5, 4)  # the file's
    assert (job.train.lr, job.train.step_lr, job.qat.clip_value) == (0.7, 0.7, 6.0)  # the flags'
    assert job.freeze_weight_alpha and job.freeze_act_alpha
    assert job_of("quantize", "--recipe", "fast", "--freeze-alpha").freeze_act_alpha
    job = job_of("quantize", "--config", path, "--bits", 3)
    assert (job.qat.weight_bits, job.qat.act_bits) == (3, 3)


def test_a_default_that_is_typed_wins_too(job_of):
    """64 is the flag's default: only that it was typed tells it from one that was not."""
    assert job_of("quantize", "--recipe", "seed", "--batch-size", 64).batch_size == 64


def test_a_runs_config_json_begins_a_new_run(job_of, tmp_path):
    first = job_of("quantize", "--recipe", "lsq-paper", "--model", "resnet20", "--ckpt", "a.pth", "--output-dir", "x")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(asdict(first) | {"versions": {"brfx": "1"}}, default=str))
    again = job_of("quantize", "--config", path, "--output-dir", "new")
    assert asdict(again) == asdict(first) | {"output_dir": again.output_dir} and str(again.output_dir) == "new"
    shorter = job_of("quantize", "--config", path, "--qat-epochs", 9).train
    assert (shorter.epochs, shorter.warmup_epochs, shorter.lr) == (9, 0, 0.01)
    for change, arguments, message in [
        ({"command": "train"}, (), "is of `brfx train`, not of `brfx quantize`"),
        ({}, ("--recipe", "fast"), "so --recipe fast would change none"),
        ({"model": "evil.py:make"}, (), "its model is code, which runs only if you name it: --model evil.py:make"),
        ({"teacher": "evil.py:make=b.pth", "train": {"distill": 1}}, (), "its teacher is code"),
    ]:
        path.write_text(json.dumps(asdict(first) | change, default=str))
        with pytest.raises(ConfigError, match=message):
            cli(["quantize", "--config", str(path), *arguments], standalone_mode=False)


def test_lambdas_of_a_runs_config_json_follow_another_form(job_of, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(asdict(job_of("quantize", "--lambda-br-act", 0.5)), default=str))
    job = job_of("quantize", "--config", path, "--br-form", "per_value")
    assert (job.lambda_br, job.lambda_br_act) == (0.001, 0.5)


def test_a_run_is_resumed_with_its_own_model(job_of, tmp_path):
    first = job_of("quantize", "--model", "resnet20", "--ckpt", "a.pth")
    (tmp_path / "config.json").write_text(json.dumps(asdict(first), default=str))
    resume = ("quantize", "--resume", tmp_path)
    assert job_of(*resume).model == job_of(*resume, "--model", "resnet20").model == "resnet20"
    assert str(job_of(*resume, "--ckpt", "b.pth").ckpt) == "b.pth"
    for other in ("resnet32", "mine.py:make"):
        with pytest.raises(ConfigError, match="was begun with --model resnet20, so resume it with that"):
            cli([*map(str, resume), "--model", other], standalone_mode=False)


def test_a_teacher_has_a_share_of_its_own(job_of):
    named = ("quantize", "--teacher", "resnet56=big.pth")
    assert (job_of(*named).train.distill, job_of(*named, "--distill", 0.2).train.distill) == (0.5, 0.2)
    assert job_of(*named, "--recipe", "fast").train.distill == 0.5  # which has 0, and no teacher
    for arguments, message in [
        ((*named, "--distill", "0"), "--teacher says nothing at --distill 0"),
        (("quantize", "--teacher", "resnet56"), "--teacher 'resnet56': takes NAME=FILE"),
        (("quantize", "--teacher", "=a.pth"), "takes NAME=FILE"),
    ]:
        with pytest.raises(ConfigError, match=message):
            cli(list(arguments), standalone_mode=False)


def test_recipes_are_listed_and_printed(capsys):
    cli(["recipes"], standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["accurate", "br-paper", "fast", "lsq-paper", "seed"]
    assert lines[2] == "fast       Ten epochs with brfx's own settings, to try a network first."
    cli(["recipes", "lsq-paper"], standalone_mode=False)
    assert "\nlr = 0.01\n" in capsys.readouterr().out


def test_methods_of_quantization_are_flags_and_settings_of_a_file(job_of, tmp_path):
    job = job_of("quantize", "--act-quantizer", "pact", "--weight-quantizer", "dorefa", "--weight-grid", "symmetric")
    assert (job.qat.act_quantizer, job.qat.weight_quantizer, job.qat.weight_grid) == ("pact", "dorefa", "symmetric")
    path = tmp_path / "mine.toml"
    path.write_text('[qat]\nact_quantizer = "pact"\n[[qat.overrides]]\nmatch = "fc"\nweight_quantizer = "dorefa"\n')
    job = job_of("quantize", "--config", path)
    assert (job.qat.act_quantizer, job.qat.overrides) == ("pact", (("fc", {"weight_quantizer": "dorefa"}),))
    assert any("alpha learned (PACT)" in line for line in jobs.banner(job))
    with pytest.raises(ConfigError, match="act_quantizer='log2': takes 'lsq' or"):
        path.write_text('[qat]\nact_quantizer = "log2"\n')
        job_of("quantize", "--config", path)


def test_weights_of_2_bits_are_symmetric_unless_something_else_is_said(job_of, tmp_path):
    def grid(*flags):
        return job_of("quantize", *flags).qat.weight_grid

    assert grid() == grid("--weight-bits", 2, "--act-bits", 4) == grid("--recipe", "fast") == "symmetric"
    assert grid("--bits", 3) == grid("--bits", 8, "--recipe", "fast") == grid("--placement", "paper") == "signed"
    assert grid("--weight-grid", "signed") == grid("--recipe", "seed") == "signed"
    path = tmp_path / "mine.toml"
    path.write_text('[[overrides]]\nmatch = "fc"\nbits = 8\n[[overrides]]\nmatch = "conv1"\nfp32 = true\n')
    qat = job_of("quantize", "--config", path).qat
    assert qat.weight_grid == "symmetric"
    assert qat.overrides == (("fc", {"weight_grid": "signed", "bits": 8}), ("conv1", None))
    assert QATConfig().weight_grid == "signed"  # the library's own default


def test_kurtosis_regularization_is_a_flag_and_off_by_default(job_of):
    assert job_of("quantize").lambda_kurtosis == 0
    job = job_of("quantize", "--lambda-kurtosis", "0.5", "--qat-epochs", 5)
    assert job.lambda_kurtosis == 0.5 and jobs.banner(job)[0].endswith("BR lambda 0.1, kurtosis lambda 0.5")
    with pytest.raises(ConfigError, match=r"--lambda-kurtosis -1\.0: takes 0 or more"):
        job_of("quantize", "--lambda-kurtosis", "-1")


def test_every_command_looks_for_named_data_in_the_same_folder():
    folders = {
        name: option.default
        for name, command in cli.commands.items()
        for option in command.params
        if option.name == "data_dir"
    }
    assert set(folders) >= {"train", "quantize", "evaluate", "verify"}
    assert set(folders.values()) == {DATA_DIR}


def test_a_budget_is_given_in_bits_or_bytes_and_a_flags_wins_over_a_files(job_of, tmp_path):
    sizes = {
        "400kB": 400_000,
        "0.5 kB": 500,
        "1.5MB": 1_500_000,
        "1.001MB": 1_001_000,
        "98304": 98_304,
        "98304B": 98_304,
    }
    assert {given: job_of("quantize", "--size-budget", given).size_budget for given in sizes} == sizes
    with pytest.raises(click.BadParameter, match="a number of bytes, such as 400kB"):
        cli(["quantize", "--size-budget", "400kb/s"], standalone_mode=False)
    path = tmp_path / "mine.toml"
    path.write_text("bit_budget = 3\n")
    assert job_of("sensitivity", "--config", path).bit_budget == 3
    job = job_of("quantize", "--config", path, "--size-budget", "1MB")
    assert (job.bit_budget, job.size_budget) == (None, 1_000_000)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--bits", 9), "--bits 9: takes 1 to 8, or 32 to stay in FP32"),
        (("--lambda-br", -1), r"--lambda-br -1\.0: "),
        (("--qat-epochs", -1), "--qat-epochs -1: "),
        (("--weight-bits", 0), "--weight-bits 0: "),
    ],
)
def test_a_wrong_value_is_named_by_its_flag(arguments, line):
    with pytest.raises(ConfigError, match=f"^{line}"):
        cli(["quantize", *map(str, arguments)], standalone_mode=False)


def test_a_wrong_value_of_a_file_is_named_as_there(tmp_path):
    (tmp_path / "q.toml").write_text("bits = 9\n")
    with pytest.raises(ConfigError, match="bits=9: takes 1 to 8"):
        cli(["quantize", "--config", str(tmp_path / "q.toml")], standalone_mode=False)
