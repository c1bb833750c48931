"""Update the parameters from a loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from brfx.config import TrainConfig
from brfx.distributed import all_reduce_any
from brfx.errors import TrainingError
from brfx.train.optim import build_optimizer, rate_factor

#: Loss scaling that halves its scale below this finds no gradient that is finite.
_LEAST_SCALE = 2.0**-10


class Update:
    """Backward, gradient clipping, the optimizer with its rates, and loss scaling for FP16.

    Calling it with a loss changes the parameters, unless loss or gradients are not finite, or were not in an earlier
    batch: the device itself decides that, without the host waiting for it. A call with ``sync`` waits, and tells.

    Parameters that a module names in a class attribute ``positive`` are held at that least value after each update: a
    large rate would otherwise carry a quantizer's step through zero.

    Args:
        model: what is trained.
        config: optimizer, rates, clipping, precision.
        total: updates of the whole run.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, total: int) -> None:
        self.clip = config.clip_grad
        self.optimizer = build_optimizer(model, config)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda i: rate_factor(i, total, config.lr_warmup)
        )
        self.scaler = torch.amp.GradScaler(torch.device(config.device).type, enabled=config.precision == "fp16")
        self.positive = positive_parameters(model)
        self.failed = torch.zeros((), device=config.device)  # how many batches before now changed nothing

    @property
    def lr(self) -> float:
        """The rate of the next update."""
        return float(self.scheduler.get_last_lr()[0])

    def __call__(self, loss: Tensor, *, sync: bool = True, share: float = 1.0, completes: bool = True) -> int:
        """Number of updates skipped since the first non-finite batch; 0 when ``sync=False``.

        With ``sync`` the host waits for the device. Where an update was skipped, the gradients stay until
        :meth:`clear`. Of several batches an update, each counts with its ``share`` of the loss, and the one that
        ``completes`` them changes the parameters.
        """
        loss = loss if share == 1 else loss * share
        bad = (self.failed > 0) | all_reduce_any(~torch.isfinite(loss.detach()))
        if self.scaler.is_enabled():  # its scale starts where gradients overflow, and it skips these updates itself
            torch.autograd.backward(self.scaler.scale(loss * torch.where(bad, torch.nan, 1.0)))
        else:
            torch.autograd.backward(loss)
        if completes:
            self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = get_total_norm(grads) if grads else loss.detach().abs()
        if not self.scaler.is_enabled():
            bad |= ~torch.isfinite(norm)
        if completes:
            self._change(parameters, norm, bad)
        self.failed += bad
        failed = self._read() if sync else 0
        if completes and not failed:
            self.clear()
        return failed

    def _change(self, parameters: list[Tensor], norm: Tensor, bad: Tensor) -> None:
        """The update itself, which does nothing where ``bad`` is set."""
        if not self.scaler.is_enabled():
            self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # fused optimizers then do nothing
        if self.clip is not None:  # gradients that are to be looked at stay as they are
            clip_grads_with_norm_(parameters, self.clip, torch.where(bad, 0.0, norm))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for least, held in self.positive:
            torch._foreach_clamp_min_([p.data for p in held], least)
        self.scheduler.step()

    def _read(self) -> int:
        failed = int(self.failed)
        if not failed and self.scaler.is_enabled() and self.scaler.get_scale() < _LEAST_SCALE:
            raise TrainingError("no gradient is finite in FP16 at any loss scale; use --precision bf16 or fp32")
        return failed

    def forgive(self) -> None:
        """Go on with the next batch as if the last one, which was not finite, had not been."""
        if self.scaler.is_enabled():  # it took that for an overflow
            self.scaler.update(self.scaler.get_scale() / self.scaler.get_backoff_factor())
        self.failed.zero_()
        self.clear()

    def clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)


def positive_parameters(model: nn.Module) -> list[tuple[float, list[nn.Parameter]]]:
    """Groups of parameters with the least value that their modules' ``positive`` gives them."""
    found: dict[float, list[nn.Parameter]] = {}
    for module in model.modules():
        for name, least in getattr(module, "positive", {}).items():
            found.setdefault(least, []).append(getattr(module, name))
    return list(found.items())
