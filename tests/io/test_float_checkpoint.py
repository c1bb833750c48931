import logging
import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from brfx.errors import CheckpointError
from brfx.io.float_checkpoint import load_float, read_state_dict
from brfx.models import build_model

WRAPS = {
    "bare": lambda state: state,
    "ordered": OrderedDict,
    "state_dict": lambda state: {"state_dict": state, "best_prec1": 91.78},
    "model": lambda state: {"model": state, "epoch": 3, "args": {"lr": 0.1}},
    "model_state_dict": lambda state: {"model_state_dict": state, "optimizer": {"state": {}, "param_groups": []}},
    "net": lambda state: {"net": state, "acc": 93.2},
    "twice": lambda state: {"checkpoint": {"state_dict": state}, "epoch": 1},
    "DataParallel": lambda state: {f"module.{key}": value for key, value in state.items()},
    "compiled": lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
    "DDP of compiled": lambda state: {"state_dict": {f"module._orig_mod.{key}": value for key, value in state.items()}},
    "Lightning": lambda state: {"state_dict": {f"model.{k}": v for k, v in state.items()}, "hyper_parameters": {}},
    "nested": lambda state: {f"model.net.backbone.{key}": value for key, value in state.items()},
    "a part compiled": lambda state: {key.replace("layer1.", "layer1._orig_mod."): v for key, v in state.items()},
    "AveragedModel": lambda state: {f"module.{k}": v for k, v in state.items()} | {"n_averaged": torch.tensor(3)},
    "of no known name": lambda state: {"mine": state, "buffers": {"mean": torch.zeros(3)}},
    "parameters": lambda state: {key: nn.Parameter(v) if v.is_floating_point() else v for key, v in state.items()},
    "without counters": lambda state: {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")},
}


@pytest.fixture
def resnet() -> nn.Module:
    torch.manual_seed(3)
    return build_model("resnet20", 10)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".th"])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_checkpoints_load_as_they_come(resnet, tmp_path, wrap, legacy, suffix):
    path = tmp_path / f"ckpt{suffix}"
    torch.save(wrap(resnet.state_dict()), path, _use_new_zipfile_serialization=not legacy)
    assert zipfile.is_zipfile(path) != legacy
    other = build_model("resnet20", 10)
    load_float(other, path)
    for key, value in resnet.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


@pytest.mark.parametrize("prefix", ["", "module."])
def test_safetensors(resnet, tmp_path, prefix):
    path = tmp_path / "model.safetensors"
    save_file({f"{prefix}{key}": value for key, value in resnet.state_dict().items()}, path)
    other = build_model("resnet20", 10)
    load_float(other, path)
    assert torch.equal(other.conv1.weight, resnet.conv1.weight)


def test_weights_of_what_a_model_wraps_go_into_it(resnet, tmp_path):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = build_model("resnet20", 10)

    torch.save(resnet.state_dict(), tmp_path / "inner.pth")
    torch.save({f"inner.{key}": value for key, value in resnet.state_dict().items()}, tmp_path / "whole.pth")
    for file in ("inner.pth", "whole.pth"):
        wrapped = Wrapped()
        assert load_float(wrapped, tmp_path / file) == ()
        assert all(torch.equal(v, wrapped.inner.state_dict()[key]) for key, v in resnet.state_dict().items())
    with pytest.raises(CheckpointError, match=r"it lacks .*inner\.conv1"):
        torch.save({"conv2.weight": torch.zeros(3)}, tmp_path / "other.pth")
        load_float(Wrapped(), tmp_path / "other.pth")


def test_the_real_checkpoint(real_checkpoint):
    state = read_state_dict(real_checkpoint)
    model = build_model("resnet20")
    own = {key for key in model.state_dict() if not key.endswith("num_batches_tracked")}  # the file is older than these
    assert set(state) == {f"module.{key}" for key in own}
    assert load_float(model, real_checkpoint) == ()
    assert torch.equal(model.linear.weight, state["module.linear.weight"])


def test_mismatches_name_keys_shapes_and_the_way_out(resnet, tmp_path):
    path = tmp_path / "ckpt.pth"
    torch.save(resnet.state_dict(), path)
    with pytest.raises(CheckpointError, match="its linear has 10 classes, 7 are wanted: `brfx train --model resnet20 "):
        load_float(build_model("resnet20", 7), path)
    with pytest.raises(CheckpointError, match=r"it lacks layer1\.3\.conv1\.weight.* more.*another architecture"):
        load_float(build_model("resnet32", 10), path)
    with pytest.raises(CheckpointError, match=r"has beyond the model's layer1\.2"):
        state = build_model("resnet20").state_dict()
        small = build_model("resnet20")
        del small.layer1[2]
        torch.save(state, path)
        load_float(small, path)


def loaded_with_new_head(name, classes, wanted, path, **build):
    """The parameters made anew for ``wanted`` classes of a checkpoint of ``classes``; the rest is compared."""
    trained, model = build_model(name, classes, **build), build_model(name, wanted, **build)
    torch.save(trained.state_dict(), path)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    head = load_float(model, path, new_head=True)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] if key in head else trained.state_dict()[key]), key
    return head


def test_a_head_of_other_classes_is_made_anew_and_the_rest_is_loaded(tmp_path, caplog):
    caplog.set_level(logging.INFO, "brfx")
    path = tmp_path / "ckpt.pth"
    assert loaded_with_new_head("resnet20", 10, 4, path) == ("linear.weight", "linear.bias")
    assert caplog.messages == [f"{path}: linear made anew, from 10 to 4 classes"]
    assert loaded_with_new_head("squeezenet1_1", 6, 3, path) == ("classifier.1.weight", "classifier.1.bias")
    segmentation = loaded_with_new_head("lraspp_mobilenet_v3_large", 5, 2, path)  # two heads
    layers = {key.rpartition(".")[0] for key in segmentation}
    assert layers == {"classifier.low_classifier", "classifier.high_classifier"}
    caplog.clear()
    detection = loaded_with_new_head("ssdlite320_mobilenet_v3_large", 7, 2, path)  # six anchors of each class
    assert len(detection) == 12 and "from 7 to 2 classes" in caplog.text
    assert loaded_with_new_head("resnet20", 4, 4, path) == ()


HEAD_ANYWHERE = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, width=8):
        super().__init__()
        self.scores = nn.Linear(width, num_classes)
        self.scale = nn.BatchNorm1d(num_classes)
        self.body = nn.Linear(4, width)

    def forward(self, x):
        return self.scale(self.scores(self.body(x)))

def net(num_classes=10):
    return Net(num_classes)

def wide(num_classes=10):
    return Net(num_classes, width=2 * num_classes)

def fixed():
    return Net(10)
"""


def test_the_head_is_what_the_classes_shape_wherever_it_stands(tmp_path):
    file, path = tmp_path / "net.py", tmp_path / "ckpt.pth"
    file.write_text(HEAD_ANYWHERE)
    head = loaded_with_new_head(f"{file}:net", 10, 3, path)
    assert {key.partition(".")[0] for key in head} == {"scores", "scale"}
    with pytest.raises(CheckpointError, match=r"does not fit Net: scores.weight is .3, 8. in the file and .10, 8."):
        model = build_model(f"{file}:net", 3)
        torch.save(model.state_dict(), path)
        load_float(build_model(f"{file}:fixed"), path, new_head=True)
    with pytest.raises(CheckpointError, match=r"does not fit Net: .*more shapes differ"):
        loaded_with_new_head(f"{file}:wide", 10, 3, path)  # no layer of the body may be lost on the way


def test_another_width_is_not_taken_for_other_classes(tmp_path, resnet):
    path = tmp_path / "ckpt.pth"
    state = resnet.state_dict()
    state["conv1.weight"] = torch.zeros(8, 3, 3, 3)
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"does not fit CifarResNet: conv1.weight is .8, 3, 3, 3. in the file"):
        load_float(build_model("resnet20", 10), path, new_head=True)
    state["linear.weight"], state["linear.bias"] = torch.zeros(5, 64), torch.zeros(5)
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"does not fit CifarResNet"):
        load_float(build_model("resnet20", 10), path, new_head=True)


def test_a_prefix_and_a_head_of_other_classes_together(tmp_path, resnet):
    path = tmp_path / "ckpt.pth"
    torch.save({"state_dict": {f"model.net.{key}": value for key, value in resnet.state_dict().items()}}, path)
    model = build_model("resnet20", 3)
    assert load_float(model, path, new_head=True) == ("linear.weight", "linear.bias")
    assert torch.equal(model.conv1.weight, resnet.conv1.weight)


def test_of_several_state_dicts_one_is_taken_and_said_or_chosen(tmp_path, resnet, caplog):
    caplog.set_level(logging.INFO, "brfx")
    path, average = tmp_path / "ckpt.pth", build_model("resnet20", 10)
    state, ema = resnet.state_dict(), {f"module.{key}": value for key, value in average.state_dict().items()}
    torch.save({"model_ema": ema, "state_dict": state, "optimizer": {"state": {0: {"step": torch.ones(1)}}}}, path)
    model = build_model("resnet20", 10)
    load_float(model, path)
    assert torch.equal(model.conv1.weight, resnet.conv1.weight)
    assert caplog.messages == [f"{path}: took state_dict of it, not model_ema (--ckpt-key)"]
    load_float(model, path, key="model_ema")
    assert torch.equal(model.conv1.weight, average.conv1.weight)
    with pytest.raises(CheckpointError, match=r"--ckpt-key ema: none of this name; it has model_ema, state_dict, bn1"):
        load_float(model, path, key="ema")
    torch.save({"a": {"net": state}, "b": {"net": ema}}, path)
    with pytest.raises(CheckpointError, match=r"--ckpt-key net: 2 of this name; it has a.net, b.net"):
        load_float(model, path, key="net")
    load_float(model, path, key="a.net")
    assert torch.equal(model.conv1.weight, resnet.conv1.weight)


def test_of_several_networks_in_one_state_dict_one_is_taken_and_said_or_chosen(tmp_path, resnet, caplog):
    caplog.set_level(logging.INFO, "brfx")
    path, average = tmp_path / "ckpt.pth", build_model("resnet20", 10)
    state = {f"model.{key}": value for key, value in resnet.state_dict().items()} | {"loss.weight": torch.ones(10)}
    state |= {f"ema.module.{key}": value for key, value in average.state_dict().items()}
    torch.save({"state_dict": state}, path)
    model = build_model("resnet20", 10)
    load_float(model, path)
    assert torch.equal(model.conv1.weight, resnet.conv1.weight)
    assert f"{path}: took the keys behind model., not loss.weight, ema.module.conv1.weight" in caplog.messages[0]
    load_float(model, path, key="ema")
    assert torch.equal(model.conv1.weight, average.conv1.weight)


class Renamed(nn.Module):
    """Has renamed a layer since its first version, as torchvision's transformers have."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.new1, self.fc = nn.Linear(3, 4), nn.Linear(4, 2)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        if (local_metadata.get("version") or 1) < 2:
            for key in [key for key in state_dict if key.startswith(f"{prefix}old.")]:
                state_dict[key.replace("old.", "new1.")] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


@pytest.mark.parametrize("spelling", ["old", "new.1"])
def test_keys_of_before_a_renaming_are_translated(tmp_path, spelling):
    trained, model = Renamed(), Renamed()
    path = tmp_path / "ckpt.pth"
    torch.save({key.replace("new1", spelling): value for key, value in trained.state_dict().items()}, path)
    load_float(model, path)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in trained.state_dict().items())
