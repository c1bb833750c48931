import torch
from torch import nn

import brfx
from brfx.io.float_checkpoint import load_float
from brfx.io.state_dict import versioned
from brfx.models import build_model


class Versioned(nn.Module):
    """Refuses a state dict of no version, as torchvision's MNASNet does."""

    _version = 3

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x))).mean((2, 3))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        assert local_metadata.get("version") == 3
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def test_a_dictionary_rebuilt_key_by_key_gets_the_versions_and_a_state_dict_keeps_its_own():
    model = Versioned()
    model.load_state_dict(versioned(dict(model.state_dict()), model))
    state = model.state_dict()
    state._metadata[""]["version"] = 2
    assert versioned(state, model)._metadata[""]["version"] == 2


def test_a_class_that_asks_for_its_version_is_trained_saved_and_loaded(tmp_path):
    model = Versioned()
    qmodel = brfx.prepare_qat(model)
    images = torch.randn(4, 3, 6, 6)
    brfx.calibrate(qmodel, [images])
    batches = [(images, torch.arange(4))]
    brfx.fit(qmodel, batches, batches, brfx.TrainConfig(epochs=1, compile="off"), run_dir=tmp_path)
    brfx.save(qmodel, tmp_path / "model.pt")
    again = brfx.load(tmp_path / "model.pt", model=Versioned())
    assert all(torch.equal(value, qmodel.state_dict()[name]) for name, value in again.state_dict().items())


def test_a_checkpoint_of_mnasnet_is_read(tmp_path):
    model = build_model("mnasnet0_5", 4)
    torch.save(dict(model.state_dict()), tmp_path / "model.pth")
    other = build_model("mnasnet0_5", 4)
    load_float(other, tmp_path / "model.pth")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
