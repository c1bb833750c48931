"""The line that says what is missing names the packages, with a command that works for any installation."""

import builtins
import sys

import pytest
import torch

import brfx
from brfx import extras
from brfx.errors import ExportError


@pytest.fixture
def without(monkeypatch):
    """Hide packages, as if they were not installed."""

    def hide(*names):
        real, imports = extras._installed, builtins.__import__

        def refuse(name, *args, **kwargs):
            if name.split(".")[0] in names:
                raise ImportError(f"No module named {name!r}", name=name)
            return imports(name, *args, **kwargs)

        for module in [name for name in sys.modules if name.split(".")[0] in names]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setattr(extras, "_installed", lambda name: name not in names and real(name))
        monkeypatch.setattr(builtins, "__import__", refuse)

    return hide


def test_what_is_missing_is_named_with_a_command_that_installs_it(monkeypatch):
    wanted = [
        "torch>=2",
        "onnx>=1.18; extra == 'onnx'",
        'scikit-learn>=1.3 ; extra == "demo"',
        'gone<9; extra == "onnx"',
    ]
    monkeypatch.setattr(extras, "requires", lambda name: wanted)
    monkeypatch.setattr(extras, "_installed", lambda name: name in ("torch",))
    assert extras.missing("onnx") == ["onnx>=1.18", "gone<9"] and extras.missing("none") == []
    assert extras.needed("timing", "demo") == (
        "timing needs scikit-learn, which is not installed: pip install 'scikit-learn>=1.3'"
    )
    assert extras.needed("export", "onnx") == (
        "export needs onnx, gone, which are not installed: pip install 'onnx>=1.18' 'gone<9'"
    )
    broken = extras.needed("export", "none", ImportError("libfoo.so"))
    assert broken == "export: a package it needs is installed and cannot be imported (libfoo.so)"


def test_a_package_or_its_module_will_do():
    assert extras._installed("torch") and extras._installed("scikit-learn") and not extras._installed("no-such-thing")
    assert extras._installed("brfx-cli")  # no package, a module


def test_the_exporter_names_what_it_misses(tiny, images, tmp_path, without):
    qmodel = brfx.prepare_qat(tiny)
    brfx.calibrate(qmodel, [images])
    without("onnxscript")
    with pytest.raises(ExportError, match=r"ONNX export needs onnxscript, which is not installed: pip install 'onnxs"):
        brfx.export_onnx(qmodel, tmp_path / "a.onnx", torch.randn(2, 3, 8, 8))
