"""Several processes that train one model, started by ``torchrun``. Without them every function here does nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from brfx.errors import TrainingError, first_line
from brfx.io.state_dict import versioned

T = TypeVar("T")

#: A rank waits for the others no longer than this: a validation on the slowest machine takes less.
_PATIENCE = timedelta(minutes=30)


def rank() -> int:
    """This process's number, 0 of 1 where there is one process."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def process_group(device: str) -> Iterator[str]:
    """Join the processes that ``torchrun`` started, and yield this one's device: ``cuda`` becomes ``cuda:LOCAL_RANK``.

    The backend is nccl on CUDA, else gloo. Where torchrun did not start this process, or the group is there already,
    ``device`` is yielded as it is.

    Raises:
        TrainingError: another process stopped or cannot be reached.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        yield device
        return
    kind = torch.device(device).type
    if kind == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=_PATIENCE)
    with name_lost_ranks():
        yield device
    dist.destroy_process_group()


@contextmanager
def name_lost_ranks() -> Iterator[None]:
    """An error of a collective operation says that another process is gone."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if world_size() > 1 and any(word in text for word in ("Connection", "gloo", "NCCL", "ncclRemoteError", "peer")):
            raise TrainingError(
                f"rank {rank()}: another process of this run has stopped ({first_line(error)}); "
                "start them again with --resume"
            ) from error
        raise


def broadcast_object(value: T) -> T:
    """The value of rank 0, on every rank."""
    if world_size() == 1:
        return value
    held: list[Any] = [value if rank() == 0 else None]
    dist.broadcast_object_list(held)
    return held[0]  # type: ignore[no-any-return]


def all_gather_object(value: T) -> list[T]:
    """The values of all ranks, in their order."""
    if world_size() == 1:
        return [value]
    held: list[Any] = [None] * world_size()
    dist.all_gather_object(held, value)
    return held


def all_reduce_max(value: float, device: torch.device | str = "cpu") -> float:
    """The largest of the ranks' values."""
    if world_size() == 1:
        return value
    held = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(held, dist.ReduceOp.MAX)
    return float(held)


def all_reduce_any(flag: Tensor) -> Tensor:
    """Whether ``flag``, one boolean, is true on any rank; the host does not wait for the answer of a CUDA device."""
    if world_size() == 1:
        return flag
    held = flag.byte()
    dist.all_reduce(held, dist.ReduceOp.MAX)
    return held.bool()


@torch.no_grad()
def broadcast_buffers(model: nn.Module) -> None:
    """Give every rank rank 0's buffers, such as running statistics, which each rank estimates from its own batches."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def broadcast_state(model: nn.Module) -> None:
    """Give every rank rank 0's parameters and buffers."""
    if world_size() > 1:
        state = broadcast_object({name: value.cpu() for name, value in model.state_dict().items()})
        model.load_state_dict(versioned(state, model))


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum of the ranks' ``values``, on every rank; differentiable.

    A rank's part of the sum gets the gradients of all ranks' losses, so that parameters whose gradients are averaged
    over ranks, as DDP does, get that of the mean of the losses.
    """
    return _Summed.apply(values) if world_size() > 1 else values  # type: ignore[no-any-return, no-untyped-call]


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _total(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _total(grads[0])


def _total(values: Tensor) -> Tensor:
    total = values.contiguous().clone()
    dist.all_reduce(total)
    return total


class SyncedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """A batch norm that normalizes in training by the statistics of all ranks' batches together, on any device.

    torch's own, which is faster, runs on CUDA alone.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # that of the class it stands in for was satisfied

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        dims = [0, *range(2, input.dim())]
        shape = [1, -1] + [1] * (input.dim() - 2)
        count = input.numel() // input.shape[1] * world_size()
        mean = all_reduce_sum(input.sum(dims)) / count
        centered = input - mean.view(shape)
        variance = all_reduce_sum(centered.square().sum(dims)) / count
        self._track(mean.detach(), variance.detach() * (count / max(1, count - 1)))
        normalized = centered * (variance + self.eps).rsqrt().view(shape)
        return normalized if self.weight is None else normalized * self.weight.view(shape) + self.bias.view(shape)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


@contextmanager
def sync_batch_norms(model: nn.Module) -> Iterator[None]:
    """Inside, the batch norms of ``model`` see the batches of all ranks as one; nothing changes for one process."""
    norms = [module for module in model.modules() if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)]
    kinds = [type(norm) for norm in norms]
    if world_size() > 1:
        for norm in norms:  # the same module with the same parameters, whoever holds it, that now computes otherwise
            on_cuda = norm.weight is not None and norm.weight.is_cuda
            norm.__class__ = nn.SyncBatchNorm if on_cuda else SyncedBatchNorm  # type: ignore[assignment]
            vars(norm)["process_group"] = None
    try:
        yield
    finally:
        for norm, kind in zip(norms, kinds, strict=True):
            norm.__class__ = kind
