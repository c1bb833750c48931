import sys

import pytest
import torch
from torch import nn

import brfx
from brfx.data import Preprocessing
from brfx.errors import CheckpointError
from brfx.metadata import metadata_of
from brfx.models import build_model


@pytest.fixture
def resnet() -> nn.Module:
    torch.manual_seed(3)
    return build_model("resnet20", 10)


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
