"""Helpers over ``torch.fx`` graphs, in which the passes are written."""

from __future__ import annotations

from collections import Counter
from itertools import count
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from brfx.nn import ActivationQuantizer, Quantizer


def module_calls(gm: GraphModule) -> list[tuple[Node, nn.Module]]:
    """Every ``call_module`` node in order of execution, with the module it calls."""
    return [(node, gm.get_submodule(str(node.target))) for node in gm.graph.nodes if node.op == "call_module"]


def call_counts(gm: GraphModule) -> Counter[str]:
    """The number of nodes that call each submodule."""
    return Counter(str(node.target) for node in gm.graph.nodes if node.op == "call_module")


def call_sites(graph: Graph) -> dict[Node, str]:
    """A name for each ``call_module`` node: its module's, and from the second call of a module on ``name#2`` ..."""
    seen: Counter[str] = Counter()
    sites = {}
    for node in graph.nodes:
        if node.op == "call_module":
            name = str(node.target)
            seen[name] += 1
            sites[node] = name if seen[name] == 1 else f"{name}#{seen[name]}"
    return sites


def scope(node: Node) -> str:
    """Dotted name of the module whose ``forward`` made this node; ``""`` for the model itself."""
    stack = node.meta.get("nn_module_stack")
    return next(reversed(stack)) if stack else ""


def attribute(gm: GraphModule, node: Node) -> Any:
    """The parameter, buffer or module that a ``get_attr`` node reads."""
    value: Any = gm
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def step_node(gm: GraphModule, quantizer: str) -> Node:
    """A node, at the point where nodes are inserted, that reads the step of the quantizer of this name: the parameter,
    or what is computed from it."""
    module = gm.get_submodule(quantizer)
    if "step" in module._parameters or "step" in module._buffers:
        return gm.graph.get_attr(f"{quantizer}.step")
    return gm.graph.call_function(step_of, (gm.graph.get_attr(quantizer),))


def step_of(quantizer: Quantizer) -> Tensor:
    """A quantizer's step; a function, so that a graph can call it."""
    return quantizer.step


def step_read(gm: GraphModule, node: Node) -> Tensor:
    """The step that a :func:`step_node` reads."""
    step: Tensor = step_of(attribute(gm, node.all_input_nodes[0])) if node.target is step_of else attribute(gm, node)
    return step.detach()


def free_name(gm: GraphModule, name: str) -> str:
    """``name``, or ``name_1``, ``name_2`` ... if the GraphModule already has something so called."""
    parent, _, leaf = name.rpartition(".")
    owner: nn.Module | None = gm
    for part in filter(None, parent.split(".")):
        owner = owner._modules.get(part) if owner is not None else None
    taken = set() if owner is None else {*vars(owner), *owner._parameters, *owner._buffers, *owner._modules}
    candidates = (f"{leaf}_{i}" if i else leaf for i in count())
    free = next(candidate for candidate in candidates if candidate not in taken)
    return f"{parent}.{free}".lstrip(".")


def set_module(gm: GraphModule, name: str, module: nn.Module) -> None:
    """Put ``module`` at the dotted ``name``, in the mode of ``gm`` (``add_submodule`` alone leaves it training)."""
    gm.add_submodule(name, module)
    module.train(gm.training)


def replace_with_module(gm: GraphModule, node: Node, name: str, module: nn.Module) -> None:
    """Make ``node`` a call of ``module``, put at ``name``, on its first argument."""
    set_module(gm, name, module)
    source = node.args[0] if node.args else node.kwargs["input"]
    with gm.graph.inserting_before(node):
        new = gm.graph.call_module(name, (source,))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)


def insert_before(gm: GraphModule, node: Node, name: str, module: nn.Module) -> None:
    """Put a call of ``module``, at ``name``, between ``node`` and its first argument."""
    set_module(gm, name, module)
    source = node.args[0]
    with gm.graph.inserting_before(node):
        new = gm.graph.call_module(name, (source,))
    new.meta = dict(node.meta)
    node.args = (new, *node.args[1:])


def insert_after(gm: GraphModule, value: Node, name: str, module: nn.Module) -> Node:
    """Put a call of ``module``, at ``name``, between ``value`` and everything that reads it; the new node."""
    set_module(gm, name, module)
    readers = list(value.users)
    with gm.graph.inserting_after(value):
        new = gm.graph.call_module(name, (value,))
    new.meta = dict(value.meta)
    for reader in readers:
        reader.replace_input_with(value, new)
    return new


def check(gm: GraphModule) -> None:
    """Hold what every pass must ensure.

    Raises:
        RuntimeError: the graph is malformed, a quantizer other than a stream's has more than one call site, or two
            quantizers hold one step. Always a defect of a pass, never of the user's model.
    """
    gm.graph.lint()
    counts = call_counts(gm)
    own = {name for name, module in gm.named_modules() if isinstance(module, Quantizer)}
    own -= {name for name, module in gm.named_modules() if isinstance(module, ActivationQuantizer) and module.is_stream}
    shared = [name for name in sorted(own) if counts[name] > 1]
    if shared:
        raise RuntimeError(f"quantizers called at more than one site: {shared}")
    owners: dict[int, str] = {}
    for name, module in gm.named_modules():
        for scale in module.scales if isinstance(module, Quantizer) else ():
            if (owner := owners.setdefault(id(getattr(module, scale)), name)) != name:
                raise RuntimeError(f"one step in two quantizers: {owner} and {name}")


def dump(gm: GraphModule) -> str:
    """The graph as a few readable lines, one a node: ``relu = ReLU(conv)``."""
    lines = []
    for node in gm.graph.nodes:
        inputs = ", ".join(str(argument) for argument in node.all_input_nodes)
        if node.op == "placeholder":
            lines.append(f"{node.name} = input")
        elif node.op == "output":
            lines.append(f"return {inputs}")
        elif node.op == "call_module":
            lines.append(f"{node.name} = {type(gm.get_submodule(str(node.target))).__name__}({inputs})")
        else:
            lines.append(f"{node.name} = {getattr(node.target, '__name__', node.target)}({inputs})")
    return "\n".join(lines)
