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


class Net(nn.Module):
    """``how(self, x, **more)`` between two layers."""

    def __init__(self, how):
        super().__init__()
        self.first, self.last, self.how = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4), how
        self.register_buffer("kept", torch.rand(8, 1, 1))

    def forward(self, x, mask=None, scale=2.0, double=False):
        x = self.first(x) if mask is None else self.first(x) * mask
        return self.last(self.how(self, x).mean((2, 3))) * scale * (2 if double else 1)


def scratch(m, x):
    m.kept.copy_(x.detach().mean((0, 2, 3)).view(8, 1, 1))
    return x + m.kept


def averaged(m, x):
    m.kept[:4] = m.kept[:4] * 0.9 + x.detach().mean() * 0.1
    return x + m.kept


PLAIN = {
    "arguments with a default": lambda m, x: x,
    "a mask as a number": lambda m, x: x * (x > 0).float(),
    "sizes": lambda m, x: x.view(x.shape[0], 8, -1, x.shape[3]) / x.ndim,
    "sizes one by one": lambda m, x: x.permute(0, 2, 3, 1).reshape(-1, 8, 8, 8).permute(0, 3, 1, 2).repeat(1, 1, 2, 1),
    "type and device": lambda m, x: x + torch.arange(8, device=x.device, dtype=x.dtype),
    "two conditions": lambda m, x: torch.where((x > 0) & (x < 0.5) | (x < -1), x, 0.0),
}


def prepared(how, *inputs):
    torch.manual_seed(0)
    qmodel = brfx.prepare_qat(Net(how), None, inputs)
    brfx.calibrate(qmodel, [inputs], forward=lambda model, batch: model(*batch))
    return qmodel.eval()


@pytest.mark.parametrize("case", PLAIN)
def test_what_models_do_beside_layers(tmp_path, case):
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    qmodel = prepared(PLAIN[case], x)
    run = packed_runner(export_packed(qmodel, tmp_path / "model.safetensors"))
    for batch in (x, x[:3] * 2):
        assert torch.equal(run(batch)[0], integer_model(qmodel).model(batch))
    with pytest.raises(ExportError, match=r"takes 1 inputs \(x\), was given 2"):
        run(x, x)


def test_an_argument_that_may_be_none_and_is_given_is_an_input(tmp_path):
    x, mask = torch.randn(4, 3, 8, 8), torch.rand(4, 1, 8, 8)
    qmodel = prepared(PLAIN["sizes"], x, mask)
    run = packed_runner(export_packed(qmodel, tmp_path / "model.safetensors"))
    assert torch.equal(run(x, mask)[0], integer_model(qmodel).model(x, mask))


@pytest.mark.parametrize("how", [scratch, averaged])
def test_a_buffer_that_changes_in_every_call_is_no_constant(tmp_path, how):
    qmodel = prepared(how, torch.randn(4, 3, 8, 8))
    with pytest.raises(ExportError, match="changes kept in place in every call, and a packed file has constants"):
        export_packed(qmodel, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_two_operations_called_unfold_are_not_taken_for_each_other(tmp_path):
    x = torch.randn(4, 3, 8, 8)
    qmodel = prepared(lambda m, x: x.unfold(2, 3, 1).sum(-1), x)
    with pytest.raises(ExportError, match="method unfold"):
        export_packed(qmodel, tmp_path / "model.safetensors")
    qmodel = prepared(lambda m, x: nn.functional.unfold(x, 3).view(4, 8, 9, 6, 6).sum(2), x)
    run = packed_runner(export_packed(qmodel, tmp_path / "model.safetensors"))
    assert torch.equal(run(x)[0], integer_model(qmodel).model(x))
