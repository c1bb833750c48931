"""Round the weights of a calibrated network so that each layer's output is kept, instead of each weight.

With x the input of a layer in the FP32 network and y its input in the quantized one, behind the layers that are rounded
already, the codes are to make ``E |W x - Q y|^2`` least (AdaRound, Nagel et al., ICML 2020, eq. 25). Completing the
square shows what that is:

    E |W x - Q y|^2  =  tr (Q - T) H (Q - T)^T + constant,    H = E[y y^T],    T = W E[x y^T] H^-1

T is the weight that undoes, as far as this layer can, what the layers before it lost. Each row of Q is a problem of
least squares over integers. It is solved as in GPTQ (Frantar et al., ICLR 2023): column by column, the error of each
rounding made up for by the columns that are left. Sweeps follow in which each code becomes the best one for the others
as they are, until none changes. Nothing is trained, and there is no learning rate to choose.

Where a bias or a batch norm behind the layer takes up a constant, x and y are taken less their means.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brfx.analysis.observe import graphs
from brfx.calibration import batch_norms_in_training, quantization_disabled, require_calibrated, run_first
from brfx.compat import in_float64
from brfx.errors import ConfigError, DataError
from brfx.graph.utils import module_calls
from brfx.kernels.precision import at_least_float32
from brfx.modes import eval_mode
from brfx.nn import QuantizedLayer
from brfx.quant.grid import Grid

#: Share of the mean of H's diagonal that is added to it: there is an inverse, and inputs that are always 0 keep their
#: weights.
DAMPING = 0.01

#: Positions of a batch that are looked at, at most.
POSITIONS = 8192

#: Steps that are tried, as shares of the calibrated one.
SHARES = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2)

_SWEEPS = 20

_BatchNorm = nn.modules.batchnorm._BatchNorm


@torch.no_grad()
def reconstruct(
    qmodel: nn.Module,
    batches: Iterable[Any],
    *,
    batch_statistics: bool = False,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> list[str]:
    """Round the weights of convolutions and linears anew, layer by layer in the order of execution.

    Each weight becomes the level of its code, and a bias or a batch norm's running mean takes up the mean of the error.

    Args:
        qmodel: calibrated; its weights are those of the FP32 network.
        batches: model inputs, as :func:`brfx.calibrate` takes them; a few hundred samples or more, kept in memory.
        batch_statistics: let batch norms of the quantized network normalize with each batch's own statistics, see
            :func:`brfx.calibrate`.
        forward: ``forward(qmodel, batch)`` runs a batch, for models that want more than its first element.

    Returns:
        The layers that were rounded. Transposed convolutions, attention, functions and layers whose weight is computed
        keep the nearest codes.

    Raises:
        NotCalibratedError: a quantizer has no step.
        ConfigError: weights are quantized by a method that does not round them as they are.
        DataError: there was no batch.
    """
    require_calibrated(qmodel)
    batches = list(batches)
    if not batches:
        raise DataError("reconstruct was given no batch: pass an iterable of model inputs")
    layers = _layers(qmodel)
    original = copy.deepcopy(qmodel)
    norms = _norms_behind(qmodel)
    run = forward or run_first
    with eval_mode(original), eval_mode(qmodel), quantization_disabled(original):
        order = _order(original, layers, batches[0], run)
        for name in order:
            layer: Any = layers[name]
            own = batch_norms_in_training(qmodel) if batch_statistics else nullcontext()
            with own:
                moments = _moments(name, original, qmodel, batches, run)
            _round(layer, moments, norms.get(name))
    return order


def _layers(qmodel: nn.Module) -> dict[str, QuantizedLayer]:
    found = {}
    for name, layer in qmodel.named_modules():
        if (
            not isinstance(layer, QuantizedLayer)
            or layer.weight_quantizer is None
            or getattr(layer, "transposed", False)
        ):
            continue
        if not layer.weight_quantizer.only_clips:
            kind = type(layer.weight_quantizer).__name__
            raise ConfigError(f"{name}: a {kind} does not round weights as they are; reconstruct takes LSQ's")
        if isinstance(layer.weight, nn.Parameter):
            found[name] = layer
    return found


def _norms_behind(qmodel: nn.Module) -> dict[str, _BatchNorm]:
    """By layer, the batch norm that alone reads its output, where both are called once."""
    found = {}
    for prefix, gm in graphs(qmodel).items():
        modules = dict(module_calls(gm))
        calls = Counter(modules.values())
        for node, module in modules.items():
            users = list(node.users)
            norm = modules.get(users[0]) if len(users) == 1 else None
            if not isinstance(module, QuantizedLayer) or not isinstance(norm, _BatchNorm) or norm.running_mean is None:
                continue
            if calls[module] == calls[norm] == 1:
                found[f"{prefix}.{node.target}".lstrip(".")] = norm
    return found


class _Reached(Exception):
    """The layer that was waited for has been called."""


def _order(model: nn.Module, layers: Iterable[str], batch: Any, run: Callable[[nn.Module, Any], Any]) -> list[str]:
    """The layers in the order in which they are first called."""
    order: dict[str, None] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: order.setdefault(name))
        for name in layers
    ]
    try:
        run(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return list(order)


@dataclass
class Moments:
    """Of the inputs of a layer's sums, by group: x in the FP32 network, y in the quantized one, each of K values.

    Attributes:
        h, c: ``E[y y^T]`` and ``E[x y^T]``, ``(groups, K, K)``.
        x, y: their means, ``(groups, K)``.
    """

    h: Tensor
    c: Tensor
    x: Tensor
    y: Tensor

    def centred(self) -> Moments:
        """The moments about the means."""
        h = self.h - self.y[:, :, None] * self.y[:, None]
        return Moments(h, self.c - self.x[:, :, None] * self.y[:, None], self.x, self.y)


def _moments(
    name: str, original: nn.Module, qmodel: nn.Module, batches: list[Any], run: Callable[[nn.Module, Any], Any]
) -> Moments:
    count, sums = 0, None
    generator = torch.Generator().manual_seed(0)
    for batch in batches:
        x, y = _inputs(original, name, batch, run), _inputs(qmodel, name, batch, run)
        if x.shape[1] > POSITIONS:
            chosen = torch.randint(x.shape[1], (POSITIONS,), generator=generator).to(x.device)
            x, y = x[:, chosen], y[:, chosen]
        parts = (y.mT @ y, x.mT @ y, x.sum(1), y.sum(1))
        exact = [in_float64(part) for part in parts]
        sums = exact if sums is None else [a + b for a, b in zip(sums, exact, strict=True)]
        count += x.shape[1]
    assert sums is not None
    return Moments(*(part / count for part in sums))


def _inputs(model: nn.Module, name: str, batch: Any, run: Callable[[nn.Module, Any], Any]) -> Tensor:
    """What the layer multiplies with its weight's rows in one batch: ``(groups, positions, K)``."""
    seen: list[Tensor] = []
    layer: Any = model.get_submodule(name)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(layer.quantized_input(args[0] if args else kwargs["input"]))
        raise _Reached

    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        run(model, batch)
    except _Reached:
        pass
    finally:
        handle.remove()
    return at_least_float32(patches(layer, _few(layer, seen[0])))


def _few(layer: Any, x: Tensor) -> Tensor:
    """So many samples of a batch as have 8 times the positions that are looked at, one at least: memory is bounded."""
    if x.dim() < layer.weight.dim():
        return x  # one sample, without a batch
    return x[: max(1, 8 * POSITIONS // patches(layer, x[:1]).shape[1])]


def patches(layer: Any, x: Tensor) -> Tensor:
    """The input as rows that a convolution's or linear's sums run over: ``(groups, positions, K)``.

    ``patches(x) @ weight.flatten(1).T`` of each group is what the layer gives, less its bias, as ``(positions, out)``.
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    size, dims = layer.kernel_size, len(layer.kernel_size)
    padding = layer.padding
    if layer.padding_mode != "zeros":
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
    count = torch.Size(size).numel()
    picks = torch.eye(count, dtype=x.dtype, device=x.device).reshape(count, 1, *size)  # each takes one of a window
    batch, channels = (x.shape[0], x.shape[1]) if x.dim() == dims + 2 else (1, x.shape[0])
    conv = getattr(F, f"conv{dims}d")
    found = conv(x.reshape(batch * channels, 1, *x.shape[-dims:]), picks, None, layer.stride, padding, layer.dilation)
    found = found.reshape(batch, layer.groups, channels // layer.groups * count, -1)
    return found.permute(1, 0, 3, 2).flatten(1, 2)  # type: ignore[no-any-return]


def _round(layer: Any, moments: Moments, norm: _BatchNorm | None) -> None:
    """Give a layer its new weight and step, and let its bias, or the norm behind it, take up the mean of the error."""
    if layer.bias is not None or norm is not None:
        moments = moments.centred()
    quantizer, groups = layer.weight_quantizer, len(moments.h)
    weight = in_float64(layer.weight.detach()).reshape(groups, -1, moments.h.shape[-1])
    ridge = DAMPING * moments.h.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] + 1e-30
    h = moments.h + ridge * torch.eye(weight.shape[-1], dtype=torch.float64, device=weight.device)
    target = torch.linalg.solve(h, weight @ moments.c + ridge * weight, left=False)
    step = in_float64(quantizer.step.detach()).expand(layer.weight.shape).reshape(weight.shape)[..., :1]  # one a row
    step, rounded = _best_step(target, h, step, quantizer.grid, shared=quantizer.step.numel() == 1)
    shift = (rounded @ moments.y[..., None] - weight @ moments.x[..., None]).flatten().to(layer.weight)
    quantizer.set_step(step.flatten()[: quantizer.step.numel()].reshape(quantizer.step.shape))
    layer.weight.copy_(rounded.reshape(layer.weight.shape))
    if norm is not None:
        norm.running_mean += shift  # type: ignore[operator]
    elif layer.bias is not None:
        layer.bias -= shift


def _best_step(target: Tensor, h: Tensor, step: Tensor, grid: Grid, *, shared: bool) -> tuple[Tensor, Tensor]:
    """Of the steps that are tried the one of least error, one a row or one that all rows share, and its levels."""
    shares = torch.tensor(SHARES, dtype=step.dtype, device=step.device)
    steps = step[:, None] * shares[:, None, None]  # (groups, shares, rows, 1)
    rows = target[:, None].expand(-1, len(shares), -1, -1)
    levels = least_squares_levels(rows.flatten(1, 2), h, steps.flatten(1, 2), grid).reshape(rows.shape)
    off = levels - rows
    error = (off @ h[:, None] * off).sum(3)
    if shared:
        error = error.sum((0, 2), keepdim=True).expand_as(error)
    best = error.argmin(1, keepdim=True)[..., None]
    return steps.gather(1, best).squeeze(1), levels.gather(1, best.expand(-1, -1, -1, levels.shape[3])).squeeze(1)


def least_squares_levels(target: Tensor, h: Tensor, step: Tensor, grid: Grid) -> Tensor:
    """Levels q of a grid that make ``(q - t) H (q - t)^T`` small for each row t of ``target``.

    The result is as good as it can be made by changing one code: GPTQ's rounding, and sweeps over the codes from there.

    Args:
        target: ``(groups, rows, K)``.
        h: positive definite, ``(groups, K, K)``.
        step: one a row, ``(groups, rows, 1)``.
        grid: the codes.
    """
    order = h.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)
    rows = order[:, :, None]
    h = h.gather(1, rows.expand_as(h)).gather(2, order[:, None].expand_as(h))
    back = order.argsort(dim=1)[:, None].expand_as(target)
    target = target.gather(2, order[:, None].expand_as(target))
    levels = _swept(_gptq(target, h, step, grid), target, h, step, grid)
    return levels.gather(2, back)


def _gptq(target: Tensor, h: Tensor, step: Tensor, grid: Grid) -> Tensor:
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    left, levels = target.clone(), torch.empty_like(target)
    for column in range(h.shape[-1]):
        values = left[..., column, None]
        levels[..., column, None] = _nearest(values, step, grid)
        error = (values - levels[..., column, None]) / factor[:, None, column, column, None]
        left[..., column + 1 :] -= error * factor[:, None, column, column + 1 :]
    return levels


def _swept(levels: Tensor, target: Tensor, h: Tensor, step: Tensor, grid: Grid) -> Tensor:
    """Give each code in turn the value that is best for the others, until a sweep changes none."""
    slope = (levels - target) @ h
    for _ in range(_SWEEPS):
        changed = False
        for column in range(h.shape[-1]):
            old = levels[..., column, None]
            new = _nearest(old - slope[..., column, None] / h[:, None, column, column, None], step, grid)
            moved = new - old
            if bool((moved != 0).any()):
                changed = True
                slope += moved * h[:, None, column]
                levels[..., column, None] = new
        if not changed:
            break
    return levels


def _nearest(values: Tensor, step: Tensor, grid: Grid) -> Tensor:
    return grid.decode(grid.encode(values, step), step)
