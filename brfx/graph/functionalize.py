"""A traced graph without operations in place: what they change is a new value, and all that read it read the new one.

Passes move, split and replace nodes. That is right only where a value is what its node computed. A graph of
``torch.fx`` is a list of calls, and in PyTorch a call may change what an earlier one returned, and every view of it.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

from brfx.errors import TraceError
from brfx.graph.torch_ops import name_of, words

#: Calls whose result always shares the memory of their first argument.
_VIEWS = words(
    """
    view view_as transpose permute squeeze unsqueeze expand expand_as narrow select t detach unflatten movedim moveaxis
    swapaxes swapdims chunk split split_with_sizes tensor_split hsplit vsplit dsplit unbind diagonal unfold broadcast_to
    adjoint as_strided view_as_real view_as_complex
    """
)
_RESHAPES = {"view": "reshape", "view_as": "reshape_as"}
_VIEW_ATTRIBUTES = words("data T mT H mH real imag")
#: Calls whose result may share the memory of their arguments: some return them as they are, some copy.
_MAY_SHARE = words(
    """
    reshape reshape_as flatten ravel contiguous to type type_as float half double bfloat16 int long bool short byte char
    cpu cuda dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout stochastic_depth
    drop_block2d drop_block3d broadcast_tensors atleast_1d atleast_2d atleast_3d meshgrid einsum pos positive
    resolve_conj resolve_neg conj pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle getitem getattr
    """
)
_MODULES_MAY_SHARE = (
    nn.Flatten,
    nn.Unflatten,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ChannelShuffle,
    nn.modules.dropout._DropoutNd,
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
)
#: What says something of a tensor that no operation in place changes.
_METADATA = words("shape dtype device ndim layout is_cuda requires_grad names itemsize nbytes")
_MEASURES = words("size dim numel nelement stride ndimension is_floating_point is_complex element_size len")
#: These change the form of one tensor object, and the memory of none.
_NEW_FORM = words("t_ transpose_ squeeze_ unsqueeze_ swapaxes_ swapdims_ detach_")
_NO_CHANGE = words("requires_grad_ share_memory_")
_UNKNOWN_FORM = words("set_ resize_ resize_as_ as_strided_ rename_")
#: Without the last letter these are not the same operation on a copy: other types, another meaning, or nothing.
_ONLY_IN_PLACE = words(
    """
    gt_ ge_ lt_ le_ eq_ ne_ greater_ greater_equal_ less_ less_equal_ not_equal_ logical_and_ logical_or_ logical_xor_
    logical_not_ bernoulli_ copy_ fill_ zero_
    """
)
_OPERATORS: dict[Any, Any] = {
    getattr(operator, f"i{name}"): getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "lshift", "rshift", "xor")
} | {operator.iand: operator.and_, operator.ior: operator.or_}
#: What a tensor that is no value of the graph calls.
_DUNDERS = {f"__{function.__name__}__": function for function in (*_OPERATORS, operator.setitem)}

Step = tuple[str, tuple[Any, ...], dict[str, Any]]


def on_copy(method: str, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The value that the in-place ``value.method(*args)`` would leave in ``value``."""
    out = value.clone()
    getattr(out, method)(*args, **kwargs)
    return out


def assigned(value: Tensor, index: Any, new: Any) -> Tensor:
    """The value that ``value[index] = new`` would leave in ``value``."""
    out = value.clone()
    out[index] = new
    return out


def written(value: Any, new: Tensor, steps: tuple[Step, ...]) -> Any:
    """``value`` with ``new`` in the place of the view of it that ``steps`` lead to, in values of containers too."""
    if isinstance(value, Tensor):
        out = value.clone(memory_format=torch.contiguous_format)  # in which every view is one
        view = out
        for step in steps:
            view = _taken(view, step)
        view.copy_(new)
        return out
    index = steps[0][1][0]
    inner = new if len(steps) == 1 else written(value[index], new, steps[1:])
    if isinstance(value, dict):
        return {**value, index: inner}
    items = list(value)
    items[index] = inner
    return tuple(items)


def _taken(value: Any, step: Step) -> Any:
    name, args, kwargs = step
    if name == "getitem":
        return value[args[0]]
    return getattr(value, args[0]) if name == "getattr" else getattr(value, name)(*args, **kwargs)


def functionalize(graphs: Sequence[fx.Graph], root: nn.Module, *, write_back: bool = False) -> int:
    """Replace each operation in place by one that makes a new value.

        y = x[:, :4]; y.mul_(2); f(x)    ->    y = x[:, :4]; z = y * 2; f(written(x, z, [:, :4]))
        r = F.relu(x, inplace=True); x + r  ->  r = F.relu(x); r + r

    All that reads the changed tensor later, or a view of it, reads what the operation would have left there. Modules
    that are called lose their ``inplace`` flag. What changes a parameter or buffer stays: it is the model's state. The
    caller's tensors are not changed, unless ``write_back``.

    Args:
        graphs: all that were recorded from ``root``, each in one mode, training or eval.
        root: the module whose submodules the graphs call. One with ``inplace=True`` is replaced by a copy that shares
            its parameters and has ``inplace=False``; other users of the original keep it.
        write_back: copy what an input of the graph was changed to into it in the end, for callers that go on with it.

    Returns:
        How many operations were in place, in the graph that has more.

    Raises:
        TraceError: a value may or may not share the memory of what is changed, so that what a later reader of it would
            see is not known; or there is no form of the operation that makes a new value. Names the line.
    """
    count = max(_Functionalization(graph, root).run(write_back) for graph in graphs)
    for target in {str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_module"}:
        module = root.get_submodule(target)
        if _in_place(module):
            module = copy.copy(module)
            module.inplace = False  # type: ignore[assignment]
            root.set_submodule(target, module)
    return count


@dataclass(frozen=True)
class _Place:
    """A value's place: in the memory of ``root``, as the view that ``steps`` lead to."""

    root: Node
    steps: tuple[Step, ...] = ()


class _Functionalization:
    """One walk over a graph in order of execution.

    Attributes:
        places: of every value.
        now: what each root was last changed to.
        changes: how often each root was changed.
        fresh: a value's node as it is after so many changes of its root.
        shared: the roots that may share memory with a root.
        lost: a root whose values are not known any more, with the reason.
        forms: the value that stands for an object since its form was changed.
        numbers: sizes and the like, which are no tensors.
        made: nodes made here that go if nothing reads them.
    """

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        self.graph, self.root = graph, root
        self.places: dict[Node, _Place] = {}
        self.now: dict[Node, Node] = {}
        self.changes: dict[Node, int] = {}
        self.fresh: dict[Node, tuple[int, Node]] = {}
        self.shared: dict[Node, set[Node]] = {}
        self.lost: dict[Node, str] = {}
        self.forms: dict[Node, Node] = {}
        self.constants: dict[str, Node] = {}
        self.numbers: set[Node] = set()
        self.made: list[Node] = []

    def run(self, write_back: bool) -> int:
        count = sum(self._visit(node) for node in list(self.graph.nodes))
        if write_back:
            self._write_back()
        for node in reversed(self.made):
            if not node.users:
                self.graph.erase_node(node)
        self._free_of_layout()
        return count

    def _free_of_layout(self) -> None:
        """Let views be reshapes, which run in any memory format: nothing changes what a view shares any more."""
        for node in self.graph.nodes:
            is_form = node.op == "call_method" and node.target in _RESHAPES
            if is_form and not _is_state(self.places[node].root) and not _asks_for_type(node):
                node.target = _RESHAPES[str(node.target)]

    def _visit(self, node: Node) -> bool:
        if node.op == "call_method" and node.target in _DUNDERS:
            node.op, node.target = "call_function", _DUNDERS[node.target]
        changed = self._changed(node)
        first = _first(node)
        source = self._object(first) if isinstance(first, Node) else None
        self._read(node)
        if changed is None:
            if node.target in _OPERATORS:  # numbers
                node.target = _OPERATORS[node.target]
            self._place(node, source)
            return False
        if _is_state(self.places[changed].root):
            self._stand_in(node, changed)
            return False
        self._make_functional(node)
        self._write(node, changed)
        return True

    def _object(self, value: Node) -> Node:
        """The node of a tensor object, which ``squeeze_()`` and the like give another form."""
        while value in self.forms:
            value = self.forms[value]
        return value

    def _changed(self, node: Node) -> Node | None:
        """The value that a node changes in place."""
        value = None
        if node.op == "call_module":
            value = _first(node) if _in_place(self.root.get_submodule(str(node.target))) else None
        elif node.op in ("call_function", "call_method"):
            value = node.kwargs["out"] if node.kwargs.get("out") is not None else None
            if value is None and (named_in_place(node) or _flag(node)):
                value = _first(node)
        if value is None or value in self.numbers:
            return None
        if not isinstance(value, Node):
            raise self._refused(node, "changes several values in place, or one that is not in the graph")
        return self._object(value)

    def _read(self, node: Node) -> None:
        """Let a node read what its arguments are by now."""
        if _measures(node):
            return
        for value in node.all_input_nodes:
            current = self._current(self._object(value), node)
            if current is not value:
                node.replace_input_with(value, current)

    def _current(self, value: Node, reader: Node) -> Node:
        place = self.places[value]
        if place.root in self.lost:
            raise self._refused(reader, self.lost[place.root])
        changes = self.changes.get(place.root, 0)
        since, node = self.fresh.get(value, (0, value))
        if since == changes:
            return node
        node = self.now[place.root]
        with self.graph.inserting_before(reader):
            for step in place.steps:
                node = self._made(self._taken(node, step), value)
        self.fresh[value] = changes, node
        self._settle(node, place)
        return node

    def _taken(self, value: Node, step: Step) -> Node:
        name, args, kwargs = step
        if name in ("getitem", "getattr"):
            return self.graph.call_function(operator.getitem if name == "getitem" else getattr, (value, *args))
        return self.graph.call_method(name, (value, *args), kwargs)

    def _made(self, node: Node, like: Node) -> Node:
        node.meta = dict(like.meta)
        self.made.append(node)
        return node

    def _settle(self, node: Node, place: _Place) -> None:
        self.places[node] = place
        self.fresh[node] = self.changes.get(place.root, 0), node

    def _settle_later(self, node: Node, place: _Place) -> None:
        """``node`` reads what its place held at first."""
        self.places[node] = place
        self.fresh.setdefault(node, (0, node))

    def _stand_in(self, node: Node, value: Node) -> None:
        """``node`` is the very object ``value``."""
        self.places[node] = self.places[value]
        node.replace_all_uses_with(value)

    def _write(self, node: Node, changed: Node) -> None:
        """``node``, functional by now, is what ``changed`` has become; what it returned was that very object."""
        place = self.places[changed]
        shared = self.shared.get(place.root, set())
        if any(_is_state(other) for other in shared):
            raise self._refused(node, "may change a parameter or buffer in place, or a copy of it: write .clone()")
        for other in shared:
            self.lost[other] = f"{_said(node)}, may change this too, or a copy of it: write .clone() before"
        node.replace_all_uses_with(changed)
        before = self.now.get(place.root, place.root)
        self.changes[place.root] = self.changes.get(place.root, 0) + 1
        self.now[place.root] = node
        if place.steps:
            with self.graph.inserting_after(node):
                whole = self._made(self.graph.call_function(written, (before, node, place.steps)), node)
            self._settle(whole, _Place(place.root))
            self.now[place.root] = whole
        self._settle(node, place)
        self.fresh[changed] = self.changes[place.root], node

    def _make_functional(self, node: Node) -> None:
        """Let ``node`` make the value that it leaves in the place of its argument."""
        if node.op == "call_module":
            return  # its flag goes when all graphs have seen it
        if node.kwargs.get("out") is not None:
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "out"}
        elif _flag(node):
            node.args, node.kwargs = _without_flag(node)
        elif node.target is operator.setitem:
            if isinstance(node.args[1], str):
                raise self._refused(node, "changes a dict in place")
            node.target = assigned
        elif node.target in _OPERATORS:
            node.target = _OPERATORS[node.target]
        elif node.op == "call_function":
            node.target = self._function(node, str(name_in_full(node.target)))
        elif node.target in _UNKNOWN_FORM:
            raise self._refused(node, "changes a tensor's form in place: use the method that makes a new one")
        elif node.target in _ONLY_IN_PLACE or not hasattr(Tensor, str(node.target)[:-1]):
            node.op, node.target, node.args = "call_function", on_copy, (str(node.target), *node.args)
        else:
            node.target = str(node.target)[:-1]

    def _function(self, node: Node, name: str) -> Callable[..., Any]:
        for home in (torch, nn.functional):
            if getattr(home, name, None) is node.target and callable(getattr(home, name[:-1], None)):
                return getattr(home, name[:-1])  # type: ignore[no-any-return]
        raise self._refused(node, "has no form that makes a new value: use the method or operator that does")

    def _place(self, node: Node, source: Node | None) -> None:
        """Say where the result of a node lies that changes nothing; ``source`` is its first argument."""
        if node.op == "get_attr" and not _is_state(node):  # one tensor, however often it is read
            self._settle_later(node, _Place(self.constants.setdefault(str(node.target), node)))
        elif node.op in ("placeholder", "get_attr", "output") or self._is_number(node):
            self._settle(node, _Place(node))
        elif source is not None and node.op == "call_method" and node.target in _NEW_FORM:
            self._reform(node, source)
        elif source is not None and self._is_same(node):
            self._settle(node, self.places[source])
        elif source is not None and (step := self._step(node)) is not None:
            place = self.places[source]
            self._settle(node, _Place(place.root, (*place.steps, step)))
        else:
            self._settle(node, _Place(node))
            self._share_inputs(node)

    def _reform(self, node: Node, source: Node) -> None:
        """``x.squeeze_()``: the object x is ``x.squeeze()`` from now on."""
        place, name = self.places[source], str(node.target)[:-1]
        with self.graph.inserting_before(node):
            new = self.graph.call_method(name, node.args, dict(node.kwargs))
        new.meta = dict(node.meta)
        self._settle(new, _Place(place.root, (*place.steps, (name, node.args[1:], dict(node.kwargs)))))
        self.forms[source] = new
        node.replace_all_uses_with(source)
        self.graph.erase_node(node)

    def _is_same(self, node: Node) -> bool:
        if node.op == "call_module":
            return isinstance(self.root.get_submodule(str(node.target)), nn.Identity)
        return node.op == "call_method" and node.target in _NO_CHANGE

    def _step(self, node: Node) -> Step | None:
        """The view that a node is of its first argument; ``None`` where it is none, or may be a copy."""
        name = name_in_full(node.target)
        rest = node.args[1:] if node.args else ()
        kwargs = {key: value for key, value in node.kwargs.items() if key != "input"}
        if node.op == "call_method":
            return (str(name), rest, kwargs) if name in _VIEWS else None
        if node.op != "call_function":
            return None
        if node.target is operator.getitem:
            return ("getitem", rest, {}) if _is_view_index(rest[0], self.numbers) else None
        if node.target is getattr:
            return ("getattr", rest[:1], {}) if rest[0] in _VIEW_ATTRIBUTES else None
        return (str(name), rest, kwargs) if name in _VIEWS and getattr(torch, str(name), None) is node.target else None

    def _may_share(self, node: Node) -> bool:
        if node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            own = not type(module).__module__.startswith("torch.") and not _inherits_forward(module)
            return own or isinstance(module, _MODULES_MAY_SHARE)
        name = name_of(node.target)
        if node.target is operator.getitem:
            return not _is_copying_index(node.args[1], self.numbers)
        return name is None or name in _MAY_SHARE

    def _share_inputs(self, node: Node) -> None:
        if not self._may_share(node):
            return
        roots = {self.places[value].root for value in node.all_input_nodes if value not in self.numbers}
        group = roots.union(*(self.shared.get(root, set()) for root in roots))
        for member in group:
            self.shared.setdefault(member, set()).add(node)
        self.shared[node] = group
        if node.op == "call_module" and _holds_in_place(self.root.get_submodule(str(node.target))):
            for member in group:
                self.lost[member] = f"{_said(node)} may change its input in place"

    def _is_number(self, node: Node) -> bool:
        home = getattr(node.target, "__module__", "")
        arithmetic = node.op == "call_function" and home in ("_operator", "builtins", "math")
        inputs = node.all_input_nodes
        number = _measures(node) or node.target in ("item", "tolist")
        if number or (arithmetic and bool(inputs) and self.numbers.issuperset(inputs)):
            self.numbers.add(node)
            return True
        return False

    def _write_back(self) -> None:
        output = next(node for node in self.graph.nodes if node.op == "output")
        first = next((node for node in self.graph.nodes if node.op != "placeholder"), output)
        for value in [node for node in self.now if node.op == "placeholder"]:
            new = self._current(value, output)
            with self.graph.inserting_before(first):
                copied = self.graph.call_method("clone", (value,))
            for reader in set(value.users) - {copied}:
                reader.replace_input_with(value, copied)
            with self.graph.inserting_before(output):
                self.graph.call_method("copy_", (value, new))

    def _refused(self, node: Node, reason: str) -> TraceError:
        return TraceError(f"cannot trace {type(self.root).__name__}: {_said(node)}: {reason}")


def detach_data(graph: fx.Graph) -> None:
    """Let ``x.data`` be ``x.detach()``, for ``torch.export``, whose process dies of the former on a parameter.

    They differ in what autograd notices of operations in place, so this is for graphs without gradients.
    """
    for node in graph.nodes:
        if node.op == "call_function" and node.target is getattr and node.args[1] == "data":
            node.op, node.target, node.args = "call_method", "detach", node.args[:1]


def name_in_full(target: Any) -> str | None:
    """torch's name of a function or method with the underscore that says it works in place."""
    if isinstance(target, str):
        return target
    return None if name_of(target) is None else str(target.__name__)


def _first(node: Node) -> Any:
    return node.args[0] if node.args else next(iter(node.kwargs.values()), None)


def named_in_place(node: Node) -> bool:
    """Whether the name of what a node calls says that it changes its first argument: ``add_``, ``operator.iadd``."""
    if getattr(node.target, "__module__", "") == "_operator":  # operator.and_ is none: Python has the word `and`
        return node.target is operator.setitem or node.target in _OPERATORS
    name = name_in_full(node.target) or ""
    return name.endswith("_") and not name.endswith("__") and name not in _NEW_FORM | _NO_CHANGE


def _flag(node: Node) -> bool:
    """Whether ``inplace=True`` is among a function's arguments."""
    if node.op != "call_function" or not inspect.isfunction(node.target):
        return False
    return _bound(node).get("inplace", False) is True


def _asks_for_type(node: Node) -> bool:
    """Whether this is ``x.view(torch.int32)``: the same bytes as other numbers."""
    return any(isinstance(value, torch.dtype) or _is_type(value) for value in (*node.args[1:], *node.kwargs.values()))


def _is_type(value: Any) -> bool:
    return isinstance(value, Node) and value.target is getattr and bool(value.args[1] == "dtype")


def _bound(node: Node) -> dict[str, Any]:
    try:
        return inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return {}


def _without_flag(node: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    signature = inspect.signature(node.target)  # type: ignore[arg-type]
    place = list(signature.parameters).index("inplace")
    args = tuple(False if i == place else value for i, value in enumerate(node.args))
    return args, {key: value for key, value in node.kwargs.items() if key != "inplace"}


def _inherits_forward(module: nn.Module) -> bool:
    return str(getattr(type(module).forward, "__module__", "")).startswith("torch.nn.")


def _measures(node: Node) -> bool:
    """Whether a node reads only what no operation in place changes."""
    if node.target is getattr:
        return node.args[1] in _METADATA
    return node.op.startswith("call_") and node.op != "call_module" and name_of(node.target) in _MEASURES


def _is_state(node: Node) -> bool:
    """Whether this reads a parameter or buffer, not a tensor that ``forward`` makes anew in every call."""
    return node.op == "get_attr" and not str(node.target).rpartition(".")[2].startswith("_tensor_constant")


def _holds_in_place(module: nn.Module) -> bool:
    return any(_in_place(inner) for inner in module.modules())


def _in_place(module: nn.Module) -> bool:
    return getattr(module, "inplace", False) is True


def _parts(index: Any) -> Iterator[Any]:
    if isinstance(index, tuple):
        for part in index:
            yield from _parts(part)
    else:
        yield index


def _is_view_index(index: Any, numbers: set[Node]) -> bool:
    """Whether ``x[index]`` is a view whatever ``x`` is: of slices and numbers only."""
    return all(
        part in numbers if isinstance(part, Node) else not isinstance(part, (list, bool, Tensor))
        for part in _parts(index)
    )


def _is_copying_index(index: Any, numbers: set[Node]) -> bool:
    """Whether a list in an index makes a copy; of a tensor the number of dimensions would decide."""
    return any(isinstance(part, (list, bool)) for part in _parts(index))


def _said(node: Node) -> str:
    name = getattr(node.target, "__name__", str(node.target))
    return f"{name}, called in {node.meta['source_line']}" if "source_line" in node.meta else str(name)
