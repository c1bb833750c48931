import json
from dataclasses import replace

import pytest

from brfx.report import text
from brfx.report.run_files import read_run_files


@pytest.fixture
def run(finished):
    return read_run_files(finished)


def test_the_sentence_has_the_figures_of_the_result(run, unfinished):
    result = run.result
    test, before = (100 * result[name]["correct"] / result[name]["count"] for name in ("test", "test_float"))
    said = text.sentence(run)
    assert f"at W2.5A2 reaches {test:.2f} % top-1 accuracy on {result['test']['count']:,} test images" in said
    assert f"{abs(test - before):.2f} points {'above' if test > before else 'below'} its FP32 network" in said
    size = result["bytes"]["model.onnx"]
    assert f"model.onnx is {size / 1e3:.1f} kB, {4 * 914 / size:.1f} times smaller than FP32 weights." in said
    assert "unfinished, 2 of 4 epochs: " in text.sentence(read_run_files(unfinished))


def test_another_metric_and_no_float_network(run):
    scored = {"test": {"value": 0.5, "metric": "mIoU", "count": 10, "loss": 1.0}, "test_float": None}
    other = replace(
        run, run=replace(run.run, metric="mIoU", test_accuracy=0.5), result=scored | {"bytes": {}}, network=None
    )
    assert text.sentence(other).endswith("at W2.5A2 reaches 50.00 % mIoU on 10 test images.")
    assert ("mIoU, test", "50.00 %") in text.facts(other)


def test_points():
    assert text.points(0.0123) == "1.23 points above"
    assert text.points(-0.2) == "20.00 points below"
    assert text.points(-0.00001) == "as much as"


def test_the_table_of_layers(run):
    names, rows = text.layers(run, "weights")
    assert names[-2:] == ("closed", "dead channels") and [row[0] for row in rows] == ["conv1", "conv2", "fc"]
    by_name = dict(zip(names, rows[0], strict=True))
    figures, last = run.after["weights"]["conv1"], run.metrics[-1]["weights"]["conv1"]
    assert (by_name["bits"], by_name["levels used"]) == ("4", f"{figures['used']} of 16")
    assert (
        by_name["error"] == f"{last['mse']:.3g}"
        and by_name["error before"] == f"{run.before['weights']['conv1']['mse']:.3g}"
    )
    assert by_name["effectiveness"] == f"{100 * (1 - last['distance']):.1f} %"
    assert by_name["closed"] == f"{100 * last['closed']:.1f} %".replace("-", "\N{MINUS SIGN}")
    names, rows = text.layers(run, "activations")
    assert names[-1] == "effectiveness" and rows[0][0] == "conv1_input"


def test_shares_of_levels_add_up(run):
    figures = run.after["weights"]["conv2"]
    assert sum(text.shares(figures)) == pytest.approx(1) and len(text.shares(figures)) == 4
    assert text.shares(figures | {"codes": []}) == []


def test_an_older_run_has_the_figures_of_its_metrics(older):
    run = read_run_files(older)
    assert text.layers(run, "weights") is None
    names, rows = text.weights_only(run)
    assert [row[0] for row in rows] == ["conv1", "conv2", "fc"] and names[-1] == "codes changed"
    assert text.smaller(run) is None


def test_the_command_is_one_that_a_shell_takes(run):
    of = lambda *words: text.command(replace(run, config=run.config | {"command_line": list(words)}))  # noqa: E731
    assert of("/a/b/brfx_cli/__main__.py", "quantize", "--data", "my images") == "brfx quantize --data 'my images'"
    assert of("/usr/bin/brfx", "train") == "brfx train"
    assert of("script.py", "x") == "script.py x"
    assert text.command(replace(run, config={})) == ""


def test_differences_are_of_results_and_of_settings_that_differ(run):
    config = json.loads(json.dumps(run.config))
    config["lambda_br"], config["train"]["lr"], config["output_dir"] = 0.0, 0.5, "elsewhere"
    other = replace(run, label="other", config=config)
    names, rows = text.differences([run, other])
    assert names == ("", "finished", "other")
    table = {row[0]: row[1:] for row in rows}
    assert table["lambda_br"] == ("0.5", "0.0") and table["train.lr"][1] == "0.5"
    assert "output_dir" not in table and "train.epochs" not in table and "machine.cores" not in table
    assert table["epochs"] == ("4 of 4", "4 of 4")


def test_durations_and_sizes():
    assert [text.duration(seconds) for seconds in (12, 200, 4330)] == ["12 s", "3.3 min", "1 h 12 min"]
    assert [text.file_size(size) for size in (86_169, 1_132_421)] == ["86.2 kB", "1.13 MB"]


def test_what_the_onnx_file_was_compared_with(run):
    report = {
        "integer_layers": 3, "float_layers": {"up": "transposed"}, "reference_difference": 0.0,
        "sites": [{"site": "relu", "codes": 10, "flipped": 2, "largest": 1}],
    }  # fmt: skip
    lines = text.onnx(replace(run, result={"onnx": report}))
    assert lines == [
        "3 layers of model.onnx run on integer kernels.",
        "up stays in floating point: transposed.",
        "Integers against PyTorch: 2 of 10 codes differ.",
        "ONNX Runtime's outputs and the integer reference's are the same bit for bit.",
    ]
    assert (
        "different by up to 0.5" in text.onnx(replace(run, result={"onnx": report | {"reference_difference": 0.5}}))[-1]
    )
    assert text.onnx(replace(run, result={"onnx": None})) == []


def test_sensitivities_have_the_bits_of_the_run_not_of_what_was_measured(measured):
    names, rows = text.sensitivity(read_run_files(measured), "weights")
    assert names == ("layer", "weights", "2 bits", "4 bits", "8 bits", "has")
    assert rows == [
        ("conv1", "100", "0.5000", "0.2500", "0.0625", "4"),
        ("conv2", "200", "2.0000", "0.5000", "0.0e+00", "2"),
        ("fc", "300", "0.1250", "5.0e-04", "1.0e-04", "2"),
    ]
    assert text.sensitivity(read_run_files(measured), "activations") is None


def test_speeds_and_how_they_were_measured(measured, run):
    timed = read_run_files(measured)
    names, rows = text.speeds(timed)
    assert names == ("file", "size", "ms/batch", "images/s", "x the first")
    assert rows[1] == ("model.onnx", "4.0 kB", "0.25", "4000", "2.00")
    assert text.timed_how(timed) == "ONNX Runtime, batches of 1 image, 2 threads, a CPU."
    assert text.speeds(run) is None and text.sensitivity(run, "weights") is None
