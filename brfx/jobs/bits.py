"""The command line's sensitivities and budgets: which layer has how many bits, and a file that says so."""

from __future__ import annotations

import glob
import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from brfx.analysis.sensitivity import LayerSensitivity, sensitivity
from brfx.bit_budget import assign_bits, free_layers, layer_bits, mean_bits
from brfx.config import JobConfig, QATConfig
from brfx.data import Dataset
from brfx.distributed import broadcast_object, rank
from brfx.errors import ConfigError
from brfx.jobs.data import example_batch, training_images
from brfx.jobs.tasks import training_task
from brfx.metadata import metadata_of
from brfx.prepare import prepare_qat
from brfx.train import Task

log = logging.getLogger(__name__)

#: In the folder of a run with a budget, the bits of each layer as a ``--config``.
BITS_FILE = "bits.toml"
#: There too, what was measured for it; the report draws it.
SENSITIVITY_FILE = "sensitivity.json"


@dataclass(frozen=True)
class BitsReport:
    """What `brfx sensitivity` found.

    Attributes:
        layers: see :func:`brfx.sensitivity`.
        qat: the settings, with an override a layer where there is a budget.
        images: how many were measured on.
    """

    layers: tuple[LayerSensitivity, ...]
    qat: QATConfig
    images: int

    def assigned(self, layer: LayerSensitivity) -> int | None:
        """The bits that the budget gives to a layer's weights; ``None``: it says nothing of it."""
        own = dict(self.qat.overrides).get(glob.escape(layer.name)) if layer.kind == "weights" else None
        return None if own is None else own.get("weight_bits")

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as ``--json`` prints it."""
        layers = [
            {"name": layer.name, "kind": layer.kind, "bits": layer.bits, "values": layer.values}
            | {"losses": {str(bits): loss for bits, loss in layer.losses.items()}, "assigned": self.assigned(layer)}
            for layer in self.layers
        ]
        return {"images": self.images, "layers": layers, "overrides": self.qat.overrides}

    def toml(self) -> str:
        """:func:`settings_toml` of the settings."""
        return settings_toml(self.qat, self.layers)


def measure(
    job: JobConfig, qmodel: nn.Module, batches: Sequence[Tensor], task: Task, *, activations: bool = True
) -> BitsReport:
    """The sensitivities of ``qmodel``, and what the job's budget, if it has one, makes of them.

    Raises:
        ConfigError: the task has no distance between outputs, or as :func:`brfx.assign_bits`.
    """
    distance = task.distance
    if distance is None:
        raise ConfigError(f"no distance between outputs is known for {task.metric}: sensitivities need one")
    layers = sensitivity(
        qmodel,
        batches,
        activations=activations,
        start=job.start,
        distance=lambda output, reference: distance(output, reference, 1.0),
    )
    qat = metadata_of(qmodel).config
    if has_budget(job):
        overrides = assign_bits(qmodel, layers, mean_bits=job.bit_budget, size=job.size_budget)
        qat = replace(qat, overrides=overrides)
    return BitsReport(layers, qat, sum(map(len, batches)))


def bits_within_budget(job: JobConfig, model: nn.Module, dataset: Dataset, head: tuple[str, ...]) -> BitsReport | None:
    """The bits that the job's budget gives to each layer of the FP32 ``model``, the same on all ranks; ``None``: it has
    no budget.

    Layers whose bits are overridden already keep them. Where all are, as in a run that is resumed, nothing is measured.

    Raises:
        ConfigError: the budget is too small, or ``head`` names parameters that the checkpoint has for other classes.
    """
    if not has_budget(job):
        return None
    if head:
        raise ConfigError(
            f"a budget needs an FP32 network to compare with, and {job.ckpt} is of other classes: "
            f"`brfx train --model {job.model} --ckpt {job.ckpt}` first"
        )
    example, report = example_batch(job, dataset, 2), BitsReport((), job.qat, 0)
    if rank() == 0:
        qmodel = prepare_qat(model, job.qat, example).to(job.train.device)
        if free_layers(qmodel):
            images = training_images(job, dataset)
            report = measure(job, qmodel, images, training_task(job, dataset), activations=False)
        else:
            assign_bits(qmodel, (), mean_bits=job.bit_budget, size=job.size_budget)  # refuses what costs too much
        log.info("Weights: %s", _in_words(prepare_qat(model, report.qat, example)))
    return broadcast_object(report)


def has_budget(job: JobConfig) -> bool:
    """Whether a job has a budget of bits or bytes."""
    return job.bit_budget is not None or job.size_budget is not None


def require_output(job: JobConfig, output: Path | None) -> None:
    """Raise ConfigError for a file to write that exists, or that nothing would stand in."""
    if output is None:
        return
    if not has_budget(job):
        raise ConfigError(f"--output {output} takes the bits of a budget: give --bit-budget or --size-budget")
    if output.exists():
        raise ConfigError(f"{output} exists already: choose another --output")


def kind_of(qmodel: nn.Module) -> str:
    """``"W2A2"``; where layers differ in bits, with the mean over all quantized weights, ``"W2.53A2"``."""
    config = metadata_of(qmodel).config
    mean = mean_bits(qmodel)
    return f"W{config.weight_bits if mean is None else format(mean, '.3g')}A{config.act_bits}"


def _in_words(qmodel: nn.Module) -> str:
    """``2.53 bits on average: 1 layer of 8 bits, 9 of 3, 10 of 2``."""
    counts = sorted(Counter(layer_bits(qmodel).values()).items(), reverse=True)
    first, *others = [f"{count} {'layers' if count > 1 else 'layer'} of {bits}" for bits, count in counts]
    return f"{mean_bits(qmodel):.3g} bits on average: " + ", ".join([f"{first} bits", *others])


def settings_toml(qat: QATConfig, layers: Iterable[LayerSensitivity] = ()) -> str:
    """The settings of quantization as a file that ``--config`` takes, with a table ``[[overrides]]`` for each layer.

    Args:
        qat: the settings; those that are as by default are left out, but for the bits.
        layers: sensitivities; the comment beside a layer's bits has what they cost, and what others would.
    """
    lines = ["# `brfx quantize --config` takes this file. Later tables win over earlier ones.", ""]
    for field in fields(QATConfig):
        value = getattr(qat, field.name)
        said = field.name in ("weight_bits", "act_bits") or value != field.default
        if said and field.name not in ("bits", "overrides", "skip"):
            lines.append(f"{field.name} = {_toml(value)}")
    measured = {glob.escape(layer.name): layer for layer in layers if layer.kind == "weights"}
    for pattern, settings in qat.overrides:
        lines += ["", "[[overrides]]", f"match = {_toml(pattern)}{_costs(measured.get(pattern))}"]
        lines += ["fp32 = true"] if settings is None else [f"{name} = {_toml(of)}" for name, of in settings.items()]
    return "\n".join(lines) + "\n"


def _costs(layer: LayerSensitivity | None) -> str:
    if layer is None:
        return ""
    costs = ", ".join(f"{loss:.2g} at {bits} bits" for bits, loss in layer.losses.items())
    return f"  # {layer.values:,} weights; {costs}"


def _toml(value: Any) -> str:
    """A number, a string or a truth value as TOML; JSON writes them alike."""
    return json.dumps(value, ensure_ascii=False)
