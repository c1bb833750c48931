import sys
import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import brfx
from brfx.data import Preprocessing
from brfx.errors import CheckpointError
from brfx.io.model_file import load_float, read_state_dict
from brfx.metadata import metadata_of
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


def test_the_real_checkpoint(real_checkpoint):
    state = read_state_dict(real_checkpoint)
    own = build_model("resnet20").state_dict()
    assert set(state) == {key for key in own if not key.endswith("num_batches_tracked")}  # the file is older than these


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
        (written("hostile.pth", {"state_dict": Hostile()}), "refused"),
        (written("whole_model.pth", resnet), "refused"),
        (written("numbers.pth", {"epoch": 3, "acc": 0.5}), "no state dict in it.*epoch, acc"),
        (written("list.pth", [1, 2]), "no state dict in it"),
    ]
    for path, message in cases:
        with pytest.raises(CheckpointError, match=message) as caught:
            load_float(build_model("resnet20"), path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert "ran" not in capsys.readouterr().out


def test_mismatches_name_keys_shapes_and_the_way_out(resnet, tmp_path):
    path = tmp_path / "ckpt.pth"
    torch.save(resnet.state_dict(), path)
    with pytest.raises(CheckpointError, match=r"linear.weight is \(10, 64\) in the file and \(7, 64\) in the model"):
        load_float(build_model("resnet20", 7), path)
    with pytest.raises(CheckpointError, match="--num-classes 10"):
        load_float(build_model("resnet20", 7), path)
    with pytest.raises(CheckpointError, match=r"it lacks layer1\.3\.conv1\.weight.* more.*another architecture"):
        load_float(build_model("resnet32", 10), path)
    with pytest.raises(CheckpointError, match=r"has beyond the model's layer1\.2"):
        state = build_model("resnet20").state_dict()
        small = build_model("resnet20")
        del small.layer1[2]
        torch.save(state, path)
        load_float(small, path)


@pytest.fixture
def qmodel(resnet):
    qmodel = brfx.prepare_qat(resnet, brfx.QATConfig(weight_bits=2, act_bits=3, clip_value=6.0, per_channel=True))
    brfx.calibrate(qmodel, [torch.randn(4, 3, 32, 32)])
    return qmodel.eval()


def test_save_and_load_give_the_same_outputs_and_card(qmodel, tmp_path):
    metadata = metadata_of(qmodel)
    metadata.preprocessing, metadata.classes = Preprocessing(32), tuple("abcdefghij")
    brfx.save(qmodel, tmp_path / "model.pt")
    loaded = brfx.load(tmp_path / "model.pt")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x), qmodel(x))
    assert metadata_of(loaded) == metadata
    assert not loaded.training
    assert not list(tmp_path.glob("*.partial"))


def test_a_users_own_model_is_loaded_into_the_model_given(tiny, images, tmp_path):
    qmodel = brfx.prepare_qat(tiny)
    brfx.calibrate(qmodel, [images])
    brfx.save(qmodel, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"no code is run from a file.*model="):
        brfx.load(tmp_path / "model.pt")
    loaded = brfx.load(tmp_path / "model.pt", model=type(tiny)())
    assert torch.equal(loaded(images), qmodel.eval()(images))
    with pytest.raises(CheckpointError, match="does not fit"):
        brfx.load(tmp_path / "model.pt", model=build_model("resnet20"))


def test_a_file_that_names_a_python_file_does_not_run_it(tiny, images, tmp_path):
    factory = tmp_path / "evil.py"
    factory.write_text("raise SystemExit('ran')")
    qmodel = brfx.prepare_qat(tiny)
    brfx.calibrate(qmodel, [images])
    from brfx.models import ModelSource

    metadata_of(qmodel).source = ModelSource(f"{factory}:make")
    brfx.save(qmodel, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="no code is run from a file"):
        brfx.load(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "not a model that brfx"),
        ({"format_version": 99}, "update brfx"),
        ({"config": {"bits": 77}}, "missing or changed .bits=77"),
        ({"config": {"bits": "two"}}, "missing or changed .bits='two'"),
        ({"config": {"tooth": 1}}, "missing or changed"),
        ({"state_dict": {}}, "does not fit|missing"),
    ],
)
def test_tampered_files(qmodel, tmp_path, change, message):
    brfx.save(qmodel, tmp_path / "model.pt")
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    torch.save(content | change, tmp_path / "model.pt")
    with pytest.raises(brfx.BrfxError, match=message):
        brfx.load(tmp_path / "model.pt")


class _Leaf(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.conv(x)


class _Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.leaf, self.conv = _Leaf(), nn.Conv2d(3, 4, 1)

    def forward(self, x, mask=None, double=False):
        y = self.conv(self.leaf(x))
        y = y * 2 if double else y
        return y if mask is None else y * mask


def test_how_a_model_was_traced_is_in_the_file(images, tmp_path):
    mask = torch.rand(8, 1, 8, 8)
    qmodel = brfx.prepare_qat(
        _Optional(), None, (images, mask), concrete_args={"double": True}, leaf_modules=[_Leaf, nn.LSTM]
    )
    brfx.calibrate(qmodel, [(images, mask)], forward=lambda model, batch: model(*batch))
    brfx.save(qmodel, tmp_path / "model.pt")
    loaded = brfx.load(tmp_path / "model.pt", model=_Optional())
    assert torch.equal(loaded(images, mask, True), qmodel.eval()(images, mask, True))
    assert type(loaded.leaf) is _Leaf
    with pytest.raises(CheckpointError, match="test_model_file:_Leaf as one of leaf_modules"):
        brfx.load(tmp_path / "model.pt", model=nn.Conv2d(3, 4, 1))


def test_a_file_written_before_it_told_how_is_read(tiny, images, tmp_path):
    qmodel = brfx.prepare_qat(tiny)
    brfx.calibrate(qmodel, [images])
    brfx.save(qmodel, tmp_path / "model.pt")
    content = torch.load(tmp_path / "model.pt")
    del content["tracing"]
    torch.save(content, tmp_path / "model.pt")
    assert torch.equal(brfx.load(tmp_path / "model.pt", model=tiny)(images), qmodel.eval()(images))


def test_no_module_is_imported_for_a_file(tiny, images, tmp_path):
    qmodel = brfx.prepare_qat(tiny)
    brfx.calibrate(qmodel, [images])
    brfx.save(qmodel, tmp_path / "model.pt")
    content = torch.load(tmp_path / "model.pt")
    for name in ("antigravity:Thing", "torch.nn:Missing", "os:system"):
        content["tracing"]["leaf_modules"] = [name]
        torch.save(content, tmp_path / "model.pt")
        with pytest.raises(CheckpointError, match=f"{name} as one of leaf_modules"):
            brfx.load(tmp_path / "model.pt", model=tiny)
    assert "antigravity" not in sys.modules
