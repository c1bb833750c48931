import copy

import torch
from torch import nn

from brfx.graph.trace import trace


class Net(nn.Module):
    """A layer that is called, and a layer and a buffer that are not."""

    def __init__(self):
        super().__init__()
        self.first, self.aux = nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("unread", torch.ones(2))

    def forward(self, x):
        return self.first(x)


def test_every_name_and_attribute_of_the_model_is_kept():
    model = Net()
    model.note = "kept"
    gm = trace(model)
    for module in (gm, copy.deepcopy(gm)):
        assert list(module.state_dict()) == list(model.state_dict())
        assert module.note == "kept" and hasattr(module, "aux")
    assert not {id(p) for p in gm.parameters()} & {id(p) for p in model.parameters()}
