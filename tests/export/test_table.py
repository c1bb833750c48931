from pathlib import Path

import pytest
from brfx_cli.main import cli
from click.testing import CliRunner

import brfx
from brfx.errors import ExportError
from brfx.export import table
from brfx.export.table import EXPORTERS, exporter_for


def test_each_suffix_has_its_exporter_and_writes_its_format(tiny, images, tmp_path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    qmodel = brfx.prepare_qat(tiny)
    brfx.calibrate(qmodel, [images])
    for exporter in EXPORTERS:
        path = tmp_path / f"model{exporter.suffix}"
        assert exporter_for(path) is exporter
        exporter.write(qmodel, path, images, "fast")
        assert path.stat().st_size > 1000
    onnx = pytest.importorskip("onnx")
    for end, own in ((".onnx", False), (".qonnx.onnx", True)):
        domains = {entry.domain for entry in onnx.load(tmp_path / f"model{end}").opset_import}
        assert ("qonnx.custom_op.general" in domains) == own
    assert brfx.export.read_packed(tmp_path / "model.safetensors").header["inputs"]


def test_the_profile_reaches_the_exporter_that_has_one(monkeypatch) -> None:
    assert exporter_for(Path("model.onnx")).write is table.export_onnx


def test_another_suffix_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ExportError, match=r"^a/model.tflite: .*: \.onnx, \.pt2, \.qonnx\.onnx or \.safetensors$"):
        exporter_for(Path("a/model.tflite"))


def test_the_command_line_s_help_has_every_suffix() -> None:
    text = CliRunner().invoke(cli, ["export", "--help"]).output
    assert all(f"  {exporter.suffix} " in text for exporter in EXPORTERS)
