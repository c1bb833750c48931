"""What a shell completes: names that the library takes, found without importing what is slow to import."""

import os
import subprocess
import sys

import click
import pytest
from brfx_cli import completion
from brfx_cli.main import cli
from click.shell_completion import ShellComplete

from brfx.config.recipes import recipe_names
from brfx.data import DEFAULTS
from brfx.models import CIFAR_RESNETS, model_names


def completed(*words):
    """``(kind, text)`` of what follows these words, the last of which is begun."""
    found = ShellComplete(cli, {}, "brfx", "_BRFX_COMPLETE").get_completions(list(words[:-1]), words[-1])
    return [(item.type, item.value) for item in found]


@pytest.mark.parametrize("command", ["quantize", "train", "evaluate", "inspect", "sensitivity"])
def test_model_completes_every_name_that_can_be_built(command):
    assert completed(command, "--model", "") == [("plain", name) for name in model_names()]
    assert ("plain", "resnet18") in completed(command, "--model", "resnet1")
    assert all(name.startswith("resnet1") for _, name in completed(command, "--model", "resnet1"))


def test_model_completes_names_of_timm_once_they_are_begun():
    pytest.importorskip("timm")
    from brfx.hubs import timm_names

    assert [name for _, name in completed("train", "--model", "ti")] == sorted(timm_names())
    assert ("plain", "timm/resnet18") in completed("train", "--model", "timm/resnet1")
    assert completed("train", "--model", "timm/no-such-model") == [("file", "timm/no-such-model")]


def test_model_completes_folders_and_files_of_ones_own():
    assert completed("train", "--model", "hf/mod") == [("dir", "hf/mod")]
    assert completed("train", "--model", "src/mine.p") == [("file", "src/mine.p")]
    assert completed("verify", "--model", "res") == [("file", "res")]


def test_a_library_that_is_not_there_completes_nothing(monkeypatch):
    monkeypatch.setattr(completion.importlib.util, "find_spec", lambda name: None)
    assert completed("train", "--model", "resnet2") == [("plain", "resnet20")]


@pytest.mark.parametrize("command", ["quantize", "evaluate", "verify"])
def test_data_completes_names_and_folders(command):
    assert completed(command, "--data", "cifar") == [("dir", "cifar"), ("plain", "cifar10"), ("plain", "cifar100")]
    assert completed(command, "--data", "pictures/tr") == [("dir", "pictures/tr")]


def test_recipes_complete_with_what_they_are():
    found = completion.recipes(click.Context(cli), cli.params[0], "")
    assert [item.value for item in found] == recipe_names() and all(item.help.endswith(".") for item in found)
    assert completed("recipes", "br") == [("plain", "br-paper")]


def test_the_names_kept_here_are_the_librarys():
    assert set(completion.DATA) == set(DEFAULTS)
    assert tuple(CIFAR_RESNETS) == completion.CIFAR_RESNETS


def test_nothing_slow_is_imported():
    code = (
        "import sys, brfx_cli.main as main; from click.shell_completion import ShellComplete as S\n"
        "c = S(main.cli, {}, 'brfx', 'X')\n"
        "assert c.get_completions(['train', '--model'], 'timm/r') is not None\n"
        "assert c.get_completions(['train', '--model'], 'resnet') and c.get_completions(['train', '--data'], 'd')\n"
        "print([name for name in ('torch', 'torchvision', 'timm', 'numpy') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert run.stdout.strip() == "[]", run.stderr
