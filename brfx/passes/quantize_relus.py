"""Replace ReLUs by quantized clipped ReLUs."""

from dataclasses import dataclass

from torch import nn
from torch.fx import GraphModule, Node

from brfx.config import QATConfig
from brfx.graph.dataflow import operation
from brfx.graph.torch_ops import JOINS, preserves_values
from brfx.graph.utils import module_calls, set_module
from brfx.kernels.hooks import give_hooks
from brfx.nn import ActivationQuantizer
from brfx.quant.factory import relu_quantizer


@dataclass(frozen=True)
class QuantizeReLUs:
    """Swap each ReLU or ReLU6 for a quantized clipped one.

        y = ReLU(x)    ->    y = QuantizedClippedReLU(x)

    With placement ``"deploy"`` a ReLU that does nothing but enter a concatenation is left: what comes out of it is
    quantized as one, on one grid (``QuantizeInputs``), instead of each part on its own and the whole again.

    Requires: one call site per ReLU (``SplitShared``).
    Ensures: no other ReLU module remains in FP32; a second run changes 0 sites.
    """

    config: QATConfig
    scope: str = ""  #: dotted name of the graph in its model, with a dot at the end; "" for the model itself

    def __call__(self, gm: GraphModule) -> int:
        joined = self.config.placement == "deploy"
        relus = {
            str(node.target): module for node, module in module_calls(gm) if not (joined and _only_joined(gm, node))
        }
        swaps = {
            name: new for name, relu in relus.items() if (new := quantized_relu(relu, self.config, self.scope + name))
        }
        for name, quantized in swaps.items():
            set_module(gm, name, quantized)
        return len(swaps)


def _only_joined(gm: GraphModule, node: Node) -> bool:
    """Whether every use of a value, through max-pooling and the like, is a concatenation."""
    uses = []
    for user in node.users:
        name, args, kwargs = operation(gm, user)
        uses.append(name in JOINS or (preserves_values(name, args, kwargs) and _only_joined(gm, user)))
    return bool(uses) and all(uses)


def quantized_relu(module: nn.Module, config: QATConfig, name: str) -> ActivationQuantizer | None:
    """The quantized form of a ReLU or ReLU6, under the lower of its own ceiling and ``config``'s; else ``None``."""
    own = config.at(name, type(module).__name__)
    if own is None or own.act_bits is None or type(module) not in (nn.ReLU, nn.ReLU6):
        return None
    ceilings = [c for c in (own.clip_value, 6.0 if type(module) is nn.ReLU6 else None) if c is not None]
    new = relu_quantizer(own.act_bits, clip_value=min(ceilings, default=None), method=own.act_quantizer)
    give_hooks(module, new)
    return new
