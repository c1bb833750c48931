import argparse
import dataclasses
import datetime
import json
import pathlib
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from brfx.errors import CheckpointError
from brfx.io.float_checkpoint import load_float
from brfx.io.torch_file import Placeholder, read_file
from brfx.models import build_model


@pytest.fixture
def resnet() -> nn.Module:
    torch.manual_seed(3)
    return build_model("resnet20", 10)


class Hostile:
    def __reduce__(self):
        return (print, ("ran",))


def test_wrong_files_are_named_and_never_run(resnet, tmp_path, capsys):
    good = tmp_path / "good.pth"
    torch.save(resnet.state_dict(), good)

    def written(name, content):
        path = tmp_path / name
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        return path

    data = good.read_bytes()
    cases = [
        (tmp_path / "absent.pth", "no such file"),
        (tmp_path, "is a folder"),
        (written("empty.pth", b""), "truncated, damaged"),
        (written("half.pth", data[: len(data) // 2]), "truncated, damaged"),
        (written("text.pth", b"hello, I am no checkpoint"), "damaged"),
        (written("half.safetensors", b"\x00" * 20), "damaged"),
        (written("hostile.pth", {"state_dict": Hostile()}), "it would call builtins.print .behind 'state_dict'"),
        (written("beside.pth", resnet.state_dict() | {"extra": Hostile()}), "refused, it would call builtins.print"),
        (written("whole_model.pth", resnet), "refused, it holds a whole object .brfx.models.CifarResNet"),
        (written("inside.pth", {"model": resnet, "acc": 1}), "model is a brfx.models.CifarResNet, which is not read"),
        (written("numbers.pth", {"epoch": 3, "acc": 0.5}), "no state dict in it.*epoch, acc"),
        (written("list.pth", [1, 2]), "no state dict in it"),
    ]
    for path, message in cases:
        with pytest.raises(CheckpointError, match=message) as caught:
            load_float(build_model("resnet20"), path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert "ran" not in capsys.readouterr().out


@dataclasses.dataclass
class OwnSettings:
    """Of a trainer; reading it may not even look for it."""

    depth: int = 20
    ran: ClassVar = []

    def __setstate__(self, state):
        self.ran.append(state)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_objects_beside_the_tensors_are_passed_over(resnet, tmp_path, legacy):
    beside = {
        "best": np.float64(91.2),
        "history": np.arange(3),
        "args": argparse.Namespace(lr=0.1, folder=pathlib.Path("x")),
        "when": datetime.datetime(2026, 1, 1),
        "config": OwnSettings(),
    }
    path = tmp_path / "ckpt.pth"
    content = {"state_dict": resnet.state_dict(), "epoch": 3, **beside}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    allowed = set(torch.serialization.get_safe_globals())  # torch's own
    content = read_file(path)
    assert content["epoch"] == 3
    assert all(isinstance(content[name], Placeholder) for name in beside)
    assert content["config"].written_as == f"{OwnSettings.__module__}.OwnSettings" and not OwnSettings.ran
    other = build_model("resnet20", 10)
    load_float(other, path)
    assert torch.equal(other.conv1.weight, resnet.conv1.weight)
    assert set(torch.serialization.get_safe_globals()) == allowed


class Calls:
    def __init__(self, function, *arguments):
        self.pickled = function, arguments

    def __reduce__(self):
        return self.pickled


def test_functions_that_reach_out_are_named_with_their_place_and_never_called(tmp_path):
    import importlib
    import os
    import subprocess

    target = tmp_path / "ran"
    for function, arguments, name in [
        (os.mkdir, (str(target),), "os.mkdir|posix.mkdir"),
        (subprocess.call, (["mkdir", str(target)],), "subprocess.call"),
        (importlib.import_module, ("antigravity",), "importlib.import_module"),
        (eval, (f"__import__('os').mkdir({str(target)!r})",), "builtins.eval"),
        (exec, ("1",), "builtins.exec"),
    ]:
        for legacy in (False, True):
            path = tmp_path / "hostile.pth"
            content = {"state_dict": {"w": torch.ones(1)}, "hook": Calls(function, *arguments)}
            torch.save(content, path, _use_new_zipfile_serialization=not legacy)
            with pytest.raises(CheckpointError, match=rf"hostile.pth: refused, it would call ({name}) .behind 'hook'"):
                read_file(path)
    assert not target.exists()


def test_a_function_of_another_module_is_not_called_either(tmp_path, monkeypatch):
    """A name that is on no list becomes a placeholder, called or not."""
    called = []
    monkeypatch.setattr(dataclasses, "replace", lambda *given, **named: called.append(given))
    dataclasses.replace.__module__, dataclasses.replace.__qualname__ = "dataclasses", "replace"
    path = tmp_path / "ckpt.pth"
    torch.save({"w": torch.ones(1), "hook": Calls(dataclasses.replace, 3)}, path)
    assert read_file(path)["hook"].written_as == "dataclasses.replace"
    assert not called


def test_containers_of_ones_own_are_refused_by_name(tmp_path):
    class_ = type("Own", (dict,), {"__module__": __name__})
    globals()["Own"] = class_
    path = tmp_path / "ckpt.pth"
    torch.save({"state_dict": class_(w=torch.ones(1))}, path)
    with pytest.raises(CheckpointError, match="refused, it holds Python objects"):
        read_file(path)


def test_weights_in_several_files_are_read_by_their_index_and_damage_is_named(tmp_path):
    one, two = {"a.weight": torch.ones(2)}, {"b.weight": torch.zeros(3)}
    torch.save(one, tmp_path / "1.bin")
    save_file(two, tmp_path / "2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    places = {"a.weight": "1.bin", "b.weight": "2.safetensors"}
    index.write_text(json.dumps({"weight_map": places}))
    found = read_file(index)
    assert list(found) == ["a.weight", "b.weight"]
    assert torch.equal(found["a.weight"], one["a.weight"]) and torch.equal(found["b.weight"], two["b.weight"])

    for content, message in (
        ({}, "not an index of weights"),
        ([], "not an index of weights"),
        ({"weight_map": {"a.weight": "absent.bin"}}, "absent.bin: no such file"),
        ({"weight_map": {"c.weight": "1.bin"}}, "1.bin: lacks c.weight, which model.safetensors.index.json says"),
        ({"weight_map": {"a.weight": "../1.bin"}}, "names '../1.bin', which is no file of weights beside it"),
        ({"weight_map": {"a.weight": index.name}}, "which is no file of weights beside it"),
    ):
        index.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=message):
            read_file(index)
