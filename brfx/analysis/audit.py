"""Audit a rewritten model: run one batch, and count which multiplications have both operands on a grid."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torchvision.ops  # noqa: F401  (registers its operators)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from brfx.analysis.observe import observed_sites
from brfx.calibration import calibrate, quantizers, uncalibrated
from brfx.config import QATConfig
from brfx.graph.torch_ops import JOINS, LINEAR, einsum_macs, name_of, preserves_values
from brfx.metadata import metadata_of
from brfx.modes import eval_mode
from brfx.nn import ActivationQuantizer, Quantizer, WeightQuantizer


@dataclass(frozen=True)
class LayerAudit:
    """One layer, product or activation quantizer, in order of first execution.

    Attributes:
        name: dotted name of the module that ran it.
        type: of the module; of a function its name.
        weight_bits, act_bits: of the operands' quantizers; ``None`` for an operand in FP32. A product of two
            activations has two ``act_bits``; the larger is given.
        signed, step: of the activation quantizer, or of the weight's (the mean over channels; NaN: the model is not
            calibrated).
        parameters: of the layer; one that several rows use is counted in the first.
        macs: multiply-accumulates for the batch that was run, over all calls.
        quantized_macs: those with both operands out of a quantizer.
        regularized: whether a bin regularizer sees it.
        reason: why an operand is in FP32; of an activation quantizer, why it is there and has its sign.
    """

    name: str
    type: str
    weight_bits: int | None = None
    act_bits: int | None = None
    signed: bool | None = None
    step: float | None = None
    parameters: int = 0
    macs: int = 0
    quantized_macs: int = 0
    regularized: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Audit:
    """The result of :func:`audit`.

    Attributes:
        layers: every layer and quantizer that ran.
        macs, quantized_macs: of convolutions, linears and matrix products, in all.
        exceptions: for each place that multiplies in FP32, which and why.
        never_hit: quantizers that the batch did not reach.
    """

    layers: tuple[LayerAudit, ...]
    macs: int
    quantized_macs: int
    exceptions: tuple[str, ...]
    never_hit: tuple[str, ...]

    @property
    def mac_share(self) -> float:
        """Share of the multiply-accumulates whose both operands came out of a quantizer, 0 to 1."""
        return self.quantized_macs / self.macs if self.macs else 0.0

    @property
    def parameters(self) -> int:
        """Of all layers that multiply, each counted once."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def footer(self) -> str:
        """The sum in a line: ``98.7 % of 1.81 G MACs quantized; left: fc``."""
        left = [layer.name for layer in self.layers if layer.macs > layer.quantized_macs]
        named = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
        share = percent(self.quantized_macs, self.macs)
        return f"{share} of {scaled(self.macs)} MACs quantized; left: {named or 'nothing'}"

    def __str__(self) -> str:
        header = ("layer", "type", "W", "A", "sign", "step", "parameters", "MACs", "quantized")
        rows = [header, *(_row(layer) for layer in self.layers)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, self.footer, *self.exceptions])


@torch.no_grad()
def audit(qmodel: nn.Module, *example_inputs: Any) -> Audit:
    """Run one batch in eval mode and report what was multiplied with what.

    A quantizer's output is followed, call by call, through whatever leaves values as they are (reshapes, max-pooling,
    the concatenation of one grid ...); a product counts as quantized if both its operands can be traced to one.

    Args:
        qmodel: what :func:`brfx.prepare_qat` returned. If it is not calibrated, a copy is, on the example.
        example_inputs: the model's inputs.
    """
    config = metadata_of(qmodel).config
    unset = bool(uncalibrated(qmodel))
    subject = copy.deepcopy(qmodel) if unset else qmodel
    if unset:
        calibrate(subject, [example_inputs], start="lsq", forward=lambda model, inputs: model(*inputs))  # the fastest
    provenance = _Provenance(subject)
    with eval_mode(subject), provenance.watching():
        subject(*example_inputs)
    return _report(qmodel, provenance, config)


@dataclass
class _Record:
    """All calls of one operation in one module."""

    calls: int = 0
    macs: int = 0
    quantized: int = 0
    grids: tuple[Quantizer | None, Quantizer | None] = (None, None)
    sources: tuple[str, str] = ("", "")


class _Inside(TorchDispatchMode):
    """Counts the multiply-accumulates of all that runs, whatever function of torch's it runs inside of."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in _FUSED:
            self.macs += _FUSED[packet](args, out)
        elif packet in flop_registry:
            self.macs += flop_registry[packet](*args, **(kwargs or {}), out_val=out) // 2
        return out


def _trilinear(args: Any, out: Any) -> int:
    """Of ``bilinear``: a batch of outer products, times the weight."""
    left, weight, right = (args[place] for place in (0, 1, 2))
    return int(left.shape[0] * (left.shape[-1] * right.shape[-1] + weight.numel()))


def _attention(args: Any, out: Any) -> int:
    """Of ``softmax(q @ k.T) @ v``."""
    query, key, value = args[:3]
    return int(math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1]))


def _recurrent(args: Any, out: Any) -> int:
    """Of one layer and direction: its input and its state times their weights, at each time of each sequence."""
    return int(math.prod(args[0].shape[:-1]) * (args[1].numel() + args[2].numel()))


#: Kernels that multiply and that torch's own counter does not know: ``(arguments, output) -> multiply-accumulates``.
_FUSED: dict[Any, Callable[[Any, Any], int]] = {
    torch.ops.aten._trilinear: _trilinear,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten.mkldnn_rnn_layer: _recurrent,
    torch.ops.aten.dot: lambda args, out: args[0].numel(),
    torch.ops.aten.vdot: lambda args, out: args[0].numel(),
    torch.ops.aten.mv: lambda args, out: args[0].numel(),
    torch.ops.aten.addmv: lambda args, out: args[1].numel(),
    torch.ops.aten._cdist_forward: lambda args, out: out.numel() * args[0].shape[-1],
    torch.ops.torchvision.deform_conv2d: lambda args, out: out.numel() * math.prod(args[1].shape[1:]),
}


class _Provenance(TorchFunctionMode):
    """Follows quantized values through torch's functions; ``records`` has what multiplied them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.records: dict[tuple[str, str], _Record] = {}
        self.hit: Counter[str] = Counter()
        self._stack: list[str] = []
        self._inside = _Inside()

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = []
        for name, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(self._enter(name)))
            handles.append(module.register_forward_hook(self._leave, always_call=True))
            if isinstance(module, Quantizer):
                handles.append(module.register_forward_hook(self._quantized(name)))
        try:
            with self._inside, self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> Callable[..., None]:
        return lambda module, args: self._stack.append(name)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._stack.pop()

    def _quantized(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.hit[name] += 1
            if isinstance(output, Tensor):
                output.brfx_grid = module  # type: ignore[attr-defined]

        return hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = name_of(func) or ""
        inputs = [value for value in _flat((args, kwargs)) if isinstance(value, Tensor)]
        grids = [_grid(value) for value in inputs]
        before = self._inside.macs
        out = func(*args, **kwargs)
        inside = self._inside.macs - before
        if name in LINEAR and isinstance(out, Tensor) and (name != "einsum" or len(inputs) == 2):
            self._multiplied(name, args, kwargs, out)
        elif inside:
            self._record(name, inside, (None, None), (name, name))
        for value in _flat(out):
            if isinstance(value, Tensor):
                grid = self._carried(name, args, kwargs, inputs, grids, value)
                if grid is not None:
                    value.brfx_grid = grid  # type: ignore[attr-defined]
                else:
                    if hasattr(value, "brfx_grid"):
                        del value.brfx_grid
                    if inputs and name not in ("get", "size"):
                        value.brfx_made_by = self._source(name, inputs)  # type: ignore[attr-defined]
        return out

    def _source(self, name: str, inputs: list[Tensor]) -> str:
        if name in ("detach", "to", "contiguous"):
            return getattr(inputs[0], "brfx_made_by", name)
        return name

    @staticmethod
    def _carried(
        name: str, args: Any, kwargs: Any, inputs: list[Tensor], grids: list[Quantizer | None], out: Tensor
    ) -> Quantizer | None:
        """The grid that ``out`` is on because of what went in."""
        if not inputs:
            return None
        if name in JOINS:
            return grids[0] if all(grid is grids[0] for grid in grids) else None
        property_ = name == "get" and out.numel() == inputs[0].numel()
        scaled = name in ("relu", "mul", "div", "truediv", "rmul") and len(inputs) == 1
        return grids[0] if preserves_values(name, args, kwargs) or property_ or scaled else None

    def _multiplied(self, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
        op = LINEAR[name]
        left, right = op.operands(args, kwargs)
        if name == "einsum":
            left, right = (value for value in _flat(args[1:]) if isinstance(value, Tensor))
            macs = einsum_macs(args[0], left, right)
        else:
            macs = op.macs(left, right, out)
        self._record(name, macs, (_grid(left), _grid(right)), (_made_by(left), _made_by(right)))

    def _record(
        self,
        name: str,
        macs: int,
        grids: tuple[Quantizer | None, Quantizer | None],
        sources: tuple[str, str],
    ) -> None:
        record = self.records.setdefault((self._stack[-1] if self._stack else "", name), _Record())
        on_grid = all(grid is not None for grid in grids)
        if not record.calls or not on_grid:
            record.grids, record.sources = grids, sources
        record.calls += 1
        record.macs += macs
        record.quantized += macs if on_grid else 0


def _grid(value: Any) -> Quantizer | None:
    return getattr(value, "brfx_grid", None)


def _made_by(value: Tensor) -> str:
    if isinstance(value, nn.Parameter):
        return "a weight in FP32"
    return f"what {getattr(value, 'brfx_made_by', '') or 'the caller'} gives"


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from _flat(part)
    elif isinstance(value, dict):
        yield from _flat(list(value.values()))
    else:
        yield value


def _report(qmodel: nn.Module, provenance: _Provenance, config: QATConfig) -> Audit:
    modules = dict(qmodel.named_modules())
    rows: list[LayerAudit] = []
    counted, calibrated = set[int](), not uncalibrated(qmodel)
    exceptions = []
    products = {(name, op): record for (name, op), record in provenance.records.items()}
    several = Counter(name for name, _ in products)
    for (name, op), record in products.items():
        module = modules[name]
        kind = op if several[name] > 1 or not list(module.parameters(recurse=False)) else type(module).__name__
        own = {id(p): p.numel() for p in _own_parameters(module) if id(p) not in counted}
        counted.update(own)
        row = _layer(name, kind, record, config, parameters=sum(own.values()), calibrated=calibrated)
        rows.append(row)
        if row.macs > row.quantized_macs:
            exceptions.append(f"{row.name or 'the model'} ({row.type}): {row.reason}")
    observed = observed_sites(qmodel)
    found = quantizers(qmodel)
    for name, quantizer in found.items():
        if isinstance(quantizer, ActivationQuantizer) and provenance.hit[name]:
            step = float(quantizer.step.mean())
            rows.append(
                LayerAudit(
                    name,
                    type(quantizer).__name__,
                    act_bits=quantizer.bits,
                    signed=quantizer.signed,
                    step=step,
                    regularized=name in observed,
                    reason=quantizer.reason,
                )
            )
    macs = sum(record.macs for record in products.values())
    quantized = sum(record.quantized for record in products.values())
    never = tuple(name for name in found if not provenance.hit[name])
    return Audit(tuple(rows), macs, quantized, tuple(exceptions), never)


def _layer(
    name: str, kind: str, record: _Record, config: QATConfig, *, parameters: int, calibrated: bool
) -> LayerAudit:
    weights = [grid for grid in record.grids if isinstance(grid, WeightQuantizer)]
    acts = [grid for grid in record.grids if isinstance(grid, ActivationQuantizer)]
    reasons = [
        f"{side} operand is {source}" + _whose(name, kind, config)
        for side, grid, source in zip(("left", "right"), record.grids, record.sources, strict=True)
        if grid is None
    ]
    return LayerAudit(
        name,
        kind,
        weight_bits=weights[0].bits if weights else None,
        act_bits=max((grid.bits for grid in acts), default=None),
        signed=True if weights else None,
        step=(float(weights[0].step.mean()) if calibrated else math.nan) if weights else None,
        parameters=parameters,
        macs=record.macs,
        quantized_macs=record.quantized,
        regularized=any(weights),
        reason="; ".join(reasons),
    )


def _own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a layer, without those of its quantizers."""
    scales = {id(p) for part in module.modules() if isinstance(part, Quantizer) for p in part.parameters()}
    return [parameter for parameter in module.parameters() if id(parameter) not in scales]


def _whose(name: str, kind: str, config: QATConfig) -> str:
    """The setting that leaves an operand in FP32, if one does."""
    own = config.at(name, kind.removeprefix("Quantized"))
    if own is None:
        return " (left in FP32 by an override)"
    if own.placement == "paper":
        return " (placement 'paper' quantizes weights and ReLUs alone)"
    return " (the configuration says 32 bits)" if None in (own.weight_bits, own.act_bits) else ""


def _row(layer: LayerAudit) -> tuple[str, ...]:
    step = "" if layer.step is None else "not set" if math.isnan(layer.step) else f"{layer.step:.5f}"
    share = percent(layer.quantized_macs, layer.macs) if layer.macs else ""
    return (
        layer.name,
        layer.type,
        str(layer.weight_bits or ("32" if layer.macs else "")),
        str(layer.act_bits or ("32" if layer.macs else "")),
        {None: "", True: "signed", False: "unsigned"}[layer.signed],
        step,
        f"{layer.parameters:,}" if layer.parameters else "",
        f"{layer.macs:,}" if layer.macs else "",
        share,
    )


def percent(part: int, whole: int) -> str:
    """A share to a tenth of a percent: ``100.0 %`` is all of it and ``0.0 %`` nothing, whatever rounding would say."""
    if part == whole:
        return "100.0 %" if whole else "0.0 %"
    return f"{min(99.9, max(0.1, 100 * part / whole)) if part else 0:.1f} %"


def scaled(count: int) -> str:
    """A count with three digits: ``640``, ``40.6 M``, ``1.81 G``."""
    for unit, letter in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if count >= 0.9995 * unit:
            value = count / unit
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}{letter}"
    return str(count)
