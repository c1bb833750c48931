"""Files that ``torch.save`` or safetensors wrote, read so that no code in them runs."""

from __future__ import annotations

import builtins
import io
import json
import pickle
import pickletools
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch

from brfx.errors import CheckpointError, first_line

#: The end of the name of a file that says in which of several files each weight is.
INDEX = ".index.json"

#: Modules whose functions reach outside the file. A name of theirs is refused, although it would not be run.
_REACH_OUT = {
    *("code", "ctypes", "importlib", "nt", "os", "pickle", "posix", "pty", "runpy", "shutil", "socket", "subprocess"),
    *("sys", "webbrowser"),
}

#: Pickles at the front of a file of torch before 1.6: magic number, version, system, content.
_LEGACY_PICKLES = 4


class Placeholder:
    """What is read instead of an object of any class that is neither a tensor nor a plain value: it takes all that the
    pickle hands it, and does nothing. ``written_as`` is the class in the file."""

    written_as = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Placeholder:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:  # torch 2.6 asks
        raise pickle.UnpicklingError("Can only set items of a dict")


def require_file(path: Path) -> None:
    """Raise CheckpointError if there is no such file; of a run's folder it names the file that is meant."""
    if path.is_file():
        return
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file")
    inside = next((path / name for name in ("model.pt", "best.pth") if (path / name).is_file()), None)
    raise CheckpointError(f"{path}: is a folder, not a checkpoint{'' if inside is None else f': give {inside}'}")


def read_file(path: Path) -> Any:
    """The content of a checkpoint: tensors, plain containers and values, and a :class:`Placeholder` for anything else,
    such as a numpy scalar, an ``argparse.Namespace`` or a date. No file can run code.

    Args:
        path: .safetensors, or whatever ``torch.save`` wrote (zip or legacy), under any name; or the ``.index.json`` of
            weights that Hugging Face's ``save_pretrained`` spread over several files, all of which are read.

    Raises:
        CheckpointError: absent, empty, truncated; or it names a function that would run code, which is refused.
    """
    require_file(path)
    if path.name.endswith(INDEX):
        return _read_shards(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(_placeholders(path)):  # torch's own unpickler, which calls nothing else
            return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        if "nsupported" in str(error) or "Can only" in str(error) or "weights_only" in str(error).lower():
            raise CheckpointError(
                f"{path}: refused, it holds Python objects that cannot be read without running code "
                f"({first_line(error)}); save model.state_dict() alone"
            ) from error
        raise CheckpointError(f"{path}: not a checkpoint, or a damaged one ({first_line(error)})") from error
    except Exception as error:  # torch, zipfile and safetensors each have their own for damaged files
        if "TorchScript" in str(error):
            raise CheckpointError(f"{path}: refused, it is a TorchScript program: save its state_dict()") from error
        raise CheckpointError(
            f"{path}: truncated, damaged or not a checkpoint ({first_line(error)}); copy it again from its source"
        ) from error


def _read_shards(index: Path) -> dict[str, Any]:
    """The weights of all files that an index names.

    Raises:
        CheckpointError: it is no index; a file is not beside it, or lacks a weight that the index says it has.
    """
    try:
        file_of = dict(json.loads(index.read_bytes())["weight_map"])
        files = {str(file): index.parent / str(file) for file in file_of.values()}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index}: not an index of weights ({first_line(error)})") from error
    outside = next((name for name in files if Path(name).name != name or name.endswith(INDEX)), None)
    if outside is not None:
        raise CheckpointError(f"{index}: names {outside!r}, which is no file of weights beside it")
    contents = {name: read_file(file) for name, file in files.items()}
    missing = next((key for key, name in file_of.items() if key not in contents[name]), None)
    if missing is not None:
        raise CheckpointError(f"{files[file_of[missing]]}: lacks {missing}, which {index.name} says it has")
    return {key: contents[name][key] for key, name in file_of.items()}


def _placeholders(path: Path) -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """A class for each name in the file's pickles, for torch to use where it does not know the name itself.

    Raises:
        CheckpointError: the name is of something that runs code.
    """
    found: dict[str, type[Placeholder]] = {}
    for name, before in _globals(path):
        module, _, attribute = name.rpartition(".")
        function = module == "builtins" and not isinstance(getattr(builtins, attribute, object), type)
        if function or module.split(".")[0] in _REACH_OUT:
            raise CheckpointError(
                f"{path}: refused, it would call {name} (behind {before!r} in its pickle), and no code is run from a "
                "file: save model.state_dict() alone"
            )
        found[name] = type("Placeholder", (Placeholder,), {"written_as": name})
    return [(kind, name) for name, kind in found.items()]


def _globals(path: Path) -> Iterator[tuple[str, str]]:
    """Each class or function that a pickle of the file names, and the string before it: the key that it stands under,
    where it is a dictionary's value."""
    for stream, count in _pickles(path):
        try:
            for _ in range(count):
                yield from _globals_of(stream)
        except ValueError:  # damaged, which torch then says better
            continue


def _globals_of(stream: IO[bytes]) -> Iterator[tuple[str, str]]:
    before = ""
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))  # of Python 2
            yield f"{module}.{name}", before
        elif isinstance(argument, str):
            before = argument


def _pickles(path: Path) -> Iterator[tuple[IO[bytes], int]]:
    """The streams of pickles in a file, and how many each has."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            yield file, _LEGACY_PICKLES
        return
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith("data.pkl"):
                yield io.BytesIO(archive.read(name)), 1
