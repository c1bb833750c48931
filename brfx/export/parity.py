"""Compare two forms of a model: codes layer by layer, outputs, decisions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import GraphModule, Node

from brfx.export.integer import IntegerModel
from brfx.export.layers import IntegerConv, Requantize
from brfx.graph.mode_branches import pruned
from brfx.graph.utils import call_sites
from brfx.modes import eval_mode
from brfx.nn import ActivationQuantizer


@dataclass(frozen=True)
class SiteParity:
    """One quantizer: of ``codes`` codes, ``flipped`` differ, by ``largest`` codes at most.

    Each layer is given the trained model's own input, so that a difference shows where it arises.
    """

    site: str
    codes: int
    flipped: int
    largest: int

    def __add__(self, other: SiteParity) -> SiteParity:
        """The same site on more images."""
        largest = max(self.largest, other.largest)
        return SiteParity(self.site, self.codes + other.codes, self.flipped + other.flipped, largest)


@torch.no_grad()
def compare_codes(qmodel: nn.Module, integer: IntegerModel, *inputs: Tensor) -> list[SiteParity]:
    """The trained model's codes against the integer form's, on one batch; for models that are one graph."""
    if not isinstance(qmodel, GraphModule) or not isinstance(integer.model, GraphModule):
        return []
    with eval_mode(qmodel):
        running = _Quantized(qmodel)
        running.run(*inputs)
    comparing = _Comparing(integer.model, running.seen)
    comparing.run(*inputs)
    return comparing.found


class _Running(fx.Interpreter):
    """Runs a graph with lists that can be changed, as its own code has them: Swin3d changes one it is given."""

    def fetch_args_kwargs_from_env(self, n: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return _mutable(args), _mutable(kwargs)


class _Quantized(_Running):
    """Runs the trained model, and keeps the output of each call of an activation quantizer."""

    def __init__(self, module: GraphModule) -> None:
        graph = pruned(module, False) if getattr(module, "has_mode_branches", False) else module.graph
        super().__init__(module, graph=graph)
        self.sites, self.seen = call_sites(graph), dict[str, Tensor]()

    def run_node(self, n: Node) -> Any:
        output = super().run_node(n)
        if n in self.sites and isinstance(self.module.get_submodule(str(n.target)), ActivationQuantizer):
            self.seen[self.sites[n]] = output.detach().clone()
        return output


class _Comparing(_Running):
    """Runs the integer form, and goes on from the trained model's value at every site that has one."""

    def __init__(self, module: GraphModule, seen: dict[str, Tensor]) -> None:
        super().__init__(module)
        self.seen, self.found = seen, list[SiteParity]()

    def run_node(self, n: Node) -> Any:
        output = super().run_node(n)
        module = self.module.get_submodule(str(n.target)) if n.op == "call_module" else None
        if not isinstance(module, (IntegerConv, Requantize)) or module.site not in self.seen:
            return output
        expected = self.seen[module.site]
        scale = module.y.scale if isinstance(module, IntegerConv) else module.scale_out
        distance = ((output - expected) / scale).round().abs()
        self.found.append(SiteParity(module.site, distance.numel(), int((distance > 0).sum()), int(distance.max())))
        return expected


def _mutable(value: Any) -> Any:
    """``value`` with plain lists in the place of those of a graph."""
    if isinstance(value, list):
        return [_mutable(item) for item in value]
    if type(value) is tuple:
        return tuple(_mutable(item) for item in value)
    if isinstance(value, dict):
        return {key: _mutable(item) for key, item in value.items()}
    return value
