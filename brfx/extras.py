"""Packages that only some of brfx needs: which are missing, and how they are installed."""

from __future__ import annotations

import importlib.util
import re
import shlex
from importlib.metadata import PackageNotFoundError, requires, version

#: Modules that are not called as their packages are.
_MODULES = {"scikit-learn": "sklearn"}


def missing(extra: str) -> list[str]:
    """The requirements of an extra of ``setup.cfg`` that are not installed, such as ``onnx>=1.18``."""
    found = []
    for requirement in requires("brfx") or []:
        what, _, when = requirement.partition(";")
        if re.search(rf"extra\s*==\s*['\"]{re.escape(extra)}['\"]", when) and not _installed(_name(what)):
            found.append(what.strip())
    return found


def needed(what: str, extra: str, error: ImportError | None = None) -> str:
    """An error's line: which packages ``what`` needs, and the command that installs them however brfx itself was
    installed; or, where all are there, why they cannot be imported."""
    requirements = missing(extra)
    if not requirements:
        return f"{what}: a package it needs is installed and cannot be imported ({error})"
    names = ", ".join(map(_name, requirements))
    verb = "is" if len(requirements) == 1 else "are"
    return f"{what} needs {names}, which {verb} not installed: pip install {' '.join(map(shlex.quote, requirements))}"


def _name(requirement: str) -> str:
    return re.split(r"[\s<>=!~\[(;]", requirement.strip(), maxsplit=1)[0]


def _installed(name: str) -> bool:
    """Whether a package is there, or its module, which another package may have brought (onnxruntime-gpu, say)."""
    try:
        version(name)
        return True
    except PackageNotFoundError:
        return importlib.util.find_spec(_MODULES.get(name, name.replace("-", "_"))) is not None
