"""Metadata of a rewritten model, so that a file can be read without the model's code."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from torch import nn

from brfx.config import QATConfig
from brfx.errors import BrfxError
from brfx.graph.trace import Tracing

if TYPE_CHECKING:
    from brfx.data import Preprocessing
    from brfx.models import ModelSource

_KEY = "brfx"  # in ``meta``, which a GraphModule has and its deepcopy keeps; plain attributes are lost there


@dataclass
class ModelMetadata:
    """Kept with the model and written into every file.

    Attributes:
        config: what was asked of :func:`brfx.prepare_qat`.
        source: how to build the float model; ``None`` for a module of the user's own.
        preprocessing: what images go through before the model; ``None`` where nobody said.
        classes: names of the outputs; ``None`` where nobody said.
        tracing: how the float model was traced.
    """

    config: QATConfig
    source: ModelSource | None = None
    preprocessing: Preprocessing | None = None
    classes: tuple[str, ...] | None = None
    tracing: Tracing = field(default_factory=Tracing)


def metadata_entries(qmodel: nn.Module) -> dict[str, Any]:
    """Entries of an exported file about its model: settings, preprocessing, classes; plain data."""
    metadata = metadata_of(qmodel)
    return {
        "brfx": version("brfx"),
        "config": asdict(metadata.config),
        "preprocessing": metadata.preprocessing and asdict(metadata.preprocessing),
        "classes": metadata.classes and list(metadata.classes),
    }


def attach(qmodel: nn.Module, metadata: ModelMetadata) -> None:
    """Attach ``metadata`` to ``qmodel``."""
    vars(qmodel).setdefault("meta", {})[_KEY] = metadata


def metadata_of(qmodel: nn.Module) -> ModelMetadata:
    """The metadata of a model that :func:`brfx.prepare_qat` made.

    Raises:
        BrfxError: the model has none.
    """
    metadata = getattr(qmodel, "meta", {}).get(_KEY)
    if not isinstance(metadata, ModelMetadata):
        raise BrfxError(f"this {type(qmodel).__name__} was not made by brfx.prepare_qat")
    return metadata
