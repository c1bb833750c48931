import torch
from torch import nn
from torch.nn import functional as F

from brfx.passes import ReLUToModule

from .helpers import assert_rewrites


class Net(nn.Module):
    def forward(self, x):
        return F.relu6(torch.relu(F.relu(x, inplace=True).relu()))


def test_functions_and_methods_become_modules():
    gm = assert_rewrites(
        Net(),
        ReLUToModule(),
        """
        x = input
        relu = relu(x)
        relu_1 = relu(relu)
        relu_2 = relu(relu_1)
        relu6 = relu6(relu_2)
        return relu6
        """,
        """
        x = input
        relu_3 = ReLU(x)
        relu_4 = ReLU(relu_3)
        relu_5 = ReLU(relu_4)
        relu_6 = ReLU6(relu_5)
        return relu_6
        """,
        sites=4,
    )
    x = torch.randn(5, 5) * 5
    assert torch.equal(gm(x), x.clamp(0, 6))


def test_other_activations_are_declined():
    class Other(nn.Module):
        def forward(self, x):
            return F.gelu(F.leaky_relu(x))

    text = "x = input\nleaky_relu = leaky_relu(x)\ngelu = gelu(leaky_relu)\nreturn gelu"
    assert_rewrites(Other(), ReLUToModule(), text, text, sites=0)


def test_a_functional_relu_is_named_after_its_scope():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(Net())

        def forward(self, x):
            return self.block(x)

    from brfx.graph.trace import trace

    gm = trace(Outer())
    ReLUToModule()(gm)
    assert next(n.target for n in gm.graph.nodes if n.op == "call_module") == "block.0.relu"
