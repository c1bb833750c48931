import json

import pytest

from brfx.errors import ConfigError
from brfx.report.run_files import read_run_files


def test_a_finished_run_has_everything(finished):
    run = read_run_files(finished)
    assert run.label == "finished" and run.run.bits == "W2.5A2" and run.metric == "top-1 accuracy"
    assert [line["epoch"] for line in run.histograms] == [0, 1, 2, 3, 4]
    assert run.before is run.histograms[0] and run.after is run.histograms[4]
    assert run.boundary == 1
    assert run.over_epochs(lambda line: line["train"]["terms"].get("weight"))[0] == [2, 3, 4]
    result = json.loads((finished / "result.json").read_text())
    assert run.float_test == result["test_float"]["correct"] / result["test_float"]["count"]
    assert run.network is not None and run.network["parameters"] == 8 * 27 + 8 * 72 + 32 + 90
    assert run.config["machine"]["cores"] >= 1


def test_an_older_run_and_an_unfinished_one_have_what_is_there(older, unfinished):
    old = read_run_files(older)
    assert old.histograms == [] and old.before is None and old.after is None and old.network is None
    assert len(old.metrics) == 4
    cut_off = read_run_files(unfinished)
    assert cut_off.result is None and cut_off.float_test is None
    assert cut_off.after is not None and cut_off.after["epoch"] == 2


def test_the_epoch_that_was_shipped_is_after(unfinished, finished):
    (unfinished / "result.json").write_text(
        json.dumps(json.loads((finished / "result.json").read_text()) | {"epoch": 1, "stage": "warm-up"})
    )
    run = read_run_files(unfinished)
    assert run.after is not None and run.after["epoch"] == 1


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("histograms.jsonl", '{"epoch": 0}\n', "histograms.jsonl: line 1: damaged, weights is missing"),
        ("histograms.jsonl", '{"epoch": 0\n{}\n', "histograms.jsonl: line 1: damaged, no JSON"),
        ("metrics.jsonl", "[]\n", "metrics.jsonl"),
        ("histograms.jsonl", b'{"epoch": "\xff"}\n{}\n', "histograms.jsonl: line 1: damaged, no JSON"),
        ("network.json", b"\xff", "network.json: damaged, no JSON"),
        ("network.json", "{", "network.json: damaged, no JSON"),
        ("network.json", "[]", "network.json: damaged, no table"),
        ("result.json", "{", "result.json: damaged"),
    ],
)
def test_a_damaged_file_is_named(unfinished, name, content, said):
    (unfinished / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=said):
        read_run_files(unfinished)


def test_a_last_line_that_a_crash_cut_off_does_not_count(unfinished):
    path = unfinished / "histograms.jsonl"
    path.write_text(path.read_text() + '{"epoch": 3, "wei')
    assert len(read_run_files(unfinished).histograms) == 3


def test_what_is_no_run_is_said(tmp_path):
    with pytest.raises(ConfigError, match="there is no such folder"):
        read_run_files(tmp_path / "none")
    with pytest.raises(ConfigError, match="this is no run's folder"):
        read_run_files(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="this is no run's folder"):
        read_run_files(tmp_path)


def test_a_sensitivity_of_another_network_is_refused(measured):
    path = measured / "sensitivity.json"
    path.write_text(path.read_text().replace('"conv2"', '"layer1.0.conv1"'))
    with pytest.raises(ConfigError, match=r"sensitivity\.json: is of another network, .* no layer layer1\.0\.conv1"):
        read_run_files(measured)
