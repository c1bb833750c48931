"""What a packed file gives by itself is what the integer form gives, bit for bit."""

import pytest
import torch
from torch import nn

import brfx
from brfx.errors import ExportError
from brfx.export.integer import integer_model
from brfx.export.packed import export_packed
from brfx.export.packed_runner import packed_runner
from brfx.models import build_model


class Mixed(nn.Module):
    """Operations of many kinds: pooling, norms of other kinds, a layer in floating point, slices, padding."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, stride=2)
        self.norm, self.pool = nn.GroupNorm(2, 8), nn.MaxPool2d(2, ceil_mode=True)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        x = self.bn(self.conv(x)).relu()
        x = nn.functional.silu(self.norm(self.pool(self.depthwise(x))))
        x = nn.functional.pad(self.up(x), (0, 1, 0, 1))[:, :, 1:]
        return self.fc(torch.sigmoid(x).mean((2, 3)))


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (Mixed(), {"bits": 2}),
        (Mixed(), {"bits": 3, "skip": ("depthwise", "fc"), "per_channel": True}),
        (Mixed(), {"bits": 2, "weight_grid": "symmetric"}),
        (build_model("resnet20"), {"bits": 2}),
        (build_model("mobilenet_v3_small", 4), {"weight_bits": 4, "act_bits": 8}),
    ],
    ids=["mixed", "float layers", "symmetric", "resnet20", "mobilenet"],
)
def test_the_file_gives_what_the_integer_form_gives(tmp_path, model, settings):
    torch.manual_seed(0)
    x = torch.randn(3, 3, 32, 32)
    qmodel = brfx.prepare_qat(model, brfx.QATConfig(**settings), x).eval()
    brfx.calibrate(qmodel, [x])
    run = packed_runner(export_packed(qmodel, tmp_path / "model.safetensors"))
    with torch.no_grad():
        expected = integer_model(qmodel).model(x)
    (found,) = run(x)
    assert found.shape == expected.shape and torch.equal(found, expected)


def test_what_it_does_not_know_is_named(tmp_path, tiny, images):
    import json

    from safetensors import safe_open
    from safetensors.numpy import save_file

    qmodel = brfx.prepare_qat(tiny)
    brfx.calibrate(qmodel, [images])
    path = export_packed(qmodel, tmp_path / "model.safetensors")
    with safe_open(path, framework="np") as file:
        header, stored = (
            json.loads(file.metadata()["brfx"]),
            {name: file.get_tensor(name) for name in file.offset_keys()},
        )
    node = next(node for node in header["nodes"] if node["op"] == "mean")

    def given(op, **attributes):
        node["op"], node["attributes"] = op, {**node["attributes"], **attributes}
        save_file(stored, path, metadata={"brfx": json.dumps(header)})
        return packed_runner(path)(images)

    for op in ("nonsense", "load", "save", "_C", "__reduce__", "set_default_dtype", "warnings", "from_file"):
        with pytest.raises(ExportError, match=f"brfx does not run the operation '{op}'"):
            given(op)
    with pytest.raises(ExportError, match=r"mean.* \(mean\) failed: "):
        given("mean", dim=[7])
    with pytest.raises(ExportError, match=r"mean.* \(map_\) failed: 'save' is no dtype"):
        given("map_", callable={"dtype": "save"})
