import torch
from torch import nn

from brfx.passes import SplitShared

from .helpers import assert_rewrites


def test_each_call_of_a_shared_relu_gets_its_own():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x):
            return self.relu(self.relu(x) - 1)

    gm = assert_rewrites(
        Net(),
        SplitShared(),
        "x = input\nrelu = ReLU(x)\nsub = sub(relu)\nrelu_1 = ReLU(sub)\nreturn relu_1",
        "x = input\nrelu = ReLU(x)\nsub = sub(relu)\nrelu_1 = ReLU(sub)\nreturn relu_1",
        sites=1,
    )
    calls = [node.target for node in gm.graph.nodes if node.op == "call_module"]
    assert calls == ["relu", "relu_1"]
    assert gm.get_submodule("relu") is not gm.get_submodule("relu_1")
    x = torch.randn(4, 4) * 3
    assert torch.equal(gm(x), (x.relu() - 1).relu())


def test_a_shared_weight_stays_one_weight():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return self.fc(self.fc(x))

    text = "x = input\nfc = Linear(x)\nfc_1 = Linear(fc)\nreturn fc_1"
    gm = assert_rewrites(Net(), SplitShared(), text, text, sites=0)
    assert len(list(gm.parameters())) == 2


def test_a_shared_module_with_buffers_stays_one_module():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3, affine=False)

        def forward(self, x):
            return self.bn(self.bn(x) * 2)

    text = "x = input\nbn = BatchNorm2d(x)\nmul = mul(bn)\nbn_1 = BatchNorm2d(mul)\nreturn bn_1"
    gm = assert_rewrites(Net(), SplitShared(), text, text, sites=0)
    gm(torch.randn(2, 3, 4, 4))
    assert gm.bn.num_batches_tracked == 2 and list(gm.state_dict()) == list(Net().state_dict())
