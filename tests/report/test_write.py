import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from brfx_cli.main import cli
from click.testing import CliRunner

from brfx.analysis.network import Place
from brfx.errors import ConfigError
from brfx.report.write import read, write_figures, write_network, write_page


def test_runs_have_labels_that_tell_them_apart(finished, tmp_path):
    twin = tmp_path / "finished"
    shutil.copytree(finished, twin)
    assert [run.label for run in read([finished])] == ["finished"]
    assert [run.label for run in read([finished, twin])] == [str(finished), str(twin)]
    with pytest.raises(ConfigError, match="given twice"):
        read([finished, finished.parent / "finished"])


def test_runs_of_other_metrics_are_not_laid_over_each_other(finished, unfinished):
    path = unfinished / "metrics.jsonl"
    path.write_text(path.read_text().replace("val_accuracy", "val_mIoU"))
    with pytest.raises(ConfigError, match=r"it measures mIoU, .* top-1 accuracy: report them apart"):
        read([finished, unfinished])


def test_committed_runs_have_a_page(tmp_path):
    pytest.importorskip("matplotlib", reason="figures need matplotlib, the extra 'report'")
    folder = Path(__file__).parents[2] / "docs" / "results" / "w2a2-30"
    write_page(read([folder / "signed-seed0", folder / "symmetric-seed0"]), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "resnet20 at W2A2 reaches 88.71 % top-1 accuracy on 10,000 test images, 3.02 points below" in page
    assert "<td>qat.weight_grid</td><td>signed</td><td>symmetric</td>" in page


@pytest.mark.parametrize("run", ["finished", "older", "unfinished"])
def test_a_page_needs_nothing_else(run, request, tmp_path):
    pytest.importorskip("matplotlib", reason="figures need matplotlib, the extra 'report'")
    folder = request.getfixturevalue(run)
    write_page(read([folder]), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    links = re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)', page)
    assert all((a or b).startswith(("#", "data:")) for a, b in links)
    assert "<script" not in page and "@import" not in page
    assert not [found for found in re.findall(r"https?://[^\s\"'<]+", page) if "www.w3.org" not in found]
    config = json.loads((folder / "config.json").read_text())
    assert config["versions"]["torch"] in page and "All settings" in page and "br_form" in page
    assert ("Histograms of latent weights" in page) == (run != "older")
    assert ("kept no histograms" in page) == (run == "older")
    assert ("The network" in page) == (run != "older")
    assert ("Files" in page) == (run != "unfinished")


def test_what_was_measured_beside_the_run_is_on_its_page_and_in_its_short_form(measured, finished, tmp_path):
    pytest.importorskip("matplotlib", reason="figures need matplotlib, the extra 'report'")
    write_page(read([measured]), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Sensitivity</h2>" in page and "each layer&#x27;s weights cost alone" in page
    assert "<td>5.0e-04</td>" in page and "batches of 1 image, 2 threads, a CPU" in page
    write_page(read([measured, finished]), tmp_path / "two.html")
    assert (tmp_path / "two.html").read_text().count("<h2>Sensitivity</h2>") == 1
    short = CliRunner().invoke(cli, ["report", str(measured), "--terminal"], env={"COLUMNS": "80"})
    assert short.exit_code == 0, short.output
    assert ["conv1", "100", "0.5000", "0.2500", "0.0625", "4"] in [line.split() for line in short.output.splitlines()]
    assert "model.onnx" in short.output and "ONNX Runtime, batches of 1 image" in short.output


def test_names_from_files_are_text(unfinished, tmp_path):
    pytest.importorskip("matplotlib", reason="figures need matplotlib, the extra 'report'")
    bad = tmp_path / "<img src=x onerror=alert(1)>"
    shutil.copytree(unfinished, bad)
    for name in ("config.json", "network.json"):
        path = bad / name
        path.write_text(path.read_text().replace("conv1", "<b>conv1"))
    write_page(read([bad]), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<img" not in page and "<b>conv1" not in page and "&lt;img src=x" in page and "&lt;b&gt;conv1" in page


def test_figures_are_written_for_web_papers_and_slides(unfinished, tmp_path):
    pytest.importorskip("matplotlib", reason="figures need matplotlib, the extra 'report'")
    count = write_figures(read([unfinished]), tmp_path / "figures")
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"metric.svg", "metric.pdf", "metric.png", "histograms-weights.pdf", "network.svg"} <= names
    assert len(names) == 3 * (count - 1) + 1
    again = {path.name: path.read_bytes() for path in (tmp_path / "figures").glob("metric.*")}
    write_figures(read([unfinished]), tmp_path / "figures")
    assert again == {path.name: path.read_bytes() for path in (tmp_path / "figures").glob("metric.*")}


def test_what_cannot_be_written_or_read_is_said(unfinished, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="figures need matplotlib, the extra 'report'")
    runs = read([unfinished])
    with pytest.raises(ConfigError, match="there is no such folder to write into"):
        write_page(runs, tmp_path / "none" / "report.html")
    path = unfinished / "histograms.jsonl"
    path.write_text(path.read_text().replace('"levels"', '"lvls"'))
    with pytest.raises(ConfigError, match=r"unfinished: a file of the run is damaged, or of another brfx \(KeyError"):
        write_page(read([unfinished]), tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match="pip install 'matplotlib"):
        write_page(runs, tmp_path / "report.html")


def test_a_short_form_of_a_damaged_run_names_it(unfinished):
    path = unfinished / "histograms.jsonl"
    path.write_text(path.read_text().replace('"levels"', '"lvls"'))
    done = CliRunner().invoke(cli, ["report", str(unfinished), "--terminal"])
    assert isinstance(done.exception, ConfigError)
    assert "unfinished: a file of the run is damaged, or of another brfx" in str(done.exception)


def test_a_graph_is_an_svg(tmp_path):
    places = [Place("x", "x", "", "input"), Place("fc", "fc", "Linear", "layer", ("x",))]
    write_network({"before": places, "after": places}, tmp_path / "graph.svg")
    text = (tmp_path / "graph.svg").read_text()
    assert text.startswith("<svg") and text.count(">fc<") == 2 and "prefers-color-scheme: dark" in text
    with pytest.raises(ConfigError, match=r"is an \.svg"):
        write_network({"before": places}, tmp_path / "graph.png")
