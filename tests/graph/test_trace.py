import torch
from torch import nn

import brfx
from brfx.calibration import quantizers


def test_a_layer_called_twice_has_one_weight_and_two_inputs():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(torch.tanh(self.fc(x)))

    qmodel = brfx.prepare_qat(Twice())
    assert sorted(quantizers(qmodel)) == ["fc.weight_quantizer", "fc_input", "fc_input_1"]


def test_a_layer_under_two_names_is_one_layer(tmp_path):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
            self.b = self.a

        def forward(self, x):
            return self.b(self.a(x))

    model = Shared()
    qmodel = brfx.prepare_qat(model)
    assert list(brfx.float_state_dict(qmodel)) == list(model.state_dict())
    x = torch.randn(2, 4)
    brfx.calibrate(qmodel, [x])
    brfx.save(qmodel, tmp_path / "m.pt")
    assert torch.equal(brfx.load(tmp_path / "m.pt", model=Shared())(x), qmodel.eval()(x))
