"""The bin regularizers of a whole rewritten model, as a module around it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from brfx.analysis.observe import observed_forward, observed_sites
from brfx.calibration import quantizers, require_rewritten
from brfx.config import BR_FORMS
from brfx.distributed import all_reduce_sum, world_size
from brfx.errors import ConfigError
from brfx.fast.training_graph import is_quantizing, training_forward
from brfx.kernels.inductor import compiled
from brfx.kernels.precision import at_least_float32
from brfx.nn import (
    ActivationQuantizer,
    QuantizedLayer,
    QuantizedMultiheadAttention,
    Quantizer,
    WeightQuantizer,
)
from brfx.quant.grid import Grid
from brfx.regularizers import Regularizer
from brfx.regularizers.bin_regularizer import bin_loss, bin_sums, deferred_bin_sums, joint_bin_sums, per_value_divisors


class BinLoss(NamedTuple):
    """``total`` is what to add to the task's loss; ``weight`` and ``act`` are L_BR before lambda."""

    total: Tensor
    weight: Tensor
    act: Tensor


class BinPenalty(Regularizer):
    """Wraps a rewritten model: ``output, br = BinPenalty(qmodel)(x)``; add ``br.total`` to the loss.

    Wrap *this* in DDP or ``torch.compile``, not the model inside it: the penalty reads the model's parameters, and a
    wrapper that does not see it gives every rank its own gradient.

    ``form="mean"`` is the paper's: a bin counts as the mean of ``(v - k*s)^2`` over it, so that the pull on one value
    falls with the size of its bin. ``form="per_value"`` pulls each value alike, in layers of every size: a weight's
    loss is ``sum (v - k*s)^2 / 2``, an activation's the same as a mean over the batch, and their gradients to a value
    are ``v - k*s`` and ``(v - k*s) / batch``. Levels stay where they are, as in Nagel et al., ICML 2022: no step gets a
    gradient. SGD of rate lr and momentum m then closes the share ``1 - exp(-1000 * weight * lr / (1 - m))`` of a
    weight's distance to its level in 1,000 batches, in every layer, where nothing else moves it: with m = 0.9 and the
    rate of 0.01 that a cosine from 0.02 is on average, 10 % at a lambda of 0.001, 63 % at 0.01, 99 % at 0.05.

    Args:
        qmodel: what :func:`brfx.prepare_qat` returned.
        weight: lambda of the weights' regularizer (``--lambda-br``); in the mean form its gradient reaches the weight
            steps.
        act: lambda of the activations' regularizer (``--lambda-br-act``); its gradient reaches the layers above.
        form: ``"mean"`` or ``"per_value"`` (``--br-form``), of both.
        act_gradient_to_step: let the activations' regularizer train the activation steps too
            (``--br-backprop-to-alpha-act``).
        freeze_weight_steps, freeze_act_steps: what :meth:`begin` freezes.

    Raises:
        BrfxError: the model was not made by :func:`brfx.prepare_qat`.
        ConfigError: a lambda is negative; no such form; or one that trains no step is to train the activations'.
    """

    weight: Tensor
    act: Tensor

    def __init__(
        self,
        qmodel: nn.Module,
        weight: float = 1.0,
        act: float = 1.0,
        *,
        form: str = "mean",
        act_gradient_to_step: bool = False,
        freeze_weight_steps: bool = False,
        freeze_act_steps: bool = False,
    ) -> None:
        super().__init__()
        require_rewritten(qmodel)
        for name, value in (("weight", weight), ("act", act)):
            if not value >= 0:
                raise ConfigError(f"{name}={value!r}: a lambda takes 0 or more")
        if form not in BR_FORMS:
            raise ConfigError(f"form={form!r}: takes {' or '.join(BR_FORMS)}")
        if form == "per_value" and act_gradient_to_step:
            raise ConfigError('act_gradient_to_step=True: form="per_value" trains no step; it takes form="mean"')
        self.per_value = form == "per_value"
        self.model = qmodel
        device = next(qmodel.parameters()).device
        self.register_buffer("weight", torch.tensor(float(weight), device=device), persistent=False)
        self.register_buffer("act", torch.tensor(float(act), device=device), persistent=False)
        self._train_weight, self._train_act = weight > 0, act > 0
        self.freeze_weight_steps, self.freeze_act_steps = freeze_weight_steps, freeze_act_steps
        self._observe_fn = per_value if self.per_value else bins_that_train_steps if act_gradient_to_step else bins
        self._observed_forward = observed_forward(qmodel, self._observe_fn)
        self._sites = observed_sites(qmodel)
        self._layers = [
            module for module in qmodel.modules() if isinstance(module, (QuantizedLayer, QuantizedMultiheadAttention))
        ]

    @property
    def logged_terms(self) -> tuple[str, ...]:
        return ("weight",) * self._train_weight + ("act",) * self._train_act

    def begin(self) -> None:
        """The warm-up is over: freeze the steps that were to be frozen when regularization starts."""
        for quantizer in quantizers(self.model).values():
            weight = isinstance(quantizer, WeightQuantizer)
            if self.freeze_weight_steps if weight else self.freeze_act_steps:
                quantizer.set_trainable(False)

    def forward(self, *inputs: Any) -> tuple[Any, BinLoss]:
        output, seen = self._observed_forward(self.model, *inputs)
        return output, self._terms(seen, self.weight_loss)

    def training_form(self, kernels: bool, *, deferred: bool = True) -> Callable[..., tuple[Any, BinLoss]]:
        """A function that computes what calling this computes and trains faster (:mod:`brfx.fast.training_graph`).

        What was given a lambda of 0 is not computed: its term is 0.

        Args:
            kernels: compile the pieces between layers, for use without ``torch.compile`` around the whole.
            deferred: L_BR of the activations comes out of backward: ``act`` holds it from then on; in ``total`` it has
                its gradient and no value. That spares a pass over each activation in forward.
        """
        if not isinstance(self.model, GraphModule):
            return self
        weight_loss = compiled(self.weight_loss) if kernels else self.weight_loss
        if not self._train_weight:
            weight_loss = partial(self._total, [])
        observe_fn, in_backward, first = _OF_WEIGHTS[self._observe_fn], None, tuple[Tensor, ...]()
        if self._train_act:
            observe_fn = self._observe_fn
        if self._train_act and deferred:
            in_backward = _DEFERRED[self._observe_fn]
            logged, act = logged_in_backward(self.model)
            first = (logged,)
        forward = training_forward(self.model, observe_fn, kernels=kernels, deferred=in_backward)

        def run(*inputs: Any) -> tuple[Any, BinLoss]:
            output, seen = forward(self.model, *first, *inputs)
            terms = self._terms({site: sums for site, sums in seen.items() if sums is not None}, weight_loss)
            return output, terms._replace(act=act) if first else terms

        return run

    def can_train(self) -> bool:
        lambdas = ((self.weight, self._train_weight), (self.act, self._train_act))
        return is_quantizing(self.model) and all(given or not was_raised(value) for value, given in lambdas)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold: all but a function that is made of the model."""
        return {name: value for name, value in super().__getstate__().items() if name != "_observed_forward"}  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._observed_forward = observed_forward(self.model, self._observe_fn)

    def weight_loss(self) -> Tensor:
        """L_BR summed over the quantized weights of layers; 0 without any."""
        by_grid: dict[Grid, list[tuple[Tensor, WeightQuantizer]]] = {}
        for layer in self._layers:
            for weight, quantizer in layer.regularized():
                by_grid.setdefault(quantizer.grid, []).append((weight, quantizer))
        losses = []
        for grid, pairs in by_grid.items():
            steps = [quantizer.step.detach() if self.per_value else quantizer.step for _, quantizer in pairs]
            counts, squares = joint_bin_sums([quantizer.prepare(weight) for weight, quantizer in pairs], steps, grid)
            losses.append(bin_loss(per_value_divisors(counts) if self.per_value else counts, squares))
        return self._total(losses)

    def _terms(self, seen: dict[str, tuple[Tensor, ...]], weight_loss: Callable[[], Tensor]) -> BinLoss:
        of_functions = [isinstance(self._sites[site], WeightQuantizer) for site in seen]
        with torch.set_grad_enabled(torch.is_grad_enabled() and (self._train_weight or was_raised(self.weight))):
            read = [bin_loss(*sums[:2]) for sums, weight in zip(seen.values(), of_functions, strict=True) if weight]
            weight = weight_loss() + self._total(read)
        with torch.set_grad_enabled(torch.is_grad_enabled() and (self._train_act or was_raised(self.act))):
            acts = [sums for sums, weight in zip(seen.values(), of_functions, strict=True) if not weight]
            deferred = [zero for sums in acts for zero in sums[2:]]
            act = self._total([bin_loss(*sums) for sums in of_global_batch([sums[:2] for sums in acts])] + deferred)
        return BinLoss(self.weight * weight + self.act * act, weight.detach(), act.detach())

    def _total(self, losses: list[Tensor]) -> Tensor:
        return torch.stack(losses).sum() if losses else self.weight.new_zeros(())


def was_raised(strength: Tensor) -> bool:
    """Whether a lambda that was given as 0 is above it by now. Its value is read, which waits for the device, only
    if it was written to. Compiled code keeps the lambdas that were given."""
    return not torch.compiler.is_compiling() and strength._version > 0 and bool(strength > 0)


def logged_in_backward(model: nn.Module) -> tuple[Tensor, Tensor]:
    """A scalar that requires grad, and a scalar that holds what the last backward gave it."""
    logged = at_least_float32(next(model.parameters())).new_zeros((), requires_grad=True)
    value = torch.zeros_like(logged, requires_grad=False)

    def report(logged: Tensor) -> None:
        assert logged.grad is not None
        value.copy_(logged.grad)
        logged.grad = None

    logged.register_post_accumulate_grad_hook(report)  # type: ignore[no-untyped-call]
    return logged, value


def of_global_batch(sums: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """The bins' counts and squares of all ranks' batches together, in one exchange."""
    if world_size() == 1 or not sums:
        return sums
    flat = [part for counts, squares in sums for part in (counts, squares)]
    parts = torch.split(all_reduce_sum(torch.cat(flat)), [len(part) for part in flat])
    return [(parts[i].detach(), parts[i + 1]) for i in range(0, len(parts), 2)]


def bins(quantizer: Quantizer, values: Tensor) -> tuple[Tensor, Tensor]:
    """The bins' sums of what a quantizer is given; of an activation without gradient to the step."""
    step = quantizer.step if isinstance(quantizer, WeightQuantizer) else quantizer.step.detach()
    return bin_sums(quantizer.prepare(values), step, quantizer.grid)


def bins_that_train_steps(quantizer: Quantizer, values: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`bins` with gradient to every step."""
    return bin_sums(quantizer.prepare(values), quantizer.step, quantizer.grid)


def weight_bins(quantizer: Quantizer, values: Tensor) -> tuple[Tensor, Tensor] | None:
    """:func:`bins` of weights alone; ``None`` of activations."""
    return bins(quantizer, values) if isinstance(quantizer, WeightQuantizer) else None


def per_value(quantizer: Quantizer, values: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`bins` whose squares are divided by the same for each value, without gradient to any step."""
    counts, squares = bin_sums(quantizer.prepare(values), quantizer.step.detach(), quantizer.grid)
    return per_value_divisors(counts, 1 if isinstance(quantizer, WeightQuantizer) else len(values)), squares


def weight_per_value(quantizer: Quantizer, values: Tensor) -> tuple[Tensor, Tensor] | None:
    """:func:`per_value` of weights alone; ``None`` of activations."""
    return per_value(quantizer, values) if isinstance(quantizer, WeightQuantizer) else None


def deferred_bins(quantizer: ActivationQuantizer, values: Tensor, logged: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`bins` of an activation, with squares that are summed in backward (:func:`deferred_bin_sums`)."""
    return _deferred_bins(quantizer, values, quantizer.step.detach(), logged)


def deferred_bins_that_train_steps(
    quantizer: ActivationQuantizer, values: Tensor, logged: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`deferred_bins` with gradient to the step."""
    return _deferred_bins(quantizer, values, quantizer.step, logged)


def deferred_per_value(quantizer: ActivationQuantizer, values: Tensor, logged: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`per_value` of an activation, with squares that are summed in backward."""
    counts, squares, zero = deferred_bins(quantizer, values, logged)
    return per_value_divisors(counts, len(values)), squares, zero


def _deferred_bins(
    quantizer: ActivationQuantizer, values: Tensor, step: Tensor, logged: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return deferred_bin_sums(values, step, quantizer.grid, logged, floor=quantizer.floor, ceiling=quantizer.ceiling)


#: By the function that observes both: the one for weights alone, and the deferred one for activations. They have names
#: of their own, since chains of one text are compiled once (:mod:`brfx.fast.training_graph`).
_OF_WEIGHTS: dict[Any, Any] = {bins: weight_bins, bins_that_train_steps: weight_bins, per_value: weight_per_value}
_DEFERRED: dict[Any, Any] = {
    bins: deferred_bins,
    bins_that_train_steps: deferred_bins_that_train_steps,
    per_value: deferred_per_value,
}
