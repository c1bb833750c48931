"""Rewritten modules stay of the user's class: subclasses that are made at run time, and how these are copied and
pickled."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from brfx.errors import ConfigError, first_line

#: Modules that Python code iterates, indexes and counts.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def copied(model: nn.Module) -> Any:
    """A deep copy, in which activations that a module keeps, as torch copies none, are detached.

    Raises:
        ConfigError: a module cannot be copied, or a copy would be another one; names it.
    """
    _require_whole_copy(model)
    try:
        return copy.deepcopy(model, detached(model))
    except Exception as error:  # whatever the attribute's class raises
        raise ConfigError(
            f"{type(model).__name__} cannot be copied, and brfx works on a copy: {_first_not_copied(model)} "
            f"is what stops it ({first_line(error)}); set it after prepare_qat, or give its class a __deepcopy__"
        ) from error


def _require_whole_copy(model: nn.Module) -> None:
    """Raise ConfigError for what ``copy.deepcopy`` lets the copy share with the model, or leaves out of it."""
    own = {id(module): name for name, module in model.named_modules()}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            cells = value.__closure__ if isinstance(value, types.FunctionType) else None
            if any(id(held) in own for held in map(_content, cells or ())):
                raise ConfigError(
                    f"{f'{name}.{key}'.lstrip('.')} is a function that holds a module of the model, and brfx works on "
                    "a copy, whose function would go on with the original: make it a method of its class"
                )
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks:
            raise ConfigError(
                f"{name} has a hook on its gradient, and brfx works on a copy, whose parameters have none: register it "
                "after prepare_qat"
            )


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # still empty
        return None


def detached(model: nn.Module) -> dict[int, Any]:
    """A detached copy for each module attribute that is a tensor with a history, for ``copy.deepcopy``."""
    kept = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return {id(value): value.detach().clone() for value in kept if value.grad_fn is not None}


def _first_not_copied(model: nn.Module) -> str:
    for name, module in model.named_modules():
        own = {**vars(module), **module._parameters, **module._buffers}
        for key, value in own.items():
            if key not in ("_modules", "_parameters", "_buffers"):
                try:
                    copy.deepcopy(value, detached(module))
                except Exception:
                    return f"{name}.{key}".lstrip(".")
    return "one of its modules"


class Derived(nn.Module):
    """A base of classes made by :func:`derived`: by these and the instance's attributes it is copied and pickled."""

    _bases: tuple[type, type]

    @property
    def user_class(self) -> type:
        """The class of the user's that this one is made from."""
        return self._bases[1]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, self._bases, self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self).copy()


def derived(base: type, kind: type) -> type:
    """A new subclass of ``base`` and ``kind`` under the name of ``kind``; methods of ``base`` go first."""
    between = [_of_container(kind)] if issubclass(kind, _CONTAINERS) else []
    bases = (base, *(cls for cls in between if not issubclass(base, cls)), kind)

    def fill(namespace: dict[str, Any]) -> None:
        namespace.update(_bases=(base, kind), __module__=kind.__module__, __doc__=kind.__doc__)

    new = types.new_class(kind.__name__, bases, exec_body=fill)
    new.__qualname__ = kind.__qualname__
    return new


def _blank(base: type, kind: type) -> Any:
    return object.__new__(_shared(base, kind) if getattr(base, "shared_class", False) else derived(base, kind))


_shared: Callable[[type, type], type] = functools.cache(derived)


def derive(module: nn.Module, base: type) -> None:
    """Make ``module`` an instance of ``base`` too; modules of one class share the new one."""
    module.__class__ = _shared(base, type(module))


class Container(Derived):
    """A ``Sequential``, ``ModuleList`` or ``ModuleDict`` with quantizers beside the user's children.

    Its length, iteration and items are those of the user's children alone, named in ``_own_children``.
    """

    shared_class = True


def _of_container(kind: type) -> type:
    """A base with the methods of ``kind`` by which Python code sees its children."""

    def over_own(name: str) -> Callable[..., Any]:
        def method(self: Any, *args: Any) -> Any:
            return getattr(kind, name)(_own(self, kind), *args)

        return method

    names = ("__len__", "__iter__", "__getitem__", "__contains__", "__reversed__", "keys", "values", "items")
    return type("_OwnChildren", (), {name: over_own(name) for name in names if hasattr(kind, name)})


def _own(module: Any, kind: type) -> Any:
    """The module with the user's children alone; as the user's class, which slices make new ones of."""
    view: Any = object.__new__(kind)
    vars(view).update(vars(module))
    own = vars(module).get("_own_children", module._modules)
    vars(view)["_modules"] = {name: module._modules[name] for name in own if name in module._modules}
    return view


def keep_containers(rewritten: nn.Module, model: nn.Module) -> None:
    """Let every container of ``rewritten`` have the length, the order and the items that it has in ``model``."""
    modules: Mapping[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    for name, module in list(rewritten.named_modules(remove_duplicate=False)):
        own = modules[name]._modules if name in modules else module._modules
        if isinstance(module, _CONTAINERS) and list(own) != list(module._modules):
            vars(module)["_own_children"] = tuple(own)
            if not isinstance(module, Derived):
                derive(module, Container)
