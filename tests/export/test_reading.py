"""What exported files say of themselves, and that each runs as the model does."""

import json

import pytest
import torch

import brfx
from brfx.data import Preprocessing
from brfx.errors import ExportError
from brfx.export.reading import entries_of, is_exported, preprocessing_in, runner
from brfx.export.table import EXPORTERS, exporter_for
from brfx.metadata import metadata_entries, metadata_of

SEEN = Preprocessing(8, (0.5,) * 3, (0.25,) * 3)


@pytest.fixture(scope="module")
def qmodel():
    from tests.conftest import TinyNet

    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    qmodel = brfx.prepare_qat(TinyNet(), brfx.QATConfig(bits=2), x).eval()
    brfx.calibrate(qmodel, [x])
    metadata = metadata_of(qmodel)
    metadata.preprocessing, metadata.classes = SEEN, ("a", "b", "c", "d")
    return qmodel


@pytest.mark.parametrize("suffix", [".onnx", ".pt2", ".safetensors"])
def test_a_file_says_what_it_is_and_runs(tmp_path, qmodel, suffix):
    path, x = tmp_path / f"model{suffix}", torch.randn(3, 3, 8, 8)
    exporter_for(path).write(qmodel, path, torch.randn(2, 3, 8, 8), "compact")
    assert is_exported(path)
    entries = entries_of(path)
    assert preprocessing_in(path, entries) == SEEN and entries["classes"] == ["a", "b", "c", "d"]
    assert entries["config"]["weight_bits"] == 2
    (found,) = runner(path, lambda path: qmodel)(x)
    with torch.no_grad():
        assert (found - qmodel(x)).abs().max() < 0.05 * qmodel(x).abs().max()
    with pytest.raises(ExportError, match=f"model{suffix}: "):
        runner(path, lambda path: qmodel)(x[:, :1])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ExportError, match=f"model{suffix}: "):
        entries_of(path)


@pytest.mark.parametrize("suffix", [exporter.suffix for exporter in EXPORTERS])
def test_every_format_says_it_under_the_same_keys(tmp_path, qmodel, suffix):
    path = tmp_path / f"model{suffix}"
    exporter_for(path).write(qmodel, path, torch.randn(2, 3, 8, 8), "compact")
    said = json.loads(json.dumps(metadata_entries(qmodel)))
    entries = entries_of(path)
    assert {key: entries[key] for key in said} == said


def test_files_of_others(tmp_path, qmodel):
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, tmp_path / "weights.safetensors")
    assert not is_exported(tmp_path / "weights.safetensors") and not is_exported(tmp_path / "a.pth")
    assert preprocessing_in(tmp_path, {}) is None
    with pytest.raises(ExportError, match="its preprocessing is not what this brfx knows"):
        preprocessing_in(tmp_path, {"preprocessing": {"image_size": 8, "from_the_future": 1}})
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ExportError, match=r"takes brfx's \.pt, \.onnx, \.pt2 or \.safetensors"):
        runner(tmp_path / "a.txt", lambda path: qmodel)
    with pytest.raises(ExportError, match=r"b\.onnx: no such file"):
        runner(tmp_path / "b.onnx", lambda path: qmodel)
