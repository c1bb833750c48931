"""Damaged, arbitrary and hostile checkpoints and settings: one error refuses them, and no code of theirs runs."""

import hashlib
import json
import logging
import os
import pickle
import random
import shutil
import signal
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from brfx.config import JobConfig, read_job_config
from brfx.errors import BrfxError, CheckpointError, ConfigError, Interrupted
from brfx.train import Callback
from brfx.train.checkpoint import read_checkpoint, write_checkpoint

from .helpers import WORKER, digest, fingerprint
from .worker import SHORT, train


class StopAt(Callback):
    """SIGTERM to this process at a batch of an epoch."""

    def __init__(self, epoch, batch):
        self.at = (epoch, batch)

    def on_batch(self, progress):
        if (progress.epoch, progress.batch) == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def interrupted(digits, tmp_path_factory):
    """A run of two epochs that was stopped in the middle of the second."""
    run_dir = tmp_path_factory.mktemp("interrupted") / "run"
    with pytest.raises(Interrupted, match="epoch 2, batch 10; go on with --resume"):
        train(run_dir, digits, SHORT, [StopAt(2, 10)])
    assert len(list(run_dir.glob("checkpoints/*.ckpt"))) == 3
    return run_dir


@pytest.fixture
def run_dir(interrupted, tmp_path):
    return Path(shutil.copytree(interrupted, tmp_path / "run"))


def flat(value):
    """Plain data with the hash in place of every tensor."""
    if isinstance(value, torch.Tensor):
        return digest(value)
    if isinstance(value, dict):
        return {key: flat(each) for key, each in value.items()}
    return type(value)(map(flat, value)) if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("count", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_truncated_anywhere_or_with_a_flipped_bit(interrupted, tmp_path, count):
    content = max(interrupted.glob("checkpoints/*.ckpt")).read_bytes()
    path, draw = tmp_path / "damaged.ckpt", random.Random(count)
    path.write_bytes(content)
    assert flat(read_checkpoint(path))["epoch"] == 2
    header = range(8 * 83)  # as likely to be hit as all the rest
    for number in range(count):
        path.write_bytes(content[: draw.randrange(len(content))])
        with pytest.raises(CheckpointError, match=r"damaged"):
            read_checkpoint(path)
        bit = draw.choice(header) if number % 2 else draw.randrange(8 * len(content))
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=r"damaged"):
            read_checkpoint(path)


@pytest.mark.parametrize("damaged", [1, 2])
def test_the_checkpoint_before_a_damaged_one_takes_its_place(digits, short, run_dir, caplog, damaged):
    newest = sorted(run_dir.glob("checkpoints/*.ckpt"), reverse=True)
    for path in newest[:damaged]:
        os.truncate(path, path.stat().st_size // 2)
    with caplog.at_level(logging.INFO, "brfx"):
        train(run_dir, digits, SHORT)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [
        f"{path}: truncated or damaged, its checksum differs; trying the one before" for path in newest[:damaged]
    ]
    assert f"Resumed at epoch 2, batch {10 - damaged} of 20" in caplog.text
    assert fingerprint(run_dir) == short


def test_all_damaged_is_one_error(digits, run_dir):
    for path in run_dir.glob("checkpoints/*.ckpt"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of 3 checkpoints is whole; start the run anew"):
        train(run_dir, digits, SHORT)


def test_a_checkpoint_of_another_model_or_with_something_missing(digits, run_dir):
    newest = max(run_dir.glob("checkpoints/*.ckpt"))
    state = read_checkpoint(newest)
    for name in state:
        for instead in ({}, {name: None}, {name: "x"}, {name: [-1]}):
            write_checkpoint(newest, {key: value for key, value in state.items() if key != name} | instead)
            try:
                train(run_dir, digits, SHORT, [StopAt(2, 20)])
            except (CheckpointError, ConfigError, Interrupted) as error:
                assert "\n" not in str(error)


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FUZZ = settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(content=st.binary(max_size=300), checked=st.booleans())
def test_arbitrary_bytes_are_no_checkpoint(tmp_path, content, checked):
    path = tmp_path / "any.ckpt"
    header = b"brfx checkpoint 1 " + hashlib.sha256(content).hexdigest().encode() + b"\n"
    path.write_bytes(header + content if checked else content)
    with pytest.raises(CheckpointError):
        read_checkpoint(path)


@FUZZ
@given(content=ANY | st.binary(max_size=50))
def test_arbitrary_settings_are_a_config_error(tmp_path, content):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ConfigError):
        read_job_config(tmp_path)


FIELDS = [(), *((name,) for name in asdict(JobConfig(command="train")))]
FIELDS += [(group, name) for group in ("qat", "train") for name in asdict(JobConfig(command="train"))[group]]


@FUZZ
@given(at=st.sampled_from(FIELDS), value=ANY | st.sampled_from([1e999, 10**400, "~nobody-of-this-name", "\0"]))
def test_settings_with_one_changed_are_settings_or_a_config_error(tmp_path, at, value):
    content = json.loads(json.dumps(asdict(JobConfig(command="quantize", model="resnet20")), default=str))
    inner = content
    for name in at[:-1]:
        inner = inner[name]
    inner[at[-1] if at else "unheard of"] = value
    (tmp_path / "config.json").write_text(json.dumps(content))
    try:
        job = read_job_config(tmp_path)
    except ConfigError as error:
        assert str(tmp_path) in str(error)
    else:
        assert isinstance(job, JobConfig) and job.output_dir == tmp_path and isinstance(job.model, str)


# Hostile files.


class Evil:
    """Its pickle makes a file where it is loaded."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def hostile(marker, form):
    """The bytes of a file that runs code in ``pickle.load``: as torch writes it, or a bare pickle."""
    content = {"epoch": 1, "state_dict": {"weight": torch.zeros(1)}, "format": "brfx", "more": Evil(marker)}
    if form == "pickle":
        return pickle.dumps(content | {"state_dict": {}})
    path = marker.with_name("hostile")
    torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    return path.read_bytes()


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_no_code_of_a_checkpoint_runs(tmp_path, form):
    marker = tmp_path / "marker"
    payload = hostile(marker, form)
    path = tmp_path / "evil.ckpt"
    path.write_bytes(b"brfx checkpoint 1 " + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload)
    with pytest.raises(CheckpointError, match=r"refused|not a checkpoint"):
        read_checkpoint(path)
    assert not marker.exists()
    if form != "pickle":
        torch.load(tmp_path / "hostile", weights_only=False)
        assert marker.exists()  # it would have run


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("name", ["best.pth", "model.pt"])
def test_no_code_of_a_file_to_evaluate_runs(tmp_path, name, form):
    from brfx_cli.main import cli

    marker = tmp_path / "marker"
    (tmp_path / name).write_bytes(hostile(marker, form))
    arguments = ["evaluate", "--model", "resnet20", "--data", "digits", "--ckpt", str(tmp_path / name)]
    with pytest.raises(CheckpointError, match=rf"{name}: (refused|not a checkpoint)"):
        cli(arguments, standalone_mode=False)
    assert not marker.exists()


def rewrite(run_dir, **changes):
    path = run_dir / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def begun(worker, one_epoch, tmp_path_factory):
    """A run of the command line that was killed before its only epoch's files were in place."""
    run_dir = tmp_path_factory.mktemp("begun") / "runs" / "run"
    started = (*one_epoch, "--output-dir", run_dir)
    assert worker.life(run_dir, *started, die=("replace", 2, "before")) == -signal.SIGKILL
    return run_dir


@pytest.mark.parametrize("where", ["../../elsewhere", "absolute"])
def test_a_resumed_run_writes_nothing_outside_its_folder(worker, begun, whole_epoch, tmp_path, where):
    run_dir = Path(shutil.copytree(begun, tmp_path / "runs" / "run"))
    elsewhere = tmp_path / "elsewhere" if where == "absolute" else where
    rewrite(run_dir, output_dir=str(elsewhere), data_dir=str(tmp_path / "data"), download=True)
    assert worker.life(run_dir, "quantize", "--model", f"{WORKER}:net", "--resume", run_dir) == 0
    assert fingerprint(run_dir) == whole_epoch
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["run"]
    assert not (Path.cwd().parent.parent / "elsewhere").exists() and not (run_dir.parents[2] / "elsewhere").exists()


def test_a_resumed_run_downloads_nothing_that_is_not_asked_for_again(begun, tmp_path):
    run_dir = Path(shutil.copytree(begun, tmp_path / "run"))
    rewrite(run_dir, data="cifar10", download=True)
    assert not read_job_config(run_dir).download


@pytest.mark.parametrize("model", ["evil.py:factory", "evil.py", "./evil.py:factory", "{}/evil.py:factory"])
def test_a_model_in_the_settings_is_not_imported(begun, tmp_path, monkeypatch, model):
    from brfx_cli.main import cli

    run_dir, marker = Path(shutil.copytree(begun, tmp_path / "run")), tmp_path / "marker"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\ndef factory(num_classes=10): pass\n")
    monkeypatch.chdir(tmp_path)
    model = model.format(tmp_path)
    rewrite(run_dir, model=model)
    for arguments in ([], ["--model", "resnet20"]):
        with pytest.raises(ConfigError, match="its model is code, which runs only if you name it: --model"):
            cli(["quantize", "--resume", str(run_dir), *arguments], standalone_mode=False)
    assert not marker.exists()
    with pytest.raises(BrfxError):
        cli(["quantize", "--resume", str(run_dir), "--model", model], standalone_mode=False)
    assert marker.exists() or model == "evil.py"  # which names no function
