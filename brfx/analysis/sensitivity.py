"""How much each layer's bits change what a network says.

One quantizer alone is switched on, all else stays in FP32, and the outputs are compared with the FP32 network's. The
distance is the Kullback-Leibler divergence of the class probabilities, as in ZeroQ (Cai et al., CVPR 2020). It needs no
labels, is never negative, and is 0 for the FP32 network; the loss on labels can fall by chance, as that of a trained
network on a few hundred images is near 0. HAWQ (Dong et al., ICCV 2019) takes the loss's second derivative instead. It
tells of small errors alone, and at 2 bits they are large.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from brfx.calibration import calibrate, quantization_disabled, quantizers, run_first
from brfx.errors import ConfigError, DataError
from brfx.modes import eval_mode
from brfx.nn import ActivationQuantizer, QuantizedLayer, QuantizedMultiheadAttention, Quantizer
from brfx.quant.grid import Grid
from brfx.quant.step_init import STEP_INIT_RULES
from brfx.train.tasks import divergence

#: The widths that are tried unless others are named.
WIDTHS = (2, 3, 4, 8)


@dataclass(frozen=True)
class LayerSensitivity:
    """What the bits of one layer's weights, or of one quantizer of activations, cost alone.

    Attributes:
        name: of the layer, or of the quantizer, as :func:`brfx.audit` has it.
        kind: ``"weights"`` or ``"activations"``.
        bits: as the model has them.
        values: how many weights, or activations a sample.
        losses: by bits, the distance of the outputs from the FP32 network's; of classes in nats a sample. The mean over
            samples; over batches where outputs are no tensors.
    """

    name: str
    kind: str
    bits: int
    values: int
    losses: dict[int, float]


@torch.no_grad()
def sensitivity(
    qmodel: nn.Module,
    batches: Iterable[Any],
    *,
    widths: Sequence[int] = WIDTHS,
    activations: bool = True,
    start: str = "mse",
    forward: Callable[[nn.Module, Any], Any] | None = None,
    distance: Callable[[Any, Any], Tensor] | None = None,
) -> tuple[LayerSensitivity, ...]:
    """Measure every layer at every width, one forward over ``batches`` each; the model is left as it was.

    Args:
        qmodel: what :func:`brfx.prepare_qat` returned, with the FP32 network's weights. It need not be calibrated.
        batches: a few batches of model inputs, as :func:`brfx.calibrate` takes them; they are kept in memory.
        widths: bits to try, 1 to 8.
        activations: measure the quantizers of activations too, and not weights alone.
        start: rule by which steps start, see :func:`brfx.calibrate`.
        forward: ``forward(qmodel, batch)`` runs a batch, for models that want more than its first element.
        distance: ``distance(output, reference)``, a mean over the batch; default the Kullback-Leibler divergence of
            logits ``(batch, classes, ...)``.

    Returns:
        An entry for each layer with quantized weights, then one for each quantizer of activations that the batches
        reach, both in the order of the model's modules.

    Raises:
        ConfigError: a width is none, or a distance is not finite.
        DataError: there was no batch.
    """
    if not widths or not set(widths) <= set(range(1, 9)):
        raise ConfigError(f"widths={tuple(widths)!r}: takes bits from 1 to 8")
    batches = list(batches)
    if not batches:
        raise DataError("sensitivity was given no batch: pass an iterable of model inputs")
    subject = copy.deepcopy(qmodel)
    if any(isinstance(module, ActivationQuantizer) and module.sign_from_data for module in subject.modules()):
        calibrate(subject, batches, start="lsq", forward=forward)
    measuring = _Measuring(subject, batches, forward or run_first, distance or _kl)
    with eval_mode(subject), quantization_disabled(subject):
        measuring.run_reference()
        found = [measuring.weights(name, layer, widths, start) for name, layer in weighted_layers(subject).items()]
        if activations:
            steps = measuring.steps(widths, start)
            found += [measuring.activations(name, by_width) for name, by_width in steps.items()]
    return tuple(found)


def weighted_layers(qmodel: nn.Module) -> dict[str, QuantizedLayer | QuantizedMultiheadAttention]:
    """The layers with quantized weights by name."""
    return {
        name: module
        for name, module in qmodel.named_modules()
        if isinstance(module, (QuantizedLayer, QuantizedMultiheadAttention)) and module.regularized()
    }


def _kl(output: Any, reference: Any) -> Tensor:
    if not isinstance(output, Tensor) or output.dim() < 2:
        raise ConfigError(f"the model's output is a {type(output).__name__}, no logits: give distance=")
    return divergence(output, reference, 1.0)


class _Measuring:
    """The FP32 network's outputs on some batches, and how far one quantizer alone moves them."""

    def __init__(
        self,
        model: nn.Module,
        batches: list[Any],
        forward: Callable[[nn.Module, Any], Any],
        distance: Callable[[Any, Any], Tensor],
    ) -> None:
        self.model, self.batches, self.forward, self.distance = model, batches, forward, distance
        self.values: dict[str, int] = {}

    def run_reference(self) -> None:
        self.references = [self.forward(self.model, batch) for batch in self.batches]

    def weights(self, name: str, layer: Any, widths: Sequence[int], start: str) -> LayerSensitivity:
        pairs: list[tuple[Tensor, Quantizer]] = layer.regularized()
        bits, losses = pairs[0][1].bits, {}
        for width in widths:
            with ExitStack() as switched:
                for weight, quantizer in pairs:
                    with _at(quantizer, width):
                        step = quantizer.first_step(weight, STEP_INIT_RULES[start])
                    switched.enter_context(_only(quantizer, width, step))
                losses[width] = self.loss(name, width)
        return LayerSensitivity(name, "weights", bits, sum(weight.numel() for weight, _ in pairs), losses)

    def activations(self, name: str, steps: dict[int, Tensor]) -> LayerSensitivity:
        quantizer: Any = self.model.get_submodule(name)
        bits, losses = quantizer.bits, {}
        for width, step in steps.items():
            with _only(quantizer, width, step):
                losses[width] = self.loss(name, width)
        return LayerSensitivity(name, "activations", bits, self.values[name], losses)

    def steps(self, widths: Sequence[int], start: str) -> dict[str, dict[int, Tensor]]:
        """For each quantizer of activations and width the step that the FP32 network's values give: the mean over
        batches."""
        found: dict[str, list[dict[int, Tensor]]] = {}

        def watch(name: str, quantizer: ActivationQuantizer) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                values = args[0] if args else kwargs["input"]
                if not values.numel():
                    return
                self.values[name] = values[0].numel()
                found.setdefault(name, []).append({})
                for width in widths:
                    with _at(quantizer, width):
                        found[name][-1][width] = quantizer.first_step(values, STEP_INIT_RULES[start])

            return hook

        with ExitStack() as hooks:
            for name, quantizer in quantizers(self.model).items():
                if isinstance(quantizer, ActivationQuantizer):
                    hook = watch(name, quantizer)
                    hooks.enter_context(quantizer.register_forward_pre_hook(hook, with_kwargs=True))
            for batch in self.batches:
                self.forward(self.model, batch)
        return {
            name: {width: torch.stack([seen[width] for seen in calls]).mean(0) for width in widths}
            for name, calls in found.items()
        }

    def loss(self, name: str, width: int) -> float:
        total, samples = 0.0, 0
        for batch, reference in zip(self.batches, self.references, strict=True):
            count = len(reference) if isinstance(reference, Tensor) and reference.dim() else 1
            total += count * float(self.distance(self.forward(self.model, batch), reference))
            samples += count
        if not abs(total) < float("inf"):
            raise ConfigError(f"{name} at {width} bits: the outputs' distance from the FP32 network's is {total}")
        return total / samples


@contextmanager
def _at(quantizer: Quantizer, bits: int) -> Iterator[None]:
    """Within the block ``quantizer`` has the grid of so many bits, of its own sign and form."""
    grid = quantizer.grid
    quantizer.grid = grid_of(bits, grid)
    try:
        yield
    finally:
        quantizer.grid = grid


def grid_of(bits: int, grid: Grid) -> Grid:
    """``grid`` at other bits; above 4 none is symmetric."""
    return Grid(bits, grid.signed, grid.symmetric and bits <= 4)


@contextmanager
def _only(quantizer: Quantizer, bits: int, step: Tensor) -> Iterator[None]:
    """Within the block ``quantizer`` quantizes to ``bits`` at ``step``, and thereafter lets values through again."""
    with _at(quantizer, bits):
        quantizer.set_step(torch.where(step > 0, step, 1.0))
        quantizer.calibrated, quantizer.mode = True, "quantize"
        try:
            yield
        finally:
            quantizer.mode = "pass"
