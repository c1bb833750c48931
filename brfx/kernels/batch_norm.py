"""Batch norm for compiled code on CPUs, with sums by channel that are made line by line."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as AnyBatchNorm

from brfx.distributed import SyncedBatchNorm
from brfx.kernels.channel_sums import in_lines, once, sum_by_channel
from brfx.kernels.hooks import has_hooks
from brfx.kernels.precision import at_least_float32


class _Normalized(torch.autograd.Function):
    """``(values, weight, bias) -> (normalized, mean, variance)`` with a batch's own statistics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        values = at_least_float32(x)
        means, variances = _lines(values)
        share = 1 / means.shape[0]
        mean = (share * means).sum(0)
        variance = (share * (variances + (means - mean).square())).sum(0)
        scale = torch.rsqrt(variance + eps)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.mark_non_differentiable(mean, variance)
        shape = _broadcast(x)
        result = (values - mean.view(shape)) * once(scale * weight).view(shape) + bias.view(shape)
        return result.to(x.dtype), mean, variance

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        shape, count = _broadcast(x), x.numel() // x.shape[1]
        grad = at_least_float32(grads[0])
        centred = at_least_float32(x) - mean.view(shape)
        grad_bias, grad_weight = sum_by_channel(grad), sum_by_channel(grad * (centred * scale.view(shape)))
        shift, slope, gain = once(grad_bias / count), once(scale * grad_weight / count), once(scale * weight)
        grad_x = (grad - shift.view(shape) - centred * slope.view(shape)) * gain.view(shape)
        return grad_x.to(x.dtype), grad_weight, grad_bias, None


def _lines(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each line of each channel, ``(lines, channels)``, from one reading: of differences to the
    line's first value, so that a far mean costs no digits. That value is no further off than the line's own deviation
    by the root of its length; at worst the variance's relative error is the length by some roundings."""
    lines = values.movedim(1, -1)
    first = lines[..., :1, :]
    shifted = lines - first
    shifts = shifted.mean(-2)
    means, variances = first.squeeze(-2) + shifts, shifted.square().mean(-2) - shifts.square()
    return means.flatten(0, -2), variances.flatten(0, -2)


def _broadcast(x: Tensor) -> list[int]:
    return [-1] + [1] * (x.dim() - 2)


def can_tile(norm: nn.Module) -> bool:
    """Whether :func:`batch_norm` computes what calling ``norm`` computes."""
    if not isinstance(norm, AnyBatchNorm) or isinstance(norm, (nn.SyncBatchNorm, SyncedBatchNorm)):
        return False
    return type(norm).forward is AnyBatchNorm.forward and norm.affine and not has_hooks(norm)


def batch_norm(norm: Any, x: Tensor) -> Tensor:
    """``norm(x)``; in code that is compiled for a CPU with sums line by line.

    Args:
        norm: a batch norm for which :func:`can_tile` is true.
        x: ``(batch, channels, ...)``.
    """
    own = norm.training or not norm.track_running_stats  # a batch's statistics
    count = x.numel() // x.shape[1]
    if not (torch.compiler.is_compiling() and in_lines(x) and own and count > 1):
        return norm(x)  # type: ignore[no-any-return]
    result, mean, variance = _Normalized.apply(x, norm.weight, norm.bias, norm.eps)  # type: ignore[no-untyped-call]
    if norm.training and norm.track_running_stats:
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            share = norm.momentum if norm.momentum is not None else 1.0 / norm.num_batches_tracked
            for running, new in ((norm.running_mean, mean), (norm.running_var, variance * (count / (count - 1)))):
                running.copy_((1 - share) * running + share * new)
    return result  # type: ignore[no-any-return]
