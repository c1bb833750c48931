"""What a shell completes beyond commands and choices. It is asked at every press of a key, so nothing here imports
torch or a library of models: their names are read from the libraries' source."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from brfx.config.recipes import recipe_names, recipe_summary

#: Named data sets, and models that are brfx's own; tests hold them to what the library takes.
DATA = ("digits", "cifar10", "cifar100")
CIFAR_RESNETS = ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110")

_TIMM, _HF = "timm/", "hf/"
#: A function that a library lists as a model, under its own name.
_REGISTERED = re.compile(r"^@register_model(?:\(\))?\n(?:(?!def ).*\n)*def (\w+)\(", re.MULTILINE)


def models(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Of ``--model``: names that brfx builds, ``timm/NAME`` once that is begun, folders behind ``hf/``, and files."""
    if incomplete.startswith(_HF):
        return [CompletionItem(incomplete, type="dir")]
    names = [*CIFAR_RESNETS, *_registered("torchvision")]
    if incomplete and (incomplete.startswith(_TIMM) or _TIMM.startswith(incomplete)):
        names += [_TIMM + name for name in _registered("timm")]
    found = [CompletionItem(name) for name in sorted(names) if name.startswith(incomplete)]
    return found or code_files(ctx, param, incomplete)


def code_files(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Of ``--model`` where it is ``path/to/file.py:factory``."""
    return [CompletionItem(incomplete, type="file")]


def data(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Of ``--data``: the names, and folders."""
    names = [CompletionItem(name) for name in DATA if name.startswith(incomplete)]
    return [CompletionItem(incomplete, type="dir"), *names]


def recipes(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of recipes, each with its sentence."""
    return [CompletionItem(name, help=recipe_summary(name)) for name in recipe_names() if name.startswith(incomplete)]


def _registered(library: str) -> list[str]:
    """The models of a library that is installed, from its source; none where it is not, or keeps them otherwise."""
    spec = importlib.util.find_spec(library)
    if spec is None or spec.origin is None:
        return []
    sources = sorted((Path(spec.origin).parent / "models").rglob("*.py"))
    return [name for source in sources for name in _REGISTERED.findall(source.read_text(encoding="utf-8"))]
