import inspect
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import brfx
from brfx.config import QATConfig
from brfx.data import Preprocessing
from brfx.errors import ExportError, NotCalibratedError
from brfx.export.torch_export import export_torch
from brfx.metadata import metadata_of
from brfx.models import build_model

LOADER = """
import sys
sys.modules["brfx"] = None
import torch
model = torch.export.load(sys.argv[1]).module()
torch.save([model(x) for x in torch.load(sys.argv[2])], sys.argv[3])
assert not any(name.startswith("brfx.") for name in sys.modules)
"""


def outputs_without_brfx(path: Path, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    """What the file gives in a process where brfx cannot be imported."""
    given, found = path.with_name("given.pt"), path.with_name("found.pt")
    torch.save(batches, given)
    command = [sys.executable, "-I", "-c", LOADER, str(path), str(given), str(found)]
    subprocess.run(command, check=True, cwd=path.parent, capture_output=True, text=True)
    return torch.load(found)


def test_loads_where_brfx_is_not_installed(tmp_path):
    torch.manual_seed(0)
    qmodel = brfx.prepare_qat(build_model("resnet20"))
    brfx.calibrate(qmodel, [torch.randn(8, 3, 32, 32)])
    metadata_of(qmodel).preprocessing, metadata_of(qmodel).classes = Preprocessing(32), tuple("abcdefghij")
    state = {key: value.clone() for key, value in qmodel.state_dict().items()}
    path = export_torch(qmodel.train(), tmp_path / "model.pt2", torch.randn(4, 3, 32, 32))
    assert qmodel.training and all(torch.equal(state[key], value) for key, value in qmodel.state_dict().items())
    batches = [torch.randn(size, 3, 32, 32) for size in (1, 3, 4)]
    for x, found in zip(batches, outputs_without_brfx(path, batches), strict=True):
        assert (found - qmodel.eval()(x)).abs().max() < 1e-6
    assert not list(tmp_path.glob("*.partial"))
    extra = {"brfx.json": ""}
    torch.export.load(path, extra_files=extra)
    metadata = json.loads(extra["brfx.json"])
    assert metadata["preprocessing"]["image_size"] == 32 and metadata["classes"] == list("abcdefghij")
    content = b"".join(zipfile.ZipFile(path).read(name) for name in zipfile.ZipFile(path).namelist())
    assert str(Path(brfx.__file__).parent).encode() not in content


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 1},
        {"bits": 4, "per_channel": True, "clip_value": 6.0},
        {"bits": 3, "placement": "paper"},
        {"skip": ("fc",)},
    ],
)
def test_outputs_are_the_models(tmp_path, tiny, images, settings):
    qmodel = brfx.prepare_qat(tiny, QATConfig(**settings))
    brfx.calibrate(qmodel, [images])
    program = torch.export.load(export_torch(qmodel, tmp_path / "model.pt2", images))
    assert not [node for node in program.graph.nodes if "brfx" in str(node.target)]
    model, qmodel = program.module(), qmodel.eval()
    for x in (images, images[:1], images[:5] * 2):
        assert (model(x) - qmodel(x)).abs().max() < 1e-6


def test_weights_are_levels(tmp_path, tiny, images):
    qmodel = brfx.prepare_qat(tiny)
    brfx.calibrate(qmodel, [images])
    state = torch.export.load(export_torch(qmodel, tmp_path / "model.pt2", images)).state_dict
    assert not [key for key in state if "weight_quantizer" in key]
    assert len(state["conv1.weight"].unique()) <= 4


def test_what_cannot_be_written(tmp_path, tiny, images):
    qmodel = brfx.prepare_qat(tiny)
    with pytest.raises(NotCalibratedError):
        export_torch(qmodel, tmp_path / "model.pt2", images)
    brfx.calibrate(qmodel, [images])
    with pytest.raises(ExportError, match="no folder"):
        export_torch(qmodel, tmp_path / "absent" / "model.pt2", images)
    with pytest.raises(ExportError, match=r"torch\.export failed"):
        export_torch(qmodel, tmp_path / "model.pt2", torch.randn(2, 5))
    assert not list(tmp_path.iterdir())


def test_attention(tmp_path):
    torch.manual_seed(0)
    qmodel = brfx.prepare_qat(nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)), QATConfig(bits=4))
    x = torch.randn(4, 5, 8)
    brfx.calibrate(qmodel, [x])
    model = torch.export.load(export_torch(qmodel, tmp_path / "model.pt2", x)).module()
    assert (model(x[:3]) - qmodel.eval()(x[:3])).abs().max() < 1e-6


@pytest.mark.parametrize("case", ["computed", "tied"])
def test_a_weight_that_is_computed_or_that_two_layers_read_has_its_levels(tmp_path, case):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    if case == "computed":
        torch.nn.utils.parametrizations.weight_norm(model[0])
    else:
        model[2].weight = model[0].weight
    x = torch.randn(5, 6)
    qmodel = brfx.prepare_qat(model, brfx.QATConfig(bits=2))
    brfx.calibrate(qmodel, [x])
    qmodel.get_submodule("2").weight_quantizer.step.data.mul_(1.7)
    brfx.export_torch(qmodel.eval(), tmp_path / "model.pt2", x)
    torch.testing.assert_close(torch.export.load(tmp_path / "model.pt2").module()(x), qmodel(x))


class ByMode(nn.Module):
    """Does one thing in training and another in eval; its second argument has a default."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 2)

    def forward(self, x, other=None):
        x = nn.functional.dropout(self.conv(x).relu(), 0.5, self.training)
        return self.fc(x.mean((2, 3)) if other is None else x.mean((2, 3)) + other)


def test_a_model_that_goes_by_its_mode_keeps_its_signature(tmp_path):
    torch.manual_seed(0)
    for inputs in ((torch.randn(4, 3, 8, 8),), (torch.randn(4, 3, 8, 8), torch.randn(4, 4))):
        qmodel = brfx.prepare_qat(ByMode(), None, inputs)
        assert list(inspect.signature(qmodel.forward).parameters) == ["x", "other"]
        brfx.calibrate(qmodel, [inputs], forward=lambda model, batch: model(*batch))
        model = torch.export.load(export_torch(qmodel, tmp_path / "model.pt2", inputs)).module()
        few = tuple(value[:3] for value in inputs)
        torch.testing.assert_close(model(*few), qmodel.eval()(*few))
