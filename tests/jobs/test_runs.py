"""`brfx runs`: what it reads, and that one damaged run hides no other."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import brfx
from brfx.config import JobConfig
from brfx.jobs.runs import read_runs


def write_run(folder: Path, command: str = "quantize", epochs: int = 3, done: int = 3, *, tested: bool = True) -> Path:
    """A run's folder as the jobs write it."""
    folder.mkdir(parents=True)
    train = brfx.TrainConfig(epochs=epochs, lr=0.05, seed=7)
    job = JobConfig(command=command, model="resnet20", qat=brfx.QATConfig(bits=2, act_bits=4), train=train)
    config = asdict(job) | {"versions": {"brfx": "0.1.0"}}
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
    accuracies = [0.5, 0.75, 0.625, 0.5][:done]
    lines = [{"epoch": i, "val_accuracy": value, "seconds": 2.0} for i, value in enumerate(accuracies, start=1)]
    if lines:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if tested:
        result = {"test": {"correct": 81, "count": 100, "loss": 0.5}, "test_float": None}
        shipped = (done, "penalty", accuracies[-1]) if lines else (None, None, None)
        result |= dict(zip(("epoch", "stage", "val_accuracy"), shipped, strict=True))
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def test_runs_are_found_at_every_depth_with_what_they_came_to(tmp_path):
    write_run(tmp_path / "b" / "deep")
    write_run(tmp_path / "a", command="train", done=2, tested=False)
    write_run(tmp_path / "c", epochs=0, done=0)
    quantized, *_ = [run for run in read_runs(tmp_path) if run.name == "b/deep"]
    assert (quantized.model, quantized.bits, quantized.state, quantized.why) == ("resnet20", "W2A4", "complete", "")
    assert (quantized.epochs_done, quantized.epochs, quantized.seconds) == (3, 3, 6.0)
    assert (quantized.lambda_br, quantized.lambda_br_act, quantized.lr, quantized.seed) == (0.1, 0.01, 0.05, 7)
    assert (quantized.epoch, quantized.stage) == (3, "penalty")
    assert (quantized.val_accuracy, quantized.test_accuracy) == (0.625, 0.81)
    baseline, _, untrained = read_runs(tmp_path)
    assert (baseline.name, baseline.bits, baseline.lambda_br, baseline.test_accuracy) == ("a", "FP32", None, None)
    assert (baseline.state, baseline.epochs_done, baseline.epochs) == ("unfinished", 2, 3)
    assert (baseline.val_accuracy, baseline.epoch) == (0.75, None)  # of the last epoch so far
    assert (untrained.state, untrained.epochs_done, untrained.val_accuracy) == ("complete", 0, None)


def test_a_run_without_validation(tmp_path):
    path = write_run(tmp_path / "run")
    (path / "metrics.jsonl").write_text('{"epoch": 1, "val_accuracy": null, "seconds": 1}\n')
    result = {"test": {"correct": 81, "count": 100}, "epoch": 1, "stage": "plain", "val_accuracy": None}
    (path / "result.json").write_text(json.dumps(result))
    (run,) = read_runs(tmp_path)
    assert (run.state, run.epochs_done, run.epoch, run.val_accuracy) == ("complete", 1, 1, None)


def test_a_run_itself_is_read_under_its_name(tmp_path):
    assert [run.name for run in read_runs(write_run(tmp_path / "w2a2"))] == ["w2a2"]


def test_other_peoples_config_json_is_no_run(tmp_path):
    write_run(tmp_path / "mine")
    for name, content in (("list", "[1]"), ("bert", '{"model_type": "bert"}'), ("versions", '{"versions": {"x": 1}}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
    (tmp_path / "folder" / "config.json").mkdir(parents=True)
    assert [run.name for run in read_runs(tmp_path)] == ["mine"]


def test_a_last_line_that_was_cut_off_does_not_count(tmp_path):
    path = write_run(tmp_path / "run", tested=False) / "metrics.jsonl"
    path.write_text(path.read_text()[:-9])
    (run,) = read_runs(tmp_path)
    assert (run.state, run.epochs_done) == ("unfinished", 2)


@pytest.mark.parametrize(
    ("file", "content", "why"),
    [
        ("config.json", '{"command": "quan', "config.json: damaged, no JSON"),
        ("config.json", '{"versions": {"brfx": "1"}, "command": "train"}', "config.json: qat is missing"),
        ("metrics.jsonl", '{"epoch": 1\n{}\n', "metrics.jsonl: line 1: damaged, no JSON"),
        ("metrics.jsonl", '{"epoch": 1, "val_accuracy": 7, "seconds": 1}\n', "an accuracy is 7, it takes 0 to 1"),
        ("metrics.jsonl", '{"epoch": true, "val_accuracy": 0, "seconds": 1}\n', "epoch is True, no whole number"),
        ("metrics.jsonl", '{"epoch": 1, "val_accuracy": NaN, "seconds": 1}\n', "val_accuracy is nan, no number"),
        ("metrics.jsonl", f'{{"epoch": 1, "val_accuracy": 1{"0" * 400}, "seconds": 1}}\n', "no number"),
        ("result.json", "", "result.json: damaged, no JSON"),
        ("result.json", "[" * 100_000, "result.json: damaged, no JSON"),
        ("result.json", '{"test": {"correct": 0, "count": 0}}', "count is 0"),
        ("result.json", '{"test": "good"}', "test is 'good', no table"),
        ("result.json", '{"test": {"correct": 1, "count": 2}}', "epoch is missing"),
    ],
)
def test_a_damaged_run_is_listed_with_the_reason_beside_the_others(tmp_path, file, content, why):
    write_run(tmp_path / "good")
    (write_run(tmp_path / "bad") / file).write_text(content)
    bad, good = read_runs(tmp_path)
    assert (bad.state, good.state) == ("unreadable", "complete")
    assert why in bad.why and "\n" not in bad.why
    assert (bad.test_accuracy is None) == (file == "result.json")  # the other files are still read


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["config.json", "metrics.jsonl", "result.json"]), st.binary(max_size=8), st.floats(0, 1))
def test_no_bytes_anywhere_in_a_file_stop_the_listing(tmp_path_factory, file, noise, where):
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "good")
    path = write_run(folder / "bad") / file
    content = path.read_bytes()
    start = int(where * len(content))
    path.write_bytes(content[:start] + noise + content[start + len(noise) :])
    runs = {run.name: run for run in read_runs(folder)}
    assert runs["good"].state == "complete"
    assert set(runs) == {"good", "bad"} or file == "config.json"


def test_a_folder_without_a_run_is_one_line(tmp_path):
    with pytest.raises(brfx.BrfxError, match="there is no run in it"):
        read_runs(tmp_path)
    with pytest.raises(brfx.BrfxError, match="no such folder"):
        read_runs(tmp_path / "absent")
