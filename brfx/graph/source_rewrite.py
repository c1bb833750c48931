"""Linear algebra inside Python that torch.fx cannot trace: the source is rewritten, call site by call site.

A function that branches on shapes stays one node of a graph (``torch.fx.wrap``) or lies in a module that is not traced
at all. Its products are found in its *source*, and ``F.linear(x, w)``, ``q.matmul(k)`` and ``q @ k`` become
``sites[0](F.linear, x, w)``, ``sites[1]("matmul", q, k)`` and ``sites[2]("@", q, k)``. There is one
:class:`QuantizedCall` per place in the source, known before anything runs: so state dicts, ``copy.deepcopy`` and
``torch.compile`` see ordinary modules.

Plain functions that it calls by name are opened in the same way.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import inspect
import operator
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from brfx.errors import CheckpointError
from brfx.graph.torch_ops import LINEAR, is_attention, linear_op, name_of
from brfx.graph.user_classes import Derived, derive
from brfx.quant.factory import activation_quantizer, weight_quantizer
from brfx.quant.quantizer import ActivationQuantizer, WeightQuantizer

_ATTENTION: Final = "scaled_dot_product_attention"
_METHODS: Final = frozenset({"matmul", "mm", "bmm", "mv", "addmm", "baddbmm", "addbmm"})
_OPERATORS: Final[dict[str, Callable[..., Any]]] = {"@": operator.matmul, "@=": operator.imatmul}
_SITES: Final = "_brfx_sites"
_REASON: Final = "in Python code; sign from calibration"


class QuantizedCall(nn.Module):
    """One call site of linear algebra: quantizes the two operands, then calls the function.

    Weights have one step per tensor, since their shapes are not known before the call.

    Args:
        kind: a name in :data:`brfx.graph.torch_ops.LINEAR`, or ``scaled_dot_product_attention``.
        weight_bits, act_bits: of an operand that is a weight by its role, as in ``F.linear``, and of every other one;
            ``None`` leaves it as it is.
        weights: what else :func:`brfx.quant.factory.weight_quantizer` takes.

    Attributes:
        left, right: the operands' quantizers; ``right`` is an :class:`WeightQuantizer` if the operand is a weight.
        attention: in the place of both for ``scaled_dot_product_attention``.
    """

    left: ActivationQuantizer | None
    right: ActivationQuantizer | WeightQuantizer | None
    attention: nn.Module | None

    def __init__(self, kind: str, weight_bits: int | None, act_bits: int | None, **weights: Any) -> None:
        super().__init__()
        self.kind = kind
        self.left = self.right = self.attention = None
        if kind == _ATTENTION:
            if act_bits is not None:
                from brfx.nn.attention import QuantizedAttention

                self.attention = QuantizedAttention(act_bits)
            return
        if act_bits is not None:
            self.left = activation_quantizer(act_bits, signed=None, reason=_REASON)
        if LINEAR[kind].weight:
            self.right = None if weight_bits is None else weight_quantizer(weight_bits, **weights)
        elif act_bits is not None:
            self.right = activation_quantizer(act_bits, signed=None, reason=_REASON)
        for quantizer in (self.left, self.right):
            if quantizer is not None:
                quantizer.optional = True  # the call may stand in a branch that is never taken

    def forward(self, function: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Any:
        """``function(*args, **kwargs)``; a word is a method of the first argument, or the operator ``@`` or ``@=``.

        What turns out not to be torch's linear algebra on floating point tensors is called as it is.
        """
        known = isinstance(args[0], Tensor) if isinstance(function, str) else _is(function, self.kind)
        if known and self.attention is not None:
            return self.attention(*args, **kwargs)
        if known and self.kind in LINEAR:
            if self.kind == "einsum" and len(args) == 2 and isinstance(args[1], list | tuple):
                args = (args[0], *args[1])
            args, kwargs = self._quantize(args, kwargs)
            return self.call(function, args, kwargs)
        return _call(function, args, kwargs)

    def call(self, function: Callable[..., Any] | str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operation itself, on quantized operands."""
        return _call(function, args, kwargs)

    def _quantize(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        op = LINEAR[self.kind]
        operands = op.operands(args, kwargs)
        if not all(isinstance(operand, Tensor) and operand.is_floating_point() for operand in operands):
            return args, kwargs
        changed = list(args)
        for (place, name), quantizer, operand in zip(
            (op.left, op.right), (self.left, self.right), operands, strict=True
        ):
            if quantizer is not None and place < len(args):
                changed[place] = quantizer(operand)
            elif quantizer is not None:
                kwargs = {**kwargs, name: quantizer(operand)}
        return tuple(changed), kwargs

    def extra_repr(self) -> str:
        return self.kind


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is(function: Callable[..., Any], kind: str) -> bool:
    """Whether this is torch's function of that name, which torch.compile cannot trace but may ask once."""
    return name_of(function) == kind


def _call(function: Callable[..., Any] | str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not isinstance(function, str):
        return function(*args, **kwargs)
    if function in _OPERATORS:
        return _OPERATORS[function](*args)
    return getattr(args[0], function)(*args[1:], **kwargs)


@dataclass(frozen=True)
class Rewritten:
    """A function whose call sites go through modules.

    Attributes:
        function: the new function; its first parameter is the list of sites, then come the original's.
        kinds: what each site calls, for :class:`QuantizedCall`; or the rewritten function that it calls.
        places: where each site is, as ``"file:line: expression"``.
        original: the user's function.
    """

    function: types.FunctionType
    kinds: list[str | Rewritten]
    places: list[str]
    original: types.FunctionType

    def sites(self, weight_bits: int | None, act_bits: int | None, **weights: Any) -> nn.ModuleList:
        return nn.ModuleList(
            QuantizedFunction(kind, weight_bits, act_bits, **weights)
            if isinstance(kind, Rewritten)
            else QuantizedCall(kind, weight_bits, act_bits, **weights)
            for kind in self.kinds
        )


@functools.lru_cache(maxsize=1024)  # a model calls the same few functions in every block
def rewrite(function: object, attribute: str | None = None) -> Rewritten | None:
    """The function with each call site of linear algebra sent through a module.

    The new function shares the original's globals, closure and defaults, and its lines: tracebacks and debuggers show
    the original's source.

    Args:
        function: a plain function; nothing is found in anything else.
        attribute: for methods: where the new one finds its sites on ``self``, in the place of an extra parameter.

    Returns:
        ``None`` if there is no site, or no source: builtins, lambdas, functions
        behind a decorator that wraps them. Nor is an operation itself opened (``torch.einsum`` is Python).
    """
    return _rewrite(function, attribute, ())


def _rewrite(function: object, attribute: str | None, callers: tuple[object, ...]) -> Rewritten | None:
    node = _definition(function)
    if node is None or not isinstance(function, types.FunctionType) or function in callers:
        return None
    rewriter = _Rewriter(function, (*callers, function))
    node.body = [rewriter.visit(statement) for statement in node.body]
    parameters = node.args.posonlyargs or node.args.args
    if not rewriter.kinds or (attribute is not None and not parameters):
        return None
    if attribute is None:
        (node.args.posonlyargs or node.args.args).insert(0, ast.copy_location(ast.arg(_SITES), node))
    else:
        owner = ast.Name(parameters[0].arg, ast.Load())
        bind = ast.Assign([ast.Name(_SITES, ast.Store())], ast.Attribute(owner, attribute, ast.Load()))
        node.body.insert(0, ast.copy_location(bind, node))
    return Rewritten(_build(node, function), rewriter.kinds, rewriter.places, function)


def find_sites(function: object) -> list[str]:
    """Lines of a function's own source that have linear algebra, as ``"file:line: expression"``."""
    rewritten = rewrite(function)
    return rewritten.places if rewritten else []


class QuantizedFunction(nn.Module):
    """A function that torch.fx cannot trace, as a module with quantized linear algebra.

    Attributes:
        sites: a :class:`QuantizedCall` for each place in the source.
        places: the places, as ``"file:line: expression"``.
    """

    sites: nn.ModuleList

    def __init__(self, rewritten: Rewritten, weight_bits: int | None, act_bits: int | None, **weights: Any) -> None:
        super().__init__()
        self.function, self.places, self.original = rewritten.function, rewritten.places, rewritten.original
        self.sites = rewritten.sites(weight_bits, act_bits, **weights)

    @classmethod
    def of(
        cls, function: object, weight_bits: int | None, act_bits: int | None, **weights: Any
    ) -> QuantizedFunction | None:
        """``None`` where :func:`rewrite` finds nothing to quantize."""
        rewritten = rewrite(function)
        return cls(rewritten, weight_bits, act_bits, **weights) if rewritten else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.sites, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "function"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.function = _rewritten_again(self.original, None, self.sites)

    def extra_repr(self) -> str:
        return self.function.__qualname__


class QuantizedMethods(Derived):
    """A module some of whose methods go through sites: :func:`rewrite_methods`. Pickle takes the methods' names."""

    shared_class = True
    _rewritten_methods: tuple[str, ...]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in self._rewritten_methods}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        for name in self._rewritten_methods:
            original = getattr(self.user_class, name)
            function = _rewritten_again(original, f"{name}_sites", self.get_submodule(f"{name}_sites"))
            vars(self)[name] = types.MethodType(function, self)


def _rewritten_again(original: object, attribute: str | None, sites: nn.Module) -> types.FunctionType:
    """The result of :func:`rewrite` for a function.

    Raises:
        CheckpointError: the function's source has other sites now.
    """
    rewritten = rewrite(original, attribute)
    kinds = [None if isinstance(site, QuantizedFunction) else site.kind for site in sites.children()]
    if rewritten is None or kinds != [kind if isinstance(kind, str) else None for kind in rewritten.kinds]:
        name = getattr(original, "__qualname__", original)
        raise CheckpointError(f"{name} multiplies other matrices than when the model was saved; prepare it anew")
    return rewritten.function


def rewrite_methods(module: nn.Module, weight_bits: int | None, act_bits: int | None, **weights: Any) -> int:
    """Quantize the linear algebra in a module's own methods, on this instance only; its children are left alone.

    The sites of method ``m`` become the submodule ``m_sites``. A method that another one overrides is left alone, so
    ``super().m(...)`` runs the original; so are static and class methods, and what torch itself defines.

    Returns:
        How many sites there are.
    """
    count, seen, names = 0, set[str](), list[str]()
    for cls in type(module).__mro__:
        if cls.__module__.split(".")[0] == "torch" or not issubclass(cls, nn.Module):
            continue
        for name, method in vars(cls).items():
            if name in seen:
                continue
            seen.add(name)
            rewritten = rewrite(method, f"{name}_sites") if isinstance(method, types.FunctionType) else None
            if rewritten:
                module.add_module(f"{name}_sites", rewritten.sites(weight_bits, act_bits, **weights))
                setattr(module, name, types.MethodType(rewritten.function, module))
                names.append(name)
                count += len(rewritten.kinds)
    if names:
        vars(module)["_rewritten_methods"] = tuple(names)
        derive(module, QuantizedMethods)
    return count


class _Rewriter(ast.NodeTransformer):
    """Sends each call site through ``_brfx_sites[index]``, and notes its kind and place."""

    def __init__(self, function: types.FunctionType, callers: tuple[object, ...]) -> None:
        self.callers = callers
        self.kinds: list[str | Rewritten] = []
        self.places: list[str] = []
        code = function.__code__
        self._file, self._known = code.co_filename, dict(function.__globals__)
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # a cell that is still empty
                self._known[name] = cell.cell_contents
        for name in (*code.co_varnames, *code.co_cellvars):
            self._known.pop(name, None)

    def visit_Call(self, node: ast.Call) -> Any:
        target = self._value(node.func)
        if callable(target):
            name = _ATTENTION if is_attention(target) else name_of(target) if linear_op(target) else None
            if name is None and not str(getattr(target, "__module__", "")).startswith("torch."):
                callee = _rewrite(target, None, self.callers)  # another function of the model's own code
                return self._site(node, callee, *node.args) if callee else self.generic_visit(node)
            return self._site(node, name, node.func, *node.args)
        if target is None and isinstance(node.func, ast.Attribute):
            name, owner = node.func.attr.strip("_"), node.func.value
            if name in _METHODS and not (isinstance(owner, ast.Name) and owner.id == "self"):
                return self._site(node, name, ast.Constant(node.func.attr), owner, *node.args)
        return self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> Any:
        if isinstance(node.op, ast.MatMult):
            return self._site(node, "matmul", ast.Constant("@"), node.left, node.right)
        return self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> Any:
        """``a @= b`` becomes ``a = site("@=", a, b)``, unless reading the target twice could do something twice."""
        if not isinstance(node.op, ast.MatMult) or any(isinstance(part, ast.Call) for part in ast.walk(node.target)):
            return self.generic_visit(node)
        value = copy.deepcopy(node.target)
        value.ctx = ast.Load()
        site = self._site(node, "matmul", ast.Constant("@="), value, node.value)
        return ast.copy_location(ast.Assign([node.target], site), node)

    def _value(self, node: ast.expr) -> Any:
        """The value of a name, or of an attribute of a module or class; ``None`` where only a run would tell."""
        if isinstance(node, ast.Name):
            return self._known.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self._value(node.value)
            return getattr(owner, node.attr, None) if isinstance(owner, types.ModuleType | type) else None
        return None

    def _site(self, node: ast.expr | ast.stmt, kind: str | Rewritten | None, *args: ast.expr) -> Any:
        if kind is None:
            return self.generic_visit(node)
        site = ast.Subscript(ast.Name(_SITES, ast.Load()), ast.Constant(len(self.kinds)), ast.Load())
        self.kinds.append(kind)
        self.places.append(f"{self._file}:{node.lineno}: {ast.unparse(node)}")
        keywords = [self.visit(keyword) for keyword in node.keywords] if isinstance(node, ast.Call) else []
        return ast.copy_location(ast.Call(site, [self.visit(arg) for arg in args], keywords), node)


def _definition(function: object) -> ast.FunctionDef | None:
    """The function's syntax tree, with the line numbers of its file."""
    if not isinstance(function, types.FunctionType) or hasattr(function, "__wrapped__") or linear_op(function):
        return None
    try:
        lines, start = inspect.getsourcelines(function)
        block = "if True:" if lines[0][:1].isspace() else ""  # keeps the indentation, and so strings and columns
        tree = ast.parse(f"{block}\n{''.join(lines)}")
    except (OSError, TypeError, SyntaxError):
        return None
    ast.increment_lineno(tree, start - 2)
    node = tree.body[0].body[0] if isinstance(tree.body[0], ast.If) else tree.body[0]
    return node if isinstance(node, ast.FunctionDef) and node.name == function.__code__.co_name else None


def _build(node: ast.FunctionDef, function: types.FunctionType) -> types.FunctionType:
    """The function that ``node`` defines, in the globals, closure and defaults of ``function``.

    The definition is compiled, but never run, inside a function whose parameters are the closure's names, and for a
    method inside its class, for ``super()`` and for ``__private`` names.
    """
    code = function.__code__
    scope = function.__qualname__.split(".")[-2:-1]
    owner = scope[0] if scope and scope[0] != "<locals>" else None
    free = [name for name in code.co_freevars if not (owner and name == "__class__")]
    defined = owner or node.name
    shell = ast.parse(
        f"def _({', '.join(free)}):\n"
        + ("" if defined in free else f" global {defined}\n")
        + (f" class {owner}: pass" if owner else " pass")
    ).body[0]
    assert isinstance(shell, ast.FunctionDef)
    if owner:
        assert isinstance(shell.body[-1], ast.ClassDef)
        shell.body[-1].body = [node]
    else:
        shell.body[-1] = node
    flags = code.co_flags & annotations.compiler_flag
    compiled = compile(
        ast.fix_missing_locations(ast.Module([shell], [])), code.co_filename, "exec", flags, dont_inherit=True
    )
    new = _find(compiled, code)
    assert new is not None
    cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
    result = types.FunctionType(
        new, function.__globals__, function.__name__, function.__defaults__, tuple(cells[n] for n in new.co_freevars)
    )
    functools.update_wrapper(result, function)
    del result.__dict__["__wrapped__"]  # its code is its own
    result.__kwdefaults__ = function.__kwdefaults__
    return result


def _find(code: types.CodeType, like: types.CodeType) -> types.CodeType | None:
    """The code of the same definition, inside ``code``."""
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            if (constant.co_name, constant.co_firstlineno) == (like.co_name, like.co_firstlineno):
                return constant
            if found := _find(constant, like):
                return found
    return None
