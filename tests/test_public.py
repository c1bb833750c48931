import subprocess
import sys
from pathlib import Path

import brfx

DESIGN = {
    "QATConfig", "prepare_qat", "calibrate", "observe", "quantization_disabled", "build_model", "fit", "TrainConfig",
    "save", "load", "float_state_dict", "export_onnx", "BinRegularizer", "BinPenalty",
}  # fmt: skip


def test_every_public_name_is_there_and_documented():
    assert set(brfx.__all__) == set(brfx._HOMES)
    assert set(brfx.__all__) >= DESIGN
    for name in brfx.__all__:
        assert getattr(brfx, name).__doc__, name
    reference = (Path(__file__).parents[1] / "docs" / "reference.md").read_text()
    assert [name for name in brfx.__all__ if f"`{name}`" not in reference] == []


def test_rooms_are_there_without_an_import_of_their_own():
    code = "import brfx; print(brfx.train.TensorBoard.__name__, brfx.data.BatchLoader.__name__, brfx.config.__name__)"
    assert run(code).split() == ["TensorBoard", "BatchLoader", "brfx.config"]


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_importing_the_library_is_light():
    heavy = {"click", "rich", "onnx", "onnxruntime", "sklearn", "matplotlib"}
    code = "import brfx, sys; brfx.prepare_qat, brfx.fit, brfx.load, brfx.export_onnx; print(*sys.modules)"
    assert not heavy & set(run(code).split())
    assert "torch" not in run("import brfx, sys; print(*sys.modules)").split()


def test_help_does_not_import_torch():
    code = "import sys; sys.argv = ['brfx', '--help']\nfrom brfx_cli.main import cli\ncli(standalone_mode=False)"
    assert "Usage" in run(code)
    assert "torch" not in run(code + "\nprint(*sys.modules)").split()


def test_listing_runs_does_not_import_torch():
    assert "torch" not in run("import brfx.jobs.runs, sys; print(*sys.modules)").split()


def test_the_trainer_imports_no_quantizer():
    code = "import brfx.train, sys; print(*(m for m in sys.modules if m.startswith('brfx')))"
    modules = set(run(code).split())
    modules.discard("brfx.quant.factory")  # of which the settings take the names of the methods
    assert not {
        m
        for m in modules
        if m.startswith(("brfx.nn", "brfx.quant.", "brfx.passes", "brfx.graph", "brfx.fast", "brfx.regularizers.bin_"))
    }
