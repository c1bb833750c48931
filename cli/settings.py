"""From what was typed to a job's settings: flags over ``--config`` over ``--recipe`` over the flags' defaults."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from brfx.config import TEACHER_SHARE, JobConfig, QATConfig, TrainConfig, code_file, read_job_config
from brfx.config.recipes import Settings, read_recipe, read_settings
from brfx.errors import ConfigError

from .options import default_of

#: What a resumed run may be given anew: where things are, and how often it is saved.
_MAY_CHANGE = {
    *("resume", "model", "ckpt", "teacher", "data", "data_dir", "download", "workers", "device", "checkpoint_minutes"),
}


def build_job(command: str, given: dict[str, Any]) -> JobConfig:
    """Sort the parsed options into the settings they belong to; of a run that is resumed they are its own.

    A flag that was given wins over ``--config``, that over ``--recipe``, that over the flags' defaults.
    """
    resume = given.pop("resume", None)
    if resume is not None:
        return _resumed_job(command, resume, given)
    recipe, config = given.pop("recipe", None), given.pop("config", None)
    freeze = {"freeze_weight_alpha": True, "freeze_act_alpha": True} if given.pop("freeze_alpha", False) else {}
    flags = _by_place(_of_command_line(given) | freeze)
    settings = _with_grid(_from_files(command, recipe, config, flags).under(flags))
    defaults = _by_place(given)
    if settings.job.get("teacher") is not None and "distill" not in settings.train:
        settings.train["distill"] = TEACHER_SHARE
    with _named_as_typed():
        return JobConfig(
            qat=QATConfig(**settings.qat),
            train=TrainConfig(**defaults.train | settings.train),
            **defaults.job | settings.job | {"command": command},
        )


@contextmanager
def _named_as_typed() -> Iterator[None]:
    """Let an error about a setting that came from a flag name the flag: ``bits=9: ...`` becomes ``--bits 9: ...``."""
    try:
        yield
    except ConfigError as error:
        context = click.get_current_context()
        named = re.match(r"(\w+)=", str(error))
        if named is None or context.get_parameter_source(named[1]) != ParameterSource.COMMANDLINE:
            raise
        flag = next(option for each in context.command.params if each.name == named[1] for option in each.opts)
        raise ConfigError(f"{flag} {str(error)[named.end() :]}") from error


def _with_grid(settings: Settings) -> Settings:
    """``settings`` with a grid for the weights where they have none: symmetric at 2 bits, which trains to more accuracy
    (docs/results.md); signed at others, and where layers are quantized as the papers do it."""
    qat = settings.qat
    bits = qat.get("weight_bits") or qat.get("bits", default_of(QATConfig, "bits"))
    if "weight_grid" in qat or bits != 2 or qat.get("placement") == "paper":
        return settings
    overrides = [(pattern, own if own is None else _signed_above_4(own)) for pattern, own in qat.get("overrides", ())]
    return replace(settings, qat=qat | {"weight_grid": "symmetric", "overrides": tuple(overrides)})


def _signed_above_4(override: dict[str, Any]) -> dict[str, Any]:
    bits = override.get("weight_bits", override.get("bits", 0))
    return {"weight_grid": "signed"} | override if isinstance(bits, int) and bits > 4 else override


def _of_command_line(given: dict[str, Any]) -> dict[str, Any]:
    """What the user typed, of all options."""
    context = click.get_current_context()
    return {name: given[name] for name in given if context.get_parameter_source(name) == ParameterSource.COMMANDLINE}


def _by_place(given: dict[str, Any]) -> Settings:
    places: dict[str, dict[str, Any]] = {"job": {}, "qat": {}, "train": {}}
    kinds = {"qat": QATConfig, "train": TrainConfig}
    where = {field.name: place for place, kind in kinds.items() for field in fields(kind)}
    for name, value in given.items():
        places[where.get(name, "job")][name] = value
    return Settings(**places)


def _from_files(command: str, recipe: str | None, config: Path | None, flags: Settings) -> Settings:
    """The settings of ``--recipe`` and ``--config``; what is code in them, the user must have named."""
    settings = Settings() if recipe is None else read_recipe(recipe)
    if config is None:
        return settings
    if recipe is not None and config.suffix == ".json":
        raise ConfigError(f"{config} has every setting, so --recipe {recipe} would change none: leave one of them out")
    own = read_settings(config)
    if own.job.get("command", command) != command != "inspect":
        raise ConfigError(f"{config}: is of `brfx {own.job['command']}`, not of `brfx {command}`")
    for name in ("model", "teacher"):
        value = own.job.get(name)
        if value is not None and code_file(value.partition("=")[0]) and name not in flags.job:
            raise ConfigError(f"{config}: its {name} is code, which runs only if you name it: --{name} {value}")
    return settings.under(own)


def _resumed_job(command: str, run_dir: Path, given: dict[str, Any]) -> JobConfig:
    new = _of_command_line(given)
    fixed = sorted(set(new) - _MAY_CHANGE)
    if fixed:
        raise ConfigError(f"--resume goes on with the run's own settings: leave --{fixed[0].replace('_', '-')} out")
    if not run_dir.is_dir():
        raise ConfigError(f"{run_dir}: no such run to resume")
    job = read_job_config(run_dir)
    if job.command != command:
        raise ConfigError(f"{run_dir}: was begun by `brfx {job.command}`, so resume it with that")
    if code_file(job.model) and new.get("model") != job.model:
        raise ConfigError(f"{run_dir}: its model is code, which runs only if you name it: --model {job.model}")
    if new.get("model", job.model) != job.model:
        raise ConfigError(f"{run_dir}: was begun with --model {job.model}, so resume it with that")
    if job.teacher is not None and code_file(job.teacher.partition("=")[0]) and "teacher" not in new:
        raise ConfigError(f"{run_dir}: its teacher is code, which runs only if you name it: --teacher {job.teacher}")
    names = {field.name for field in fields(TrainConfig)} & set(new)
    train = replace(job.train, **{name: new.pop(name) for name in names})
    return replace(job, train=train, **new)
