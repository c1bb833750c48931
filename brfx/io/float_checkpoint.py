"""FP32 checkpoints as they come: out of their wrappings, under the model's own keys, with another number of classes."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from brfx.errors import CheckpointError
from brfx.hubs import hub_state_dict, hub_weights
from brfx.io.state_dict import versioned
from brfx.io.torch_file import Placeholder, read_file
from brfx.models import build_model

log = logging.getLogger(__name__)

#: Under which names state dicts are looked for first.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "checkpoint")
#: What PyTorch puts into the names of a compiled, sharded or recomputed module, anywhere in them.
_TORCH_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def read_state_dict(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """The state dict in a checkpoint, out of its wrappings (``state_dict``, ``model``, ...), under the file's keys.

    Args:
        path: the file.
        key: which one, if there are several: its name, or with those around it, such as ``checkpoint.model_ema``; or
            the first part of the keys that are wanted. Default: the first of :data:`_WRAPPERS`, which a log line says
            where there are others.

    Raises:
        CheckpointError: as :func:`~brfx.io.torch_file.read_file`, or there is no state dict in the file, or none of
            this name.
    """
    content = read_file(path)
    if isinstance(content, Placeholder):
        raise CheckpointError(
            f"{path}: refused, it holds a whole object ({content.written_as}), whose code is not run: "
            "save model.state_dict() instead of the model"
        )
    found = _state_dicts(content)
    if not found:
        raise CheckpointError(f"{path}: no state dict in it ({_described(content)}); looked under every name")
    if key is None:
        taken = _first(found)
        others = [name for name in found if name != taken and 2 * len(found[name]) >= len(found[taken])]
        if others:
            log.info("%s: took %s of it, not %s (--ckpt-key)", path, taken or "its top", ", ".join(others))
        return dict(found[taken])
    named = [name for name in found if name == key or name.endswith(f".{key}")]
    if len(named) == 1:
        return dict(found[named[0]])
    state = dict(found[_first(found)])
    under = {name: value for name, value in state.items() if name.startswith(f"{key}.")}
    if named or not under:
        known = ", ".join([*filter(None, found), *sorted({name.partition(".")[0] for name in state})][:8])
        raise CheckpointError(f"{path}: --ckpt-key {key}: {len(named) or 'none'} of this name; it has {known}")
    return under


def read_about(path: Path) -> dict[str, Any]:
    """What brfx wrote of the model beside the weights in a run's ``best.pth`` or ``last.pth``: its ``preprocessing``
    and ``classes`` as plain data; nothing where the file is another's.

    Raises:
        CheckpointError: as :func:`~brfx.io.torch_file.read_file`.
    """
    content = read_file(path)
    own = isinstance(content, Mapping) and isinstance(content.get("brfx"), str)
    return {name: content.get(name) for name in ("preprocessing", "classes")} if own else {}


def load_float(
    model: nn.Module, path: Path, *, key: str | None = None, new_head: bool = False, named_by: str = "--model"
) -> tuple[str, ...]:
    """Load an FP32 checkpoint into the model it was trained as.

    The keys may begin with what a trainer put there, at any depth (``module.``, ``model.net.``): it goes where the keys
    then are the model's. Keys of an older version of the model's classes are translated as these classes do it.

    Args:
        model: what :func:`brfx.build_model` made.
        path: the file.
        key: as in :func:`read_state_dict`.
        new_head: of a checkpoint of another number of classes load all but the parameters that this number shapes;
            those stay as ``model`` has them, which a log line says.
        named_by: the flag that said which model, for the error.

    Returns:
        The names of the parameters that stay as they are, none if the checkpoint has the model's classes.

    Raises:
        CheckpointError: as :func:`read_state_dict`; or the first keys and shapes that do not fit, and what to do.
    """
    source = getattr(model, "brfx_source", None)
    if source is not None and hub_weights(source.name) == path:
        state = hub_state_dict(source.name)
    else:
        state = read_state_dict(path, key)
    state = _under_own_keys(state, model, path)
    own = model.state_dict()
    if any(".weight_quantizer." in name for name in state if name not in own):
        raise CheckpointError(
            f"{path}: is of a quantized model, an FP32 one is wanted; use the run's model.pt as --ckpt"
        )
    other = _with_other_classes(model, state)
    fitted = _fitted(state, model if other is None else other.model)
    if fitted is None:
        raise CheckpointError(f"{path} does not fit {type(model).__name__}: {_difference(state, own, named_by)}")
    head = () if other is None else other.head
    if other is not None:
        _tell_of_classes(path, other, new_head, named_by)
    rest = {name: value for name, value in fitted.items() if name not in head}
    model.load_state_dict(versioned(rest, model), strict=False)  # all that may lack: the head, num_batches_tracked
    return head


def _state_dicts(content: Any, name: str = "") -> dict[str, Mapping[str, Tensor]]:
    """Every mapping of names to tensors in ``content``, by the names around it with dots; ``""`` is ``content``."""
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        return {}
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return {name: content}
    inner = (_state_dicts(value, f"{name}.{key}" if name else key) for key, value in content.items())
    return {path: state for found in inner for path, state in found.items()}


def _first(found: Mapping[str, Mapping[str, Tensor]]) -> str:
    """Which of several state dicts is taken: by the order of the names looked for, else the longest."""

    def rank(name: str) -> tuple[Any, ...]:
        parts = [_WRAPPERS.index(part) if part in _WRAPPERS else len(_WRAPPERS) for part in name.split(".")]
        return min(parts) == len(_WRAPPERS), parts if min(parts) < len(_WRAPPERS) else [], -len(found[name])

    return min(found, key=rank)


def _described(content: Any) -> str:
    """What a file without a state dict holds."""
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    objects = [f"{key} is a {value.written_as}" for key, value in content.items() if isinstance(value, Placeholder)]
    keys = f"its keys are {', '.join(map(str, list(content)[:6]))}"
    return "; ".join([keys, *(f"{what}, which is not read" for what in objects[:2])])


def _under_own_keys(state: dict[str, Tensor], model: nn.Module, path: Path) -> dict[str, Tensor]:
    """``state`` without what stands before the model's own keys in it, and without keys that lack it; or with what the
    model has before all of its own, where it is wrapped and the file is of what is inside.

    ``{"model.net.fc.weight": .., "loss.weight": ..}`` is ``{"fc.weight": ..}`` for a model that has ``fc.weight``.
    """
    for wrapper in _TORCH_WRAPPERS:
        state = {name.replace(wrapper, ""): value for name, value in state.items()}
    own = set(model.state_dict())
    first = f"{next(iter(own), '').partition('.')[0]}."
    if all(name.startswith(first) for name in own) and any(first + name in own for name in state):
        return {name if name in own else first + name: value for name, value in state.items()}
    found = Counter[str]()  # prefix: how many of the model's keys are behind it
    for name in state:
        parts = name.split(".")
        ends = (i for i in range(len(parts)) if ".".join(parts[i:]) in own)
        found.update("".join(f"{part}." for part in parts[:i]) for i in ends)
    prefix = max(found, key=lambda prefix: (found[prefix], -len(prefix)), default="")
    if not prefix or found[prefix] == found[""]:
        return state
    left = [name for name in state if not name.startswith(prefix)]
    if left:
        log.info("%s: took the keys behind %s, not %s", path, prefix, _first_three(left))
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _first_three(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@dataclass(frozen=True)
class _OtherClasses:
    """``model`` is of ``classes`` classes where ``wanted`` are wanted; ``head`` are the parameters that they shape."""

    model: nn.Module
    classes: int
    wanted: int
    head: tuple[str, ...]


def _with_other_classes(model: nn.Module, state: Mapping[str, Tensor]) -> _OtherClasses | None:
    """The same model for as many classes as ``state`` has, if that is all that differs; ``None`` if not, or if they
    have the same.

    The number follows from the first shape that differs. What else depends on it shows in the model that is built with
    it, so nothing is known of any layer: a head may be several, and its width a multiple of the classes. Each must be
    the first dimension of its parameter, which no later layer of the model reads.
    """
    source, own = getattr(model, "brfx_source", None), model.state_dict()
    head = tuple(name for name in own if name in state and state[name].shape != own[name].shape)
    if source is None or not head or any(not _first_dimension_differs(state[name], own[name]) for name in head):
        return None
    wanted = source.num_classes or len(own[head[0]])
    classes, rest = divmod(len(state[head[0]]) * wanted, len(own[head[0]]))
    if rest:
        return None
    try:
        other = build_model(source.name, classes, cifar_stem=source.cifar_stem)
    except Exception:  # a factory of the user's, which may take none or not this number
        return None
    built = other.state_dict()
    fits = all(name in built and built[name].shape == state[name].shape for name in head)
    return _OtherClasses(other, classes, wanted, head) if fits else None


def _first_dimension_differs(a: Tensor, b: Tensor) -> bool:
    return a.dim() == b.dim() > 0 and a.shape[1:] == b.shape[1:] and a.shape[0] != b.shape[0]


def _tell_of_classes(path: Path, other: _OtherClasses, new_head: bool, named_by: str) -> None:
    """A log line where the head is made anew, an error where it is not to be."""
    layers = ", ".join(dict.fromkeys(name.rpartition(".")[0] for name in other.head))
    if new_head:
        log.info("%s: %s made anew, from %d to %d classes", path, layers, other.classes, other.wanted)
        return
    flag = "--ckpt" if named_by == "--model" else named_by
    name = getattr(other.model, "brfx_source").name  # noqa: B009  (no attribute that a Module declares)
    raise CheckpointError(
        f"{path}: its {layers} has {other.classes} classes, {other.wanted} are wanted: `brfx train --model {name} "
        f"--ckpt {path} --data DIR` (without --strict) fine-tunes it for {other.wanted}, then take its best.pth as "
        f"{flag}; or take data of {other.classes} classes (`brfx inspect`: --num-classes {other.classes})"
    )


def _fitted(state: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor] | None:
    """``state`` under the model's keys, or ``None`` if it is not of this model.

    Keys of before a renaming in the model's classes become the new ones: as the classes' own loading does it
    (torchvision's transformers), or where they differ in dots alone (its DenseNets).
    """
    own = model.state_dict()
    dotless = {name.replace(".", ""): name for name in own}
    respelt = {dotless.get(name.replace(".", ""), name): value for name, value in state.items()}
    for candidate in (state, respelt) if len(respelt) == len(state) else (state,):
        if not any(_unlike(candidate, own)):
            return candidate
    reader = copy.deepcopy(model)
    try:
        lacking, surplus = reader.load_state_dict(dict(state), strict=False)
    except Exception:  # shapes that differ, or whatever a class of the user's raises
        return None
    return None if surplus or not all(map(_is_counter, lacking)) else reader.state_dict()


def _unlike(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[list[str], list[str], list[str]]:
    """Names that ``state`` lacks, that it has beyond ``own``, and that differ in shape."""
    lacking = [name for name in own if name not in state and not _is_counter(name)]
    surplus = [name for name in state if name not in own]
    return lacking, surplus, [name for name in own if name in state and state[name].shape != own[name].shape]


def _is_counter(name: str) -> bool:
    """Of a batch norm; files of old torch have none, and nothing that is computed needs it."""
    return name.endswith("num_batches_tracked")


def _difference(state: Mapping[str, Tensor], own: Mapping[str, Tensor], named_by: str) -> str:
    lacking, surplus, shapes = _unlike(state, own)
    parts = []
    if shapes:
        name = shapes[0]
        parts.append(f"{name} is {tuple(state[name].shape)} in the file and {tuple(own[name].shape)} in the model")
        if len(shapes) > 1:
            parts[-1] += f" ({len(shapes) - 1} more shapes differ)"
    for what, names in (("lacks", lacking), ("has beyond the model's", surplus)):
        if names:
            parts.append(f"it {what} {_first_three(names)}")
    return f"{'; '.join(parts)}; is it another architecture than {named_by} says?"
