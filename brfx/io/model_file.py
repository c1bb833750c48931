"""brfx's own ``model.pt``, written and read."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from brfx.calibration import require_calibrated
from brfx.config import QATConfig, code_file
from brfx.data import Preprocessing
from brfx.errors import CheckpointError, ConfigError
from brfx.graph.call_arguments import Calls
from brfx.graph.trace import Tracing, is_plain
from brfx.io.atomic import write_atomically
from brfx.io.state_dict import versioned
from brfx.io.torch_file import read_file
from brfx.metadata import ModelMetadata, metadata_of
from brfx.models import ModelSource, build_model
from brfx.nn import Quantizer
from brfx.prepare import rewrite, unwrapped

_FORMAT = 1


def float_state_dict(qmodel: nn.Module) -> dict[str, Tensor]:
    """The FP32 weights and buffers of a rewritten model under the original model's keys."""
    own = {
        f"{name}.{key}"
        for name, module in qmodel.named_modules(remove_duplicate=False)
        if isinstance(module, Quantizer)
        for key in module.state_dict()
    }
    return {key: value for key, value in qmodel.state_dict().items() if key not in own}


def save(qmodel: nn.Module, path: str | Path) -> None:
    """Write a calibrated model so that :func:`load` can rebuild it: plain data, no code, written atomically.

    Raises:
        NotCalibratedError: a quantizer has no step.
        ConfigError: an argument that the trace held fixed is no plain value.
    """
    require_calibrated(qmodel)
    metadata = metadata_of(qmodel)
    content = {
        "format": "brfx",
        "format_version": _FORMAT,
        "brfx": version("brfx"),
        "config": asdict(metadata.config),
        "source": metadata.source and asdict(metadata.source),
        "preprocessing": metadata.preprocessing and asdict(metadata.preprocessing),
        "classes": metadata.classes and list(metadata.classes),
        "tracing": _plain(metadata.tracing),
        "state_dict": {key: value.detach().cpu() for key, value in qmodel.state_dict().items()},
    }
    write_atomically(Path(path), content)


def is_brfx_file(path: Path) -> bool:
    """Whether ``path`` is a file that :func:`save` wrote."""
    if path.suffix == ".safetensors" or not path.is_file():
        return False
    content = read_file(path)
    return isinstance(content, Mapping) and content.get("format") == "brfx"


def source_of(path: Path) -> ModelSource | None:
    """How the float model of a file that :func:`save` wrote was built; ``None`` where the file does not say."""
    content = read_file(path)
    source = content.get("source") if isinstance(content, Mapping) else None
    try:
        return ModelSource(**source) if source else None
    except TypeError as error:
        raise CheckpointError(f"{path}: a brfx file with something changed ({_first_line(error)})") from error


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Read what :func:`save` wrote, on the CPU and in eval mode.

    Args:
        path: the file.
        model: the float model it was made from, where that is one of the user's own; its weights do not matter.

    Raises:
        CheckpointError: the file cannot be read, is not brfx's, does not fit ``model``, or needs one; or a type that
            was not to be traced into is neither in ``model`` nor beside its class.
        ConfigError: the first call of ``model`` registers hooks, and it was not made.
    """
    path = Path(path)
    content = read_file(path)
    if not isinstance(content, Mapping) or content.get("format") != "brfx":
        raise CheckpointError(
            f"{path}: not a model that brfx.save wrote; load FP32 checkpoints with --model NAME --ckpt"
        )
    if content.get("format_version") != _FORMAT:
        raise CheckpointError(f"{path}: format {content.get('format_version')}, this brfx reads {_FORMAT}; update brfx")
    try:
        config = QATConfig(**content["config"])
        source = ModelSource(**content["source"]) if content["source"] else None
        preprocessing = Preprocessing.from_dict(content["preprocessing"]) if content["preprocessing"] else None
        classes = tuple(content["classes"]) if content["classes"] else None
        state = dict(content["state_dict"])
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(
            f"{path}: a brfx file with something missing or changed ({_first_line(error)})"
        ) from error
    if model is None:
        if source is None or code_file(source.name):
            whose = f"was built by {source.name}" if source else "is of a class of your own"
            raise CheckpointError(
                f"{path}: the model {whose}, and no code is run from a file: brfx.load(path, model=...)"
            )
        model = build_model(source.name, source.num_classes, cifar_stem=source.cifar_stem)
    model = unwrapped(model)
    qmodel = rewrite(model, config, _tracing(content.get("tracing"), model, path))
    try:
        qmodel.load_state_dict(versioned(state, qmodel))
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit the model: {' '.join(str(error).split())[:300]}") from error
    metadata: ModelMetadata = metadata_of(qmodel)
    metadata.source, metadata.preprocessing, metadata.classes = source, preprocessing, classes
    return qmodel.eval()


def _plain(tracing: Tracing) -> dict[str, Any]:
    """How a model was traced, in words and numbers; types by their names."""
    for name, value in (tracing.concrete_args or {}).items():
        if not is_plain(value):
            raise ConfigError(f"concrete_args: {name} is a {type(value).__name__}, and a file holds plain values only")
    return {
        "concrete_args": tracing.concrete_args and dict(tracing.concrete_args),
        "leaf_modules": [_name(kind) for kind in tracing.leaf_modules],
        "calls": asdict(tracing.calls),
    }


def _tracing(content: Any, model: nn.Module, path: Path) -> Tracing:
    """What :func:`_plain` wrote. Types come from the model, its module and torch; nothing is imported for a file."""
    if content is None:  # written before files told
        return Tracing()
    try:
        leaves = tuple(_leaf(str(name), model, path) for name in content["leaf_modules"])
        return Tracing(content["concrete_args"], leaves, Calls(**content["calls"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: a brfx file with something missing or changed ({_first_line(error)})"
        ) from error


def _leaf(name: str, model: nn.Module, path: Path) -> type[nn.Module]:
    for kind in dict.fromkeys(base for module in model.modules() for base in type(module).__mro__):
        if _name(kind) == name and issubclass(kind, nn.Module):
            return kind
    module, _, qualified = name.partition(":")
    if module == type(model).__module__ or module.split(".")[0] in ("torch", "torchvision"):
        value: Any = sys.modules.get(module)
        for part in qualified.split("."):
            value = getattr(value, part, None)
        if isinstance(value, type) and issubclass(value, nn.Module):
            return value
    raise CheckpointError(f"{path}: was traced with {name} as one of leaf_modules, and the model has no such module")


def _name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
