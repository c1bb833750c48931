"""Learned step size quantization: the function with its two gradients, and the quantizer modules that hold a step.

Source: Esser et al., "Learned Step Size Quantization", ICLR 2020.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from brfx.errors import NotCalibratedError
from brfx.grid import MIN_STEP, Grid, clipped, in_full
from brfx.nn.norm import sum_by_channel
from brfx.start import START_RULES

#: The ``border`` of a quantizer of sums of codes, in codes. Such a sum is often the outermost level itself.
#: Rounding must not decide whether its gradient passes.
BORDER_OF_SUMS = 1e-4


class _LSQ(torch.autograd.Function):
    """``v -> step * code(v)``; plain aten operations, so that compile and export see through it."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, step: Tensor, grid: Grid, scale: float, floor: float, ceiling: float, border: float
    ) -> Tensor:
        ctx.save_for_backward(values, step)
        ctx.settings = (grid, scale, floor, ceiling, border)
        code = grid.encode(clipped(in_full(values), floor, ceiling), step, least=floor)
        return grid.decode(code, step).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved, step = ctx.saved_tensors
        grid, scale, floor, ceiling, border = ctx.settings
        grad = in_full(grads[0])
        seen = grid.recompute(in_full(saved), step, floor=floor, ceiling=ceiling, border=border)
        if grid.binary:  # v^ = s * sign(v): the gradient passes straight to v, and d v^ / d s = sign(v)
            grad_values, slope = grad, seen.code
        else:
            slope = seen.code - torch.where(seen.off_grid, -grid.offset, seen.ratio)
            closed = seen.off_grid if seen.clipped is None else seen.off_grid | seen.clipped
            grad_values = torch.where(closed, 0.0, grad)
        grad_step = _sum_to(grad * slope, step) * scale
        return grad_values.to(saved.dtype), grad_step, None, None, None, None, None


def _sum_to(values: Tensor, step: Tensor) -> Tensor:
    """The sum in the shape of ``step``; by channel first, in which compiled code fuses it with a batch norm's sums."""
    if step.numel() == 1 and values.dim() > 2:
        values = sum_by_channel(values)
    return values.sum_to_size(step.shape)


def lsq_quantize(
    values: Tensor,
    step: Tensor,
    grid: Grid,
    *,
    gradient_scale: float,
    floor: float = -math.inf,
    ceiling: float = math.inf,
    border: float = 0.0,
) -> Tensor:
    """Quantize ``clip(values, floor, ceiling)`` to the levels ``code * step``.

    Args:
        values: any shape.
        step: a scalar, or one step per output channel in a shape that broadcasts.
        grid: the codes.
        gradient_scale: LSQ's g, which multiplies the gradient of ``step``; ``1 / sqrt(N * Qp)``.
        floor, ceiling: bounds applied before quantizing: ``0`` and infinity make a ReLU, ``0`` and ``6`` a ReLU6.
            At and beyond a bound no gradient reaches ``values``, as in ``torch.relu`` and ``F.hardtanh``.
        border: how far beyond the outermost code a value still counts as inside for its gradient, in codes.

    Returns:
        A tensor like ``values``. Inside the grid's range its gradient to ``values`` is 1, outside 0; to ``step`` it is
        ``code - v / step`` inside and ``Qn`` or ``Qp`` outside (LSQ, eq. 3 and 5). Binary grids (signed, one bit):
        1 everywhere and ``sign(v)``.
    """
    return _LSQ.apply(values, step, grid, gradient_scale, floor, ceiling, border)  # type: ignore[no-any-return, no-untyped-call]


class LSQQuantizer(nn.Module):
    """What weight and activation quantizers share: a grid, a learned positive ``step``, and how it is first set.

    ``step`` is NaN until :func:`brfx.calibrate` sets it; :class:`~brfx.errors.NotCalibratedError` is raised when the
    module is run before. ``mode`` is ``"quantize"``, ``"pass"`` (values go through, see
    :func:`brfx.quantization_disabled`) or ``"calibrate"``.
    """

    #: Parameters that the trainer gives the steps' own learning rate and no weight decay.
    own_rate: ClassVar[tuple[str, ...]] = ("step",)
    #: Parameters that the trainer keeps from falling below a value, and that value.
    positive: ClassVar[dict[str, float]] = {"step": MIN_STEP}
    #: Bounds of the values before they are quantized.
    floor: float = -math.inf
    ceiling: float = math.inf
    #: See :func:`lsq_quantize`; :data:`BORDER_OF_SUMS` where what is quantized is a sum of codes.
    border: float = 0.0
    #: Whether Python code decides if it is reached at all: calibration may then leave it without a step.
    optional: bool = False

    def __init__(self, bits: int, *, signed: bool, step_shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.grid = Grid(bits, signed)
        self.step = nn.Parameter(torch.full(step_shape, math.nan))
        self.calibrated = False
        self.mode = "quantize"
        self.begin_calibration()
        self.mode = "quantize"

    @property
    def bits(self) -> int:
        return self.grid.bits

    @property
    def signed(self) -> bool:
        return self.grid.signed

    def forward(self, input: Tensor) -> Tensor:  # named as a ReLU's, which it may stand for
        values = input
        if self.mode == "pass":
            return self.prepare(values)
        if self.mode == "calibrate" and values.numel():
            self._calibrate(self.prepare(values).detach())
        if not self.calibrated and not self.has_step():
            if not values.numel():  # no box was found, say: nothing to quantize, nothing to learn a step from
                return self.prepare(values)
            raise NotCalibratedError("a quantizer has no step yet: run brfx.calibrate(qmodel, batches) first")
        return self.quantize(values)

    def prepare(self, values: Tensor) -> Tensor:
        """What happens to the values before they are quantized; here nothing."""
        return values

    def quantize(self, values: Tensor) -> Tensor:
        raise NotImplementedError

    def begin_calibration(self, start: str = "lsq") -> None:
        """Forget what earlier batches showed; the next forward is the first to be calibrated on, by rule ``start``."""
        self._start, self._estimates, self.batches_seen = START_RULES[start], torch.zeros(()), 0
        self.mode = "calibrate"

    @torch.no_grad()
    def _calibrate(self, values: Tensor) -> None:
        """Set ``step`` to what the start rule gives for the batches so far."""
        estimate = self._start(self.grid, values, tuple(self.step.shape))
        self.batches_seen += 1
        start = self._joined(estimate)
        self.calibrated = bool(torch.isfinite(start).all())
        if not self.calibrated:
            raise NotCalibratedError("calibration met NaN or infinite values: check the model's weights and the data")
        self.step.copy_(torch.where(start > 0, start, 1.0))  # all zeros: any step will do until values come

    def _joined(self, estimate: Tensor) -> Tensor:
        """The step for the batches so far: the mean of what the start rule gave for each."""
        self._estimates = self._estimates.to(estimate) + estimate
        return self._estimates / self.batches_seen

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A state dict without this step (one of the FP32 model) leaves the quantizer uncalibrated."""
        if f"{prefix}step" in state_dict:
            super()._load_from_state_dict(state_dict, prefix, *args)
        else:
            self.step.data.fill_(math.nan)
        self.has_step()

    def has_step(self) -> bool:
        """Whether there is a step: it may have been copied from another model's, as into a moving average."""
        self.calibrated = bool(torch.isfinite(self.step).all())
        return self.calibrated

    def extra_repr(self) -> str:
        return f"bits={self.bits}, signed={self.signed}"


class LSQWeightQuantizer(LSQQuantizer):
    """Signed quantizer of a weight; ``g = 1 / sqrt(N * Qp)`` with N the number of weights that share a step.

    ``symmetric=True``: on the grid without a zero, whose largest level in steps stands for Qp.
    """

    #: While calibration runs, which weights its one step is not fitted to.
    left_out: Tensor | None = None

    def __init__(self, bits: int, *, step_shape: tuple[int, ...] = (), symmetric: bool = False) -> None:
        super().__init__(bits, signed=True, step_shape=step_shape)
        self.grid = Grid(bits, signed=True, symmetric=symmetric)

    def _calibrate(self, values: Tensor) -> None:
        super()._calibrate(values if self.left_out is None else values[~self.left_out])

    def quantize(self, values: Tensor) -> Tensor:
        shared = values.numel() // self.step.numel()
        return lsq_quantize(values, self.step, self.grid, gradient_scale=1 / math.sqrt(shared * self.grid.reach))

    def extra_repr(self) -> str:
        return super().extra_repr() + (", symmetric=True" if self.grid.symmetric else "")


class LSQActivationQuantizer(LSQQuantizer):
    """Quantizer of an activation ``(batch, ...)``; ``g = 1 / sqrt(N * Qp)`` with N the features of one sample.

    N leaves the batch out, so that the batch size does not change the training.

    Args:
        bits: 1 to 8.
        signed: whether values may be negative; ``None`` where no graph tells: calibration then decides by what it
            sees, and the answer is kept in the state dict as ``negative``.
        regularized: whether the bin regularizer is to see what it quantizes.
        reason: why it is there, and signed or not; for ``brfx inspect``.
    """

    negative: Tensor

    def __init__(self, bits: int, *, signed: bool | None = False, regularized: bool = True, reason: str = "") -> None:
        super().__init__(bits, signed=bool(signed))
        self.regularized, self.reason = regularized, reason
        if signed is None:
            self.register_buffer("negative", torch.tensor(False))

    @property
    def sign_from_data(self) -> bool:
        return "negative" in self._buffers

    def begin_calibration(self, start: str = "lsq") -> None:
        super().begin_calibration(start)
        if self.sign_from_data:
            self._set_sign(False)

    def _calibrate(self, values: Tensor) -> None:
        if self.sign_from_data and not self.signed and bool((values < 0).any()):
            self._set_sign(True)
            self._estimates, self.batches_seen = torch.zeros(()), 0
        super()._calibrate(values)

    def _set_sign(self, signed: bool) -> None:
        self.grid = Grid(self.bits, signed)
        self.negative.fill_(signed)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.sign_from_data:
            state_dict.setdefault(f"{prefix}negative", torch.tensor(False))  # an FP32 model's has none
        super()._load_from_state_dict(state_dict, prefix, *args)

    def has_step(self) -> bool:
        if self.sign_from_data:
            self._set_sign(bool(self.negative))
        return super().has_step()

    def quantize(self, values: Tensor) -> Tensor:
        features = math.prod(values.shape[1:])
        return lsq_quantize(
            values,
            self.step,
            self.grid,
            gradient_scale=1 / math.sqrt(features * self.grid.high),
            floor=self.floor,
            ceiling=self.ceiling,
            border=self.border,
        )


class QuantizedClippedReLU(LSQActivationQuantizer):
    """ReLU, clip and unsigned quantization in one: ``quantize(clip(x, 0, clip_value))``.

    ``clip_value=None`` is a plain ReLU, ``6.0`` a ReLU6.
    """

    floor = 0.0

    def __init__(self, bits: int, *, clip_value: float | None = None) -> None:
        super().__init__(bits, signed=False)
        self.clip_value = clip_value
        self.ceiling = math.inf if clip_value is None else clip_value

    def prepare(self, values: Tensor) -> Tensor:
        return clipped(values, self.floor, self.ceiling)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, clip_value={self.clip_value}"


class StreamQuantizer(QuantizedClippedReLU):
    """The quantizer of a residual stream: one step for every ReLU of the stream, each of which calls this module.

    Calibration sets the step for the ReLU whose values reach farthest.
    """

    border = BORDER_OF_SUMS

    def __init__(self, bits: int, *, clip_value: float | None = None) -> None:
        super().__init__(bits, clip_value=clip_value)
        self.regularized, self.reason = False, "a residual stream"

    def _joined(self, estimate: Tensor) -> Tensor:
        self._estimates = torch.maximum(self._estimates.to(estimate), estimate)
        return self._estimates
