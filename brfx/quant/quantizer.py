"""The quantizer protocol, in which passes, calibration, regularizers, audit and exporters are written."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from brfx.errors import NotCalibratedError
from brfx.kernels.precision import at_least_float32
from brfx.quant.grid import Grid, clipped
from brfx.quant.step_init import STEP_INIT_RULES, StepInitRule

#: The ``grad_margin`` of a quantizer of sums of codes, in codes. Such a sum is often the outermost level itself.
#: Rounding must not decide whether its gradient passes.
GRAD_MARGIN_OF_SUMS = 1e-4


class Quantizer(nn.Module):
    """Base of weight and activation quantizers: a grid, a positive ``step``, and its calibration.

    What comes out is ``grid.decode(encode(values), step)``, bit for bit: an integer times a scale, so that every
    exporter writes what was trained. A kind of quantizer defines :meth:`quantize` with its gradients, ``step``, and
    where they differ :meth:`transform`, :meth:`set_step` and :meth:`first_step`.

    ``step`` is NaN until :func:`brfx.calibrate` sets it; :class:`~brfx.errors.NotCalibratedError` is raised when the
    module is run before. ``mode`` is ``"quantize"``, ``"pass"`` (values go through, see
    :func:`brfx.quantization_disabled`) or ``"calibrate"``.
    """

    step: Tensor  #: a scalar, or one per output channel in a shape that broadcasts; maybe computed from a parameter
    #: For the log, how the levels are set.
    about: ClassVar[str]
    #: The entries of the state dict that ``step`` is made of; a state dict without them leaves it uncalibrated.
    scales: ClassVar[tuple[str, ...]] = ("step",)
    #: Parameters that the trainer gives the steps' own learning rate and no weight decay.
    own_rate: ClassVar[tuple[str, ...]] = ()
    #: Parameters that the trainer keeps from falling below a value, and that value.
    positive: ClassVar[dict[str, float]] = {}
    #: Bounds of the values before they are quantized.
    floor: float = -math.inf
    ceiling: float = math.inf
    #: How far beyond the outermost code a value still counts as inside for its gradient, in codes;
    #: :data:`GRAD_MARGIN_OF_SUMS` where what is quantized is a sum of codes.
    grad_margin: float = 0.0
    #: Whether the input has already been transformed, so that :meth:`transform` is skipped. Exporters set it on copies.
    prepared: bool = False
    #: Whether Python code decides if it is reached at all: calibration may then leave it without a step.
    optional: bool = False
    #: The dotted name in the model that :func:`brfx.prepare_qat` put it into.
    name: str = ""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.calibrated = False
        self._begin("lsq")
        self.mode = "quantize"

    @property
    def bits(self) -> int:
        return self.grid.bits

    @property
    def signed(self) -> bool:
        return self.grid.signed

    @property
    def only_clips(self) -> bool:
        """Whether :meth:`transform` is the clipping between ``floor`` and ``ceiling`` and nothing else, or is done."""
        return self.prepared or type(self).transform is Quantizer.transform

    def forward(self, input: Tensor) -> Tensor:  # named as a ReLU's, which it may stand for
        values = input
        if self.mode == "pass":
            return clipped(values, self.floor, self.ceiling)
        if self.mode == "calibrate" and values.numel():
            self._calibrate(values.detach())
        if not self.calibrated and not self.has_step():
            if not values.numel():  # no box was found, say: nothing to quantize, nothing to learn a step from
                return self.prepare(values)
            raise NotCalibratedError(
                f"{self.name or 'a quantizer'} has no step yet: run brfx.calibrate(qmodel, batches) first"
            )
        return self.quantize(values)

    def prepare(self, values: Tensor) -> Tensor:
        """The values that are rounded, after :meth:`transform`."""
        return values if self.prepared else self.transform(values)

    def transform(self, values: Tensor) -> Tensor:
        """Transform the values before they are rounded: here they are clipped."""
        return clipped(values, self.floor, self.ceiling)

    def quantize(self, values: Tensor) -> Tensor:
        """The levels of ``values``, with gradients."""
        raise NotImplementedError

    def encode(self, values: Tensor, step: Tensor | None = None) -> Tensor:
        """The code of each value, as floats; at another ``step`` than the own one if it is given."""
        step = self.step.detach() if step is None else step
        return self.grid.encode(self.prepare(at_least_float32(values)), step, lower_bound=self.floor)

    def integers(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The integer that stands for each value, uint8 where the grid is unsigned, else int8, and what it is worth:
        one scale, or one a channel in a shape that broadcasts. Their product is ``quantize(values)``, bit for bit
        (:meth:`brfx.quant.grid.Grid.integers`)."""
        integers, scale = self.grid.integers(self.encode(values), self.step.detach())
        return integers.to(torch.int8 if self.signed else torch.uint8), scale

    def set_trainable(self, wanted: bool) -> None:
        """Train what ``step`` is made of, or freeze it."""
        for name in self.own_rate:
            getattr(self, name).requires_grad_(wanted)

    def begin_calibration(self, start: str = "lsq") -> None:
        """Forget what earlier batches showed; the next forward is the first to be calibrated on, by rule ``start``."""
        self._begin(start)
        self.mode = "calibrate"

    def end_calibration(self) -> None:
        """Quantize from now on."""
        self.mode = "quantize"

    def _begin(self, start: str) -> None:
        self._start, self._estimates, self.batches_seen = STEP_INIT_RULES[start], torch.zeros(()), 0

    def first_step(self, values: Tensor, start: StepInitRule) -> Tensor:
        """The step that a start rule gives for ``values``."""
        return start(self.grid, self.prepare(values), tuple(self.step.shape))

    def set_step(self, step: Tensor) -> None:
        """Make ``step`` the quantizer's step."""
        self.step.copy_(step)

    @torch.no_grad()
    def _calibrate(self, values: Tensor) -> None:
        """Set ``step`` to what the start rule gives for the batches so far."""
        estimate = self.first_step(values, self._start)
        self.batches_seen += 1
        start = self._joined(estimate)
        self.calibrated = bool(torch.isfinite(start).all())
        if not self.calibrated:
            raise NotCalibratedError(
                f"{self.name or 'a quantizer'} met NaN or infinite values: check the model's weights and the data"
            )
        self.set_step(torch.where(start > 0, start, 1.0))  # all zeros: any step will do until values come

    def _joined(self, estimate: Tensor) -> Tensor:
        """The step for the batches so far: the mean of what the start rule gave for each."""
        self._estimates = self._estimates.to(estimate) + estimate
        return self._estimates / self.batches_seen

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A state dict without this step (one of the FP32 model) leaves the quantizer uncalibrated."""
        if all(f"{prefix}{name}" in state_dict for name in self.scales):
            super()._load_from_state_dict(state_dict, prefix, *args)
        else:
            for name in self.scales:
                getattr(self, name).data.fill_(math.nan)
        self.has_step()

    def has_step(self) -> bool:
        """Whether there is a step: it may have been copied from another model's, as into a moving average."""
        self.calibrated = bool(torch.isfinite(self.step).all())
        return self.calibrated

    def extra_repr(self) -> str:
        return f"bits={self.bits}, signed={self.signed}"


class WeightQuantizer(Quantizer):
    """Signed quantizer of a weight.

    Args:
        bits: 1 to 8.
        symmetric: on the grid without a zero.
    """

    #: While calibration runs, which weights its one step is not fitted to.
    left_out: Tensor | None = None

    def __init__(self, bits: int, *, symmetric: bool = False) -> None:
        super().__init__(Grid(bits, signed=True, symmetric=symmetric))

    def _calibrate(self, values: Tensor) -> None:
        super()._calibrate(values if self.left_out is None else values[~self.left_out])

    def end_calibration(self) -> None:
        super().end_calibration()
        self.left_out = None

    def extra_repr(self) -> str:
        return super().extra_repr() + (", symmetric=True" if self.grid.symmetric else "")


class ActivationQuantizer(Quantizer):
    """Quantizer of an activation ``(batch, ...)``.

    Args:
        bits: 1 to 8.
        signed: whether values may be negative; ``None`` where no graph tells: calibration then decides by what it
            sees, and the answer is kept in the state dict as ``negative``.
        regularized: whether the bin regularizer is to see what it quantizes.
        reason: why it is there, and signed or not; for ``brfx inspect``.
    """

    negative: Tensor
    #: Whether it is a residual stream's: one grid for several ReLUs, each of which calls it.
    is_stream: ClassVar[bool] = False

    def __init__(self, bits: int, *, signed: bool | None = False, regularized: bool = True, reason: str = "") -> None:
        super().__init__(Grid(bits, bool(signed)))
        self.regularized, self.reason = regularized, reason
        if signed is None:
            self.register_buffer("negative", torch.tensor(False))

    @property
    def is_relu(self) -> bool:
        """Whether it stands for a ReLU as well: nothing below 0 passes it, and no gradient."""
        return self.floor == 0.0

    @property
    def clip_value(self) -> float | None:
        """The ceiling of such a ReLU; ``None``: it has none."""
        return None if self.ceiling == math.inf else self.ceiling

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
