import io
import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from brfx.errors import ExportError
from brfx.io.exported_program import load_program, read_extra


class Net(nn.Module):
    def forward(self, x):
        return torch.relu(x).view(x.shape[0], -1) * x.shape[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("pt2") / "net.pt2"
    program = torch.export.export(Net(), (torch.ones(2, 3),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path, extra_files={"brfx.json": '{"a": 1}'})
    return path


def changed(path, entry_end, change):
    """A copy of the archive in which ``change`` was applied to the bytes of one entry."""
    new = path.with_name("changed.pt2")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(new, "w") as file:
        entries = [entry for entry in old.namelist() if entry.endswith(entry_end)]
        assert entries
        for entry in old.namelist():
            content = old.read(entry)
            file.writestr(entry, change(content) if entry in entries else content)
    return new


def test_a_program_and_its_extra_file(saved):
    x = torch.randn(5, 3)
    assert torch.equal(load_program(saved).module()(x), Net()(x))
    assert json.loads(read_extra(saved, "brfx.json")) == {"a": 1} and read_extra(saved, "other.json") is None


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles_run_no_code(saved, tmp_path, monkeypatch):
    buffer = io.BytesIO()
    torch.save((Touch(tmp_path / "ran"),), buffer)
    hostile = changed(saved, "sample_inputs/model.pt", lambda content: buffer.getvalue())
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises((pickle.UnpicklingError, RuntimeError)):
        load_program(hostile)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "size", ["__import__('os').getcwd()", "open('x')", "Symbol('s1').func", "[s1]", "Symbol('os')", "lambda: s1"]
)
def test_sizes_are_symbols_and_numbers(saved, size):
    def put(content):
        text = content.decode()
        start = text.index('"expr_str": "') + len('"expr_str": "')
        return (text[:start] + size + text[text.index('"', start) :]).encode()

    with pytest.raises(ExportError, match="could run code, so it is not loaded"):
        load_program(changed(saved, "models/model.json", put))


@pytest.mark.parametrize("call", ["torch.os.system", "os.system", "_operator.methodcaller", "torch.ops.load_library"])
def test_calls_are_operators(saved, call):
    def put(content):
        return content.replace(b"torch.ops.aten.relu.default", call.encode())

    with pytest.raises(ExportError, match=f"'{call}' in it could run code"):
        load_program(changed(saved, "models/model.json", put))
