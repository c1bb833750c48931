"""Statistics of the quantized weights after each epoch: quantization error, distance to the levels, flips."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import GraphModule, Node

from brfx.analysis.observe import graphs
from brfx.graph.utils import module_calls
from brfx.kernels.precision import at_least_float32
from brfx.modes import eval_mode
from brfx.nn import QuantizedLayer, QuantizedMultiheadAttention, WeightQuantizer
from brfx.regularizers.bin_regularizer import distances


class WeightStatistics:
    """Figures of each quantized weight, taken by :func:`brfx.fit` when an epoch is over, of the weights it validates.

    They cost one reading of the weights an epoch. ``{name: figures}`` has, under the layer's name:

    - ``distance``: mean of ``|v - level|`` in units of half a step: 1 - effectiveness / 100. Weights spread evenly
      between levels have 0.5.
    - ``closed``: the share of ``distance`` that is gone since ``after`` epochs; negative where it grew. ``None`` before
      that epoch, and where there was none.
    - ``mse``: ``mean (v - level)^2 / mean v^2``, the quantization error relative to the weight's power.
    - ``flips``: codes that are not those of the epoch before, per 1,000 weights and batches. A code that came back
      between two epochs is not seen.

    Args:
        qmodel: what :func:`brfx.prepare_qat` returned. Weights that wrapped Python functions read are left out.
        after: epochs before what is measured: those of the warm-up, also in a run without regularization, so that the
            two compare.
    """

    def __init__(self, qmodel: nn.Module, after: int = 0) -> None:
        self.qmodel, self.after = qmodel, after
        self._codes: dict[str, Tensor] = {}
        self._start: dict[str, float] = {}

    def begin(self) -> None:
        """Measure from the weights as they are; the first epoch is about to begin."""
        self._measure(0, 1)

    def __call__(self, epoch: int, batches: int) -> dict[str, dict[str, float | None]]:
        """The figures at the end of ``epoch``, from 1, which had so many batches."""
        return self._measure(epoch, batches)

    def state_dict(self) -> dict[str, Any]:
        """The state that the next figures are measured against: codes and distances."""
        return {"codes": dict(self._codes), "start": dict(self._start)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`."""
        self._codes, self._start = dict(state["codes"]), dict(state["start"])

    @torch.no_grad()
    def _measure(self, epoch: int, batches: int) -> dict[str, dict[str, float | None]]:
        with eval_mode(self.qmodel):  # a weight that is computed when read, such as spectral norm's, is not moved by it
            return {
                name: self._figures(name, weight, quantizer, epoch, batches)
                for name, weight, quantizer in quantized_weights(self.qmodel)
            }

    def _figures(
        self, name: str, weight: Tensor, quantizer: WeightQuantizer, epoch: int, batches: int
    ) -> dict[str, float | None]:
        prepared = at_least_float32(quantizer.prepare(weight))
        code, distance = distances(prepared, quantizer.step, quantizer.grid)
        mean, power = float((2 * distance.abs() / quantizer.step).mean()), float(prepared.square().mean())
        code = code.to("cpu", torch.int8)
        changed = int((code != self._codes.get(name, code)).sum())
        self._codes[name] = code
        if epoch <= self.after:
            self._start[name] = mean
        start = self._start.get(name, 0.0)
        return {
            "distance": mean,
            "closed": 1 - mean / start if epoch >= self.after and start > 0 else None,
            "mse": float(distance.square().mean()) / power if power > 0 else 0.0,
            "flips": 1000 * changed / (code.numel() * batches),
        }


def quantized_weights(qmodel: nn.Module) -> Iterator[tuple[str, Tensor, WeightQuantizer]]:
    """Each latent weight that has a step, by the name of its layer, or of its quantizer where a layer has several or a
    function reads it."""
    for name, layer in qmodel.named_modules():
        if isinstance(layer, (QuantizedLayer, QuantizedMultiheadAttention)):
            names = {quantizer: own for own, quantizer in layer.named_modules()}
            pairs = layer.regularized()
            for weight, quantizer in pairs:
                if quantizer.calibrated:
                    yield name if len(pairs) == 1 else f"{name}.{names[quantizer]}", weight, quantizer
    for prefix, gm in graphs(qmodel).items():
        for node, module in module_calls(gm):
            if isinstance(module, WeightQuantizer) and module.calibrated:
                read = _constant(gm, node.all_input_nodes[0])
                if read is not None:
                    yield f"{prefix}.{node.target}".lstrip("."), read, module


def _constant(gm: GraphModule, node: Node) -> Tensor | None:
    """The value of a node that functions compute from parameters alone, else ``None``."""
    needed, waiting = {node}, [node]
    while waiting:
        more = set(waiting.pop().all_input_nodes) - needed
        needed |= more
        waiting.extend(more)
    if any(part.op not in ("get_attr", "call_function", "call_method") for part in needed):
        return None
    interpreter = fx.Interpreter(gm, garbage_collect_values=False)
    for part in gm.graph.nodes:
        if part in needed:
            interpreter.env[part] = interpreter.run_node(part)
    value = interpreter.env[node]
    return value if isinstance(value, Tensor) else None
