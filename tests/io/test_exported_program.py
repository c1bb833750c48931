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


CALLS = """torch.os.system os.system _operator.methodcaller torch.ops.load_library math.__loader__
torch.ops.aten.__class__.__init__ torch.ops.aten.__getattr__.__globals__ torch.ops.aten.relu.default.__class__
torch.ops.higher_order.cond.__call__ torch.ops.higher_order.call_torchbind torch.ops.aten.from_file.default
torch.ops.aten.save.default"""


@pytest.mark.parametrize("call", CALLS.split())
def test_calls_are_operators(saved, call):
    def put(content):
        return content.replace(b"torch.ops.aten.relu.default", call.encode())

    with pytest.raises(ExportError, match=f"'{call}' in it could run code"):
        load_program(changed(saved, "models/model.json", put))


def with_entry(path, name, content):
    new = path.with_name("more.pt2")
    new.write_bytes(path.read_bytes())
    with zipfile.ZipFile(new, "a") as file:
        file.writestr(f"{file.namelist()[0].split('/')[0]}/{name}", content)
    return new


@pytest.mark.parametrize(
    "name",
    ["data/aotinductor/m/a.so", "models/modelABCDE", "models/extra/m.json", "Models/model.json", "models/m.JSON"],
)
def test_only_a_program_is_loaded(saved, name):
    with pytest.raises(ExportError, match=f"{name}' in it could run code"):
        load_program(with_entry(saved, name, "{}"))


def test_torch_sees_only_entries_that_were_checked(saved):
    """Its reader finds the first of two entries with one name, Python's the last."""
    graph = zipfile.ZipFile(saved).read("net/models/model.json")
    twice = changed(saved, "models/model.json", lambda content: content.replace(b"aten.relu.", b"aten.neg."))
    with pytest.warns(UserWarning, match="Duplicate name"):
        both = with_entry(twice, "models/model.json", graph)
    x = torch.randn(5, 3)
    assert torch.equal(load_program(both).module()(x), Net()(x))


@pytest.mark.parametrize("kind", ["opaque_obj_0", "custom_obj_0"])
def test_constants_are_tensors(saved, tmp_path, kind):
    config = {"config": {"c": {"path_name": kind, "is_param": False, "use_pickle": True, "tensor_meta": None}}}
    hostile = changed(saved, "model_constants_config.json", lambda _: json.dumps(config).encode())
    hostile = with_entry(hostile, f"data/constants/{kind}", pickle.dumps(Touch(tmp_path / "ran")))
    with pytest.raises(ExportError, match=f"{kind}' in it could run code"):
        load_program(hostile)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "context", [{"__enum__": None, "fqn": "antigravity.X", "name": "X"}, {"default_factory_module": "antigravity"}]
)
def test_structures_import_no_modules(saved, context):
    def put(content):
        graph = json.loads(content)
        signature = graph["graph_module"]["module_call_graph"][0]["signature"]
        spec = json.loads(signature["in_spec"])
        spec[1]["context"] = json.dumps([context])
        signature["in_spec"] = json.dumps(spec)
        return json.dumps(graph).encode()

    with pytest.raises(ExportError, match=f"'{next(iter(context))}' in it could run code"):
        load_program(changed(saved, "models/model.json", put))


def test_values_may_be_called_like_keys(tmp_path):
    class Named(nn.Module):
        def forward(self, target):
            return torch.relu(target)

    torch.export.save(torch.export.export(Named(), (torch.ones(2),)), tmp_path / "named.pt2")
    assert load_program(tmp_path / "named.pt2").module()(torch.ones(2)).tolist() == [1, 1]
