"""One graph for training and eval: the graphs of the two modes merged, and the merged one cut down to a mode."""

from __future__ import annotations

import itertools
from typing import Any

from torch import fx
from torch.fx import Node

from brfx.graph.functionalize import named_in_place


def select_by_mode(training: Any, evaluation: Any) -> Any:
    """A node of this function is one value in training and another in eval; see :func:`pruned`."""
    raise RuntimeError("a marker in graphs, resolved before they run")


def merge(train: fx.Graph, evaluation: fx.Graph) -> None:
    """Add to ``train`` what ``evaluation`` does differently.

    y = dropout(x, 0.5, True) / y = dropout(x, 0.5, False)  ->  t = select_by_mode(True, False); y = dropout(x, 0.5, t)
    return pair(y, aux)       / return y                    ->  return select_by_mode(pair(y, aux), y)
    c = add_(count, 1)        /                             ->  c = add_(count, 1); select_by_mode(c, None)
    """
    merging = _Merge(train)
    for node in evaluation.nodes:
        merging.take(node)
    merging.mark_changes()


class _Merge:
    """Match each node of the eval graph with its node in the training graph.

    A node that is nowhere in the training graph is paired with the next one there that calls the same thing, on
    arguments that go by the mode, so that both have one quantizer; if there is none it is added.
    """

    def __init__(self, train: fx.Graph) -> None:
        self.train = train
        self.order = {node: (place, 0) for place, node in enumerate(train.nodes)}
        self.unclaimed: dict[tuple[str, str], list[Node]] = {}
        for node in train.nodes:
            self.unclaimed.setdefault((node.op, str(node.target)), []).append(node)
        self.mapping: dict[Node, Node] = {}
        self.added: list[Node] = []
        self.last = next(iter(train.nodes))

    def take(self, node: Node) -> None:
        candidates = self.unclaimed.get((node.op, str(node.target)), [])
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda other: self.mapping[other])
        found = next((other for other in candidates if _equal((other.args, other.kwargs), arguments)), None)
        if found is None and node.op in ("call_module", "call_function", "call_method", "output"):
            found = next((other for other in candidates if self._pair(other, arguments)), None)
        if found is None:
            with self.train.inserting_after(self.last):
                found = self.train.node_copy(node, lambda other: self.mapping[other])
            self.added.append(found)
            place, added = self.order[self.last]
            self.order[found] = (place, added + 1)
        else:
            candidates.remove(found)
        self.mapping[node] = found
        self.last = max(self.last, found, key=lambda other: self.order[other])

    def mark_changes(self) -> None:
        """A change of the model's state that is in one mode alone gets a node that says so, which nothing uses."""
        for node in self.added + list(itertools.chain(*self.unclaimed.values())):
            if changes_state(node):
                with self.train.inserting_after(node):
                    self.train.call_function(select_by_mode, (None, node) if node in self.added else (node, None))

    def _pair(self, candidate: Node, arguments: Any) -> bool:
        """Make ``candidate`` take ``arguments`` in eval, if it comes late enough for them."""
        inputs: list[Node] = []
        fx.node.map_arg(arguments, lambda node: inputs.append(node))
        own = (candidate.args, candidate.kwargs)
        whole = candidate.op == "output"
        if any(self.order[node] >= self.order[candidate] for node in inputs) or not (whole or _alike(own, arguments)):
            return False

        def choose(a: Any, b: Any) -> Any:
            if _equal(a, b):
                return a
            if isinstance(a, (tuple, list)) and _alike(a, b):
                return type(a)(map(choose, a, b))
            if isinstance(a, dict) and _alike(a, b):
                return {key: choose(a[key], b[key]) for key in a}
            with self.train.inserting_before(candidate):
                chosen = self.train.call_function(select_by_mode, (a, b))
            self.order[chosen] = self.order[candidate]
            return chosen

        if whole:
            candidate.args = (choose(own[0][0], arguments[0][0]),)
        else:
            candidate.args = tuple(map(choose, own[0], arguments[0]))
            candidate.kwargs = {key: choose(value, arguments[1][key]) for key, value in own[1].items()}
        return True


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, slice) and isinstance(b, slice):
        return _equal((a.start, a.stop, a.step), (b.start, b.stop, b.step))
    return a is b or (not isinstance(a, Node) and type(a) is type(b) and bool(a == b))


def _alike(a: Any, b: Any) -> bool:
    """Whether two arguments are of one shape: as long, and with the same keys."""
    if type(a) is type(b) and isinstance(a, (tuple, list)) and not hasattr(a, "_fields"):
        return len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_alike(a[key], b[key]) for key in a)
    return not isinstance(a, (tuple, list, dict, slice)) and not isinstance(b, (tuple, list, dict, slice))


def pruned(gm: fx.GraphModule, training: bool) -> fx.Graph:
    """A copy of the graph as it is in one mode: its values instead of ``select_by_mode``, and without what only led to
    others.

    A node that nothing uses, such as an operation in place, is kept unless it belongs to the other mode.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    rejected: set[Node] = set()
    changes: set[Node] = set()
    for node in list(graph.nodes):
        if node.target is select_by_mode:
            chosen, other = node.args if training else node.args[::-1]
            changes |= {other} if not node.users and isinstance(other, Node) else set()
            rejected |= _ancestors(other)
            for user in list(node.users):
                user.args = _replaced(user.args, node, chosen)
                user.kwargs = _replaced(user.kwargs, node, chosen)
            graph.erase_node(node)
    ends = [node for node in graph.nodes if node.op in ("output", "placeholder") or changes_state(node)]
    rejected -= _ancestors([node for node in ends if node not in changes])
    for node in graph.nodes:
        if node.op != "output" and rejected.intersection(node.all_input_nodes):
            rejected.add(node)
    for node in reversed(graph.nodes):
        if node in rejected:
            graph.erase_node(node)
    return graph


def changes_state(node: Node) -> bool:
    """Whether a node changes something in place: in a graph without such operations, the model's state."""
    return node.op.startswith("call_") and node.op != "call_module" and named_in_place(node)


def _replaced(arguments: Any, old: Node, new: Any) -> Any:
    return fx.node.map_arg(arguments, lambda node: new if node is old else node)


def _ancestors(value: Any) -> set[Node]:
    found: set[Node] = set()
    waiting: list[Node] = []
    fx.node.map_arg(value, lambda node: waiting.append(node))
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(node.all_input_nodes)
    return found
