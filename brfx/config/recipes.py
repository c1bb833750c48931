"""Settings of a run from files: the recipes that come with brfx, TOML of the user's own, and a run's ``config.json``.
Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from brfx.compat import tomllib
from brfx.config import BR_FORMS, TEACHER_SHARE, JobConfig, QATConfig, TrainConfig, read_job_json
from brfx.errors import ConfigError, explained, first_line

_FOLDER = files("brfx") / "recipes"

_QAT = {field.name for field in fields(QATConfig)}
_TRAIN = {field.name for field in fields(TrainConfig)}
_JOB = {field.name for field in fields(JobConfig)} - {"qat", "train"}


@dataclass(frozen=True)
class Settings:
    """Some of the settings of a run: fields of :class:`JobConfig`, and of its ``qat`` and ``train``."""

    job: dict[str, Any] = field(default_factory=dict)
    qat: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)

    def under(self, above: Settings) -> Settings:
        """These settings, and ``above`` where both say something.

        What follows from another setting by default follows ``above``: weights' and activations' bits its ``bits``, the
        weights' grid their bits; the warm-up its ``epochs``, the steps' rate its ``lr`` and the lambdas its
        ``br_form``, unless they are others here than would follow; the share of distillation its ``teacher``, if it is
        0 here. Of the two budgets that of ``above`` is the one.
        """
        job, qat, train = dict(self.job), dict(self.qat), dict(self.train)
        if "bit_budget" in above.job or "size_budget" in above.job:
            job |= {"bit_budget": None, "size_budget": None}
        if "bits" in above.qat:
            for name in ("weight_bits", "act_bits"):
                qat.pop(name, None)
        if "bits" in above.qat or "weight_bits" in above.qat:
            qat.pop("weight_grid", None)
        if "br_form" in above.job:
            lambdas = BR_FORMS[job.get("br_form", JobConfig.br_form)]
            for name, usual in zip(("lambda_br", "lambda_br_act"), lambdas, strict=True):
                if job.get(name) == usual:
                    del job[name]
        if "teacher" in above.job and not train.get("distill"):
            train.pop("distill", None)
        default = TrainConfig(**{name: train[name] for name in ("epochs", "lr") if name in train})
        for base, following in (("epochs", "warmup_epochs"), ("lr", "step_lr")):
            if base in above.train and train.get(following) == getattr(default, following):
                del train[following]
        return Settings(job | above.job, qat | above.qat, train | above.train)


def recipe_names() -> list[str]:
    """The names that ``--recipe`` accepts."""
    return sorted(path.name.removesuffix(".toml") for path in _FOLDER.iterdir() if path.name.endswith(".toml"))


def recipe_text(name: str) -> str:
    """The recipe as TOML, comments and all, to begin one of your own with.

    Raises:
        ConfigError: there is no such recipe.
    """
    if name not in recipe_names():
        raise ConfigError(f"no recipe is called {name!r}; there are {', '.join(recipe_names())}")
    return (_FOLDER / f"{name}.toml").read_text(encoding="utf-8")


def recipe_summary(name: str) -> str:
    """What a recipe is, in the sentence that its file begins with.

    Raises:
        ConfigError: there is no such recipe.
    """
    return recipe_text(name).partition("\n")[0].removeprefix("# ")


def read_recipe(name: str) -> Settings:
    """The settings of a recipe that comes with brfx.

    Raises:
        ConfigError: there is no such recipe.
    """
    return _sorted(tomllib.loads(recipe_text(name)), name)


def read_settings(path: Path) -> Settings:
    """Settings from TOML, or from a run's ``config.json``, with which a new run begins.

    TOML has the fields of :class:`JobConfig` at its top, those of :class:`TrainConfig` in ``[train]`` and those of
    :class:`QATConfig` in ``[qat]`` or at the top too; ``[[overrides]]`` or ``[[qat.overrides]]`` have a ``match`` and
    settings, or ``fp32 = true``. Of ``config.json`` neither the folder of its run counts nor that it downloaded.

    Raises:
        ConfigError: no such file, no TOML or JSON, a name that is no setting, or a value that a setting cannot have.
    """
    if path.suffix == ".json":
        job = vars(read_job_json(path))
        own = {name: value for name, value in job.items() if name not in ("qat", "train", "output_dir", "download")}
        return Settings(own, dict(vars(job["qat"])), dict(vars(job["train"])))
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(explained(error)) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot read it as TOML ({first_line(error)})") from error
    return _sorted(content, str(path))


def _sorted(content: dict[str, Any], where: str) -> Settings:
    """The settings in a table of TOML."""
    qat = {name: content.pop(name) for name in sorted(_QAT & set(content))}
    table = content.pop("qat", {})
    if not isinstance(table, dict) or (qat and table):
        raise ConfigError(f"{where}: the quantizer's settings stand in a table [qat], or at the top of the file")
    qat |= table
    overrides = qat.get("overrides", [])
    if not isinstance(overrides, list) or not all(map(_is_table_with_match, overrides)):
        raise ConfigError(
            f'{where}: overrides are tables with a match: [[overrides]], match = "conv1", bits = 8 (or fp32 = true)'
        )
    if overrides:
        pairs = [(table.pop("match"), None if table.pop("fp32", False) else table) for table in overrides]
        qat["overrides"] = tuple(pairs)
    return _checked(qat, content, where)


def _checked(qat: dict[str, Any], content: dict[str, Any], where: str) -> Settings:
    """The settings, if every name is one and each table makes settings by itself."""
    train = content.pop("train", {})
    if not isinstance(train, dict):
        raise ConfigError(f"{where}: train={train!r:.200}: takes a table, [train]")
    for table, known in ((content, _JOB | _QAT), (qat, _QAT), (train, _TRAIN)):
        strange = sorted(set(table) - known)
        if strange:
            raise ConfigError(f"{where}: no setting is called {strange[0]!r}; there are {', '.join(sorted(known))}")
    job = {name: _path(value) if name in _PATHS else value for name, value in content.items()}
    try:
        QATConfig(**qat)
        shared: dict[str, Any] = {"distill": TEACHER_SHARE}  # what a teacher has unless the file says otherwise
        JobConfig(**{"command": ""} | job, train=TrainConfig(**shared | train))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return Settings(job, qat, train)


_PATHS = ("ckpt", "data_dir", "output_dir")


def _path(value: Any) -> Any:
    return Path(value) if isinstance(value, str) else value


def _is_table_with_match(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("match"), str)
        and isinstance(value.get("fp32", False), bool)
    )
