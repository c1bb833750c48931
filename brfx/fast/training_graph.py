"""The form of a rewritten graph that trains fastest in the least memory. It computes the same.

Two things differ. Layers and residual adds keep the *codes* of what they read, and layers those of their weights, a
byte a value instead of four (:mod:`brfx.fast.saved_codes`). And the chains from a layer to the quantizer behind it
(convolution, batch norm, residual add, ReLU, rounding, the bins of the regularizer) can be compiled, each as one
function, for models that otherwise run eagerly.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import getitem
from typing import Any

from torch import Tensor, fx, nn
from torch.fx import GraphModule, Node

from brfx.analysis.observe import ObserveFn, watched
from brfx.fast.saved_codes import (
    CodedTensor,
    apply_with_codes,
    decode,
    dequantized,
    takes_codes,
    weight_with_codes,
    with_codes,
    without_codes,
)
from brfx.graph.mode_branches import pruned
from brfx.graph.torch_ops import name_of
from brfx.graph.traced_module import TracedModule, generated
from brfx.graph.utils import attribute
from brfx.kernels.batch_norm import batch_norm, can_tile
from brfx.kernels.inductor import compiled
from brfx.kernels.training_form import HasTrainingForm
from brfx.nn import ActivationObserver, ActivationQuantizer, Quantizer, ResidualAdd

#: What a chain is made of, besides the layers that it starts with and the quantizer that it ends in.
_LINKS = frozenset({"add", "iadd"})
_LINK_MODULES = (ActivationObserver, ResidualAdd)
#: What reads the floats of a quantizer, besides the adds that are functions.
_READERS = (ActivationObserver, ResidualAdd, ActivationQuantizer)


def is_quantizing(model: nn.Module) -> bool:
    """Whether every quantizer and residual add of ``model`` rounds, and every quantizer has its step: the training form
    knows no other mode."""
    return all(
        module.mode == "quantize" and getattr(module, "calibrated", True)
        for module in model.modules()
        if isinstance(module, (Quantizer, ResidualAdd))
    )


class QuantizedGraph(TracedModule, HasTrainingForm):
    """The result of :func:`brfx.prepare_qat` for a model that can be traced whole."""

    def training_form(self, kernels: bool, *, deferred: bool = True) -> Callable[..., Any]:
        """A function that computes in training what calling this computes; see :func:`training_forward`."""
        return partial(training_forward(self, None, kernels=kernels), self)

    def can_train(self) -> bool:
        return is_quantizing(self)


def training_forward(
    gm: GraphModule, observe_fn: ObserveFn | None, *, kernels: bool, deferred: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """A function ``(gm, *inputs) -> output``, or ``(output, {site: seen})`` with a ``observe_fn``, for training mode.

    Args:
        gm: a rewritten graph, calibrated.
        observe_fn: see :func:`brfx.analysis.observe.observed_forward`.
        kernels: compile chains and the weights' quantizers, for use without ``torch.compile`` around the whole.
        deferred: observes activations instead of ``observe_fn``, with one argument more: ``(quantizer, values,
            logged)``. The function is then ``(gm, logged, *inputs)``.
    """
    graph = pruned(gm, True) if observe_fn is None else watched(gm, True, observe_fn)
    if deferred is not None:
        defer_observation(gm, graph, observe_fn, deferred)
    keep_codes(gm, graph)
    observe_after_writes(graph, {observe_fn, deferred}, kernels=kernels)
    tile_norms(gm, graph)
    if kernels:
        compile_weights(gm, graph)
        compile_chains(gm, graph)
        compile_decoding(graph)
    graph.eliminate_dead_code(_impure)
    return generated(gm, graph)  # type: ignore[no-any-return]


def defer_observation(
    gm: GraphModule, graph: fx.Graph, observe_fn: ObserveFn | None, deferred: Callable[..., Any]
) -> None:
    """Observe activations with a function that reports in backward, as the gradient of ``logged``.

    s = observe_fn(quantizer, x)  ->  s = deferred(quantizer, x, logged)
    """
    with graph.inserting_before(next(iter(graph.nodes))):
        logged = graph.placeholder("logged")
    for node in graph.nodes:
        if node.target is observe_fn and isinstance(attribute(gm, node.args[0]), ActivationQuantizer):
            node.target, node.args = deferred, (*node.args, logged)


def observe_after_writes(graph: fx.Graph, observed: set[Any], *, kernels: bool) -> None:
    """Place each bin count after the write of the quantized activation. Inductor fuses two loops over one tensor only
    if the reduction comes second.

    s = deferred(quantizer, x, logged); c = with_codes(quantizer, x); y = apply_with_codes(conv, c)
    ->  c = with_codes(quantizer, x); y = apply_with_codes(conv, c); s = deferred(quantizer, x, logged)

    Args:
        graph: with codes kept.
        observed: the functions that observe.
        kernels: whether chains are to be compiled, which end where ``with_codes`` does.
    """
    sinks = {_module_of(node): node for node in graph.nodes if node.target is with_codes}
    for node in [node for node in graph.nodes if node.target in observed and _module_of(node) in sinks]:
        sink = sinks[_module_of(node)]
        writers = [] if kernels else [user for user in sink.users if user.target is apply_with_codes]
        next(iter(writers), sink).append(node)


def keep_codes(gm: GraphModule, graph: fx.Graph) -> None:
    """Let what reads a quantizer's output keep its code.

    q = quantizer(x); y = conv(q)  ->  c = with_codes(quantizer, x); y = apply_with_codes(conv, c)
    q = quantizer(x); z = q + y    ->  c = with_codes(quantizer, x); z = dequantized(c) + y
    y = conv(x)                    ->  y = apply_with_codes(conv, without_codes(x))
    """
    for node in list(graph.nodes):
        if not _is(gm, node, ActivationQuantizer):
            continue
        with graph.inserting_before(node):
            pair = graph.call_function(with_codes, (graph.get_attr(str(node.target)), *node.args))
            values = graph.call_function(getitem, (pair, 0))
        for user in list(node.users):
            if user.op == "call_module" and takes_codes(gm.get_submodule(str(user.target))) and user.args == (node,):
                _call_instead(graph, user, apply_with_codes, pair)
            elif _is(gm, user, _READERS) or name_of(user.target) in _LINKS:
                with graph.inserting_before(user):
                    user.replace_input_with(node, graph.call_function(dequantized, (pair,)))
        node.replace_all_uses_with(values)
        graph.erase_node(node)
    for node in list(graph.nodes):
        if node.op == "call_module" and takes_codes(gm.get_submodule(str(node.target))) and len(node.args) == 1:
            with graph.inserting_before(node):
                pair = graph.call_function(without_codes, node.args)
            _call_instead(graph, node, apply_with_codes, pair)


def tile_norms(gm: GraphModule, graph: fx.Graph) -> None:
    """Let batch norms have the sums that compiled code is fast at.

    y = bn(x)  ->  y = batch_norm(bn, x)
    """
    for node in list(graph.nodes):
        if node.op == "call_module" and can_tile(gm.get_submodule(str(node.target))) and len(node.args) == 1:
            _call_instead(graph, node, batch_norm, *node.args)


def _call_instead(graph: fx.Graph, node: Node, function: Callable[..., Any], *args: Any) -> None:
    """``function(module, *args)`` in the place of a call of the module."""
    with graph.inserting_before(node):
        new = graph.call_function(function, (graph.get_attr(str(node.target)), *args))
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def compile_weights(gm: GraphModule, graph: fx.Graph) -> None:
    """Quantize the weights of all layers in one compiled call.

    y = apply_coded(conv, c)  ->  w = _all_weights(conv, ...); y = apply_coded(conv, c, w[0])
    """
    users = [node for node in graph.nodes if node.target is apply_with_codes]
    names = list(dict.fromkeys(_module_of(node) for node in users))
    if not names:
        return
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        weights = graph.call_function(_all_weights, tuple(graph.get_attr(name) for name in names))
        each = {name: graph.call_function(getitem, (weights, index)) for index, name in enumerate(names)}
    for node in users:
        node.args = (*node.args, each[_module_of(node)])


def _all_weights(*layers: Any) -> list[CodedTensor]:
    weights: list[CodedTensor] = _compiled_weights(*layers)
    return weights


def _weights_with_codes(*layers: Any) -> list[CodedTensor]:
    return [weight_with_codes(layer) for layer in layers]


_compiled_weights = compiled(_weights_with_codes)


def compile_chains(gm: GraphModule, graph: fx.Graph) -> None:
    """Make each chain that ends in a quantizer one call of a compiled function.

    y = apply_with_codes(conv, c, w); b = bn(y); d = with_codes(quantizer, b)
    ->  d = chain_0(conv, c, w, bn, quantizer)
    """
    for sink in [node for node in graph.nodes if node.target is with_codes]:
        _compile_chain(gm, graph, _chain(gm, sink))


def _chain(gm: GraphModule, sink: Node) -> list[Node]:
    """The nodes of a chain in order: ``with_codes``, what else observes its input, and what leads there alone."""
    source = sink.args[1]
    assert isinstance(source, Node)
    members = {sink}
    members |= {user for user in source.users if user.args[:1] and _module_of(user) == _module_of(sink) != ""}
    waiting = [source]
    while waiting:
        node = waiting.pop()
        if node not in members and _is_link(gm, node) and set(node.users) <= members:
            members.add(node)
            waiting.extend(node.all_input_nodes)
    return [node for node in sink.graph.nodes if node in members]


def _is_link(gm: GraphModule, node: Node) -> bool:
    if node.op == "call_module":
        return isinstance(gm.get_submodule(str(node.target)), _LINK_MODULES)
    if node.target in (apply_with_codes, batch_norm, dequantized, without_codes):
        return True
    return node.op.startswith("call") and name_of(node.target) in _LINKS


def _compile_chain(gm: GraphModule, graph: fx.Graph, chain: list[Node]) -> None:
    """Modules become arguments, so that equal chains of a model are one function, compiled once."""
    inner, copies, arguments = fx.Graph(), dict[Node, Node](), list[Node]()

    def copied(node: Node) -> Node:
        if node not in copies:
            copies[node] = inner.placeholder(f"x{len(arguments)}")
            arguments.append(node)
        return copies[node]

    with graph.inserting_before(chain[-1]):
        modules = {node: graph.get_attr(str(node.target)) for node in chain if node.op == "call_module"}
    for node in chain:  # placeholders come first
        for read in (*([modules[node]] if node in modules else []), *node.all_input_nodes):
            if read not in chain:
                copied(read)
    for node in chain:
        if node in modules:
            args = fx.node.map_arg((modules[node], *node.args), copied)
            copies[node] = inner.call_function(_call, args)
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), copied)
            copies[node] = inner.create_node(node.op, node.target, args, kwargs)  # no name: equal chains, equal text
    results = [node for node in chain if not set(node.users) <= set(chain)]
    inner.output(tuple(copies[node] for node in results))
    kinds = tuple(_kind(gm, node) for node in arguments)
    with graph.inserting_before(chain[-1]):
        call = graph.call_function(_compiled(inner, kinds), tuple(arguments))
        for index, node in enumerate(results):
            node.replace_all_uses_with(graph.call_function(getitem, (call, index)))
    for node in reversed(chain):
        graph.erase_node(node)


_COMPILED: dict[tuple[Any, ...], Callable[..., Any]] = {}


def _compiled(graph: fx.Graph, kinds: tuple[str, ...]) -> Callable[..., Any]:
    """The compiled function of a chain; chains of one text over modules of one kind share it."""
    key = (graph.python_code("self").src, kinds)
    if key not in _COMPILED:
        run = compiled(generated(nn.Module(), graph))

        def chain(*args: Any) -> Any:
            return run(None, *args)

        chain.__name__ = f"chain_{len(_COMPILED)}"  # what the graph around it calls it
        _COMPILED[key] = chain
    return _COMPILED[key]


def _kind(gm: GraphModule, node: Node) -> str:
    if node.op != "get_attr":
        return ""
    value = attribute(gm, node)
    if isinstance(value, ActivationQuantizer):
        return repr(value)
    return type(value).__name__


def compile_decoding(graph: fx.Graph) -> None:
    """Let layers that are in no chain decode with a compiled function.

    y = apply_coded(fc, c, w)  ->  y = _apply_decoding(fc, c, w)
    """
    for node in graph.nodes:
        if node.target is apply_with_codes:
            node.target = _apply_decoding


def _apply_decoding(layer: nn.Module, x: CodedTensor, weight: CodedTensor) -> Tensor:
    return apply_with_codes(layer, x, weight, _compiled_decode)


_compiled_decode = compiled(decode, dynamic=True)


def _call(module: Callable[..., Any], *args: Any) -> Any:
    return module(*args)


def _is(gm: GraphModule, node: Node, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> bool:
    return node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), kind)


def _module_of(node: Node) -> str:
    first = node.args[0] if node.args else None
    return str(first.target) if isinstance(first, Node) and first.op == "get_attr" else ""


def _impure(node: Node) -> bool:
    """Whether dead-code elimination must keep a node: only ``get_attr`` and the items of tuples may go."""
    return node.op != "get_attr" and node.target is not getitem
