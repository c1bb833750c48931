"""One forward pass to a loss: eager, with compiled kernels, or compiled whole."""

from __future__ import annotations

import importlib.util
import logging
import shutil
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy

from brfx.config import TrainConfig
from brfx.distributed import world_size
from brfx.kernels.inductor import compiled
from brfx.regularizers import HasTrainingForm, Regularizer

log = logging.getLogger(__name__)

#: ``(images, labels, soft=None) -> (loss, {"task": .., "correct": .., and one entry per term of the penalty})``;
#: ``soft`` are a teacher's logits.
LossStep = Callable[..., tuple[Tensor, dict[str, Tensor]]]

#: ``(logits, labels, soft) -> loss``, a mean over the batch.
Objective = Callable[[Tensor, Tensor, Tensor | None], Tensor]

#: Batches that a run must have before ``compile="auto"`` compiles the whole step, or its kernels. From an empty cache
#: the compilations take the time of some 140 to 280 (kernels) and 150 to 550 (whole) compiled batches of ResNet-20
#: (docs/benchmarks.md), and the step is compiled anew when the warm-up is over.
WORTH_COMPILING, WORTH_KERNELS = 1000, 500

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def objective(config: TrainConfig) -> Objective:
    """Cross-entropy with label smoothing, mixed with distillation where there are a teacher's logits.

    ``(1 - distill) * CE(logits, labels) + distill * T^2 * KL(softmax(soft / T) || softmax(logits / T))``, the
    temperature T (Hinton et al., "Distilling the Knowledge in a Neural Network", 2015).
    """
    smoothing, mix, temperature = config.label_smoothing, config.distill, config.temperature

    def loss(logits: Tensor, labels: Tensor, soft: Tensor | None) -> Tensor:
        task = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        if soft is None:
            return task
        student, teacher = F.log_softmax(logits / temperature, 1), F.log_softmax(soft / temperature, 1)
        divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        return (1 - mix) * task + mix * temperature**2 * divergence

    return loss


def loss_step(
    model: nn.Module,
    penalty: Any | None,
    *,
    kernels: bool | None = None,
    precision: str = "fp32",
    loss: Objective | None = None,
) -> LossStep:
    """The function that is differentiated: ``loss``, plus ``terms.total`` if there is a penalty.

    Args:
        model, penalty: as in :func:`brfx.fit`. A :class:`~brfx.regularizers.Regularizer` says which of its
            terms are logged; of another penalty all are.
        kernels: what a ``training_form`` is asked for, where there is one; ``None``: the modules are called as they
            are.
        precision: ``"bf16"`` and ``"fp16"`` run the model under autocast; the loss is in FP32.
        loss: default cross-entropy.
    """
    module: Any = model if penalty is None else penalty
    run: Callable[[Tensor], Any] = module
    if kernels is not None and isinstance(module, HasTrainingForm):
        run = module.training_form(kernels)
    device = next(model.parameters()).device.type
    loss = loss or objective(TrainConfig())

    def step(images: Tensor, labels: Tensor, soft: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(device, PRECISIONS[precision], enabled=precision != "fp32"):
            logits, terms = (run(images), None) if penalty is None else run(images)
        task = loss(logits if precision == "fp32" else logits.float(), labels, soft)
        numbers = {"task": task.detach(), "correct": (logits.argmax(1) == labels).sum()}
        if terms is None:
            return task, numbers
        fields = [name for name in terms._fields if name != "total"]
        for name in penalty.logged_terms if isinstance(penalty, Regularizer) else fields:
            numbers[name] = getattr(terms, name).detach()
        return task + terms.total, numbers

    return step


def how_to_compile(choice: str, batches: int, device: str) -> str:
    """What ``TrainConfig.compile`` means for a run of this many batches: ``"whole"``, ``"kernels"`` or ``"none"``."""
    if choice == "off" or (choice == "auto" and batches < WORTH_KERNELS):
        return "none"
    if not _can_compile(torch.device(device).type):
        return "none"
    small = choice == "kernels" or (choice == "auto" and batches < WORTH_COMPILING)
    return "kernels" if small or world_size() > 1 else "whole"  # bins are summed over ranks between the kernels


@cache
def _can_compile(device: str) -> bool:
    missing = None
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        missing = "a C++ compiler (g++ or clang++)"
    elif device == "cuda" and importlib.util.find_spec("triton") is None:
        missing = "triton"
    if missing:
        log.warning("nothing is compiled, training is slower: %s was not found", missing)
    return missing is None


def build_step(
    model: nn.Module,
    penalty: Any | None,
    how: str,
    precision: str = "fp32",
    *,
    loss: Objective | None = None,
    shape: torch.Size | None = None,
) -> LossStep:
    """:func:`loss_step` in the form that :func:`how_to_compile` chose, inside DDP where several processes train.

    What is compiled is so for images of ``shape``, by default that of the first batch. Batches of another shape, such
    as a smaller last one, go through the same function uncompiled, so that none causes a compilation.
    """
    common: dict[str, Any] = {"precision": precision, "loss": loss}
    if how == "none":
        return in_ranks(model, penalty, loss_step(model, penalty, **common))
    eager = loss_step(model, penalty, kernels=False, **common)
    fast = compile_whole(eager) if how == "whole" else loss_step(model, penalty, kernels=True, **common)
    return in_ranks(model, penalty, _for_one_shape(fast, eager, shape))


def build_teacher(teacher: nn.Module, how: str, shape: torch.Size | None = None) -> Callable[[Tensor], Tensor]:
    """``images -> logits`` of ``teacher``, as it is and without gradients; compiled where the step is.

    It is compiled on its own, so that Python code in a teacher that does not compile as one graph still runs. Batches
    of another shape run uncompiled, as in :func:`build_step`.
    """
    run = teacher if how == "none" else _for_one_shape(compiled(teacher), teacher, shape)
    return torch.no_grad()(run)


def _for_one_shape(fast: Callable[..., Any], eager: Callable[..., Any], shape: torch.Size | None) -> Callable[..., Any]:
    """``fast`` for images of ``shape``, by default that of the first batch, ``eager`` for all others."""
    shapes = [] if shape is None else [shape]

    def run(images: Tensor, *rest: Tensor | None) -> Any:
        if not shapes:
            shapes.append(images.shape)
        return (fast if images.shape == shapes[0] else eager)(images, *rest)

    return run


def in_ranks(model: nn.Module, penalty: Any | None, step: LossStep) -> LossStep:
    """``step`` as the forward of a DDP module, which averages gradients over the processes that train together."""
    if world_size() == 1:
        return step
    trained = model if penalty is None else penalty
    device = next(model.parameters()).device
    ids = [device] if device.type == "cuda" else None
    whole = isinstance(model, torch.fx.GraphModule) and not getattr(
        model, "has_mode_branches", False
    )  # nothing in it is passed by
    return DistributedDataParallel(_Stepping(trained, step), device_ids=ids, find_unused_parameters=not whole)


class _Stepping(nn.Module):
    """A step that DDP can wrap, beside the module whose parameters it trains."""

    def __init__(self, trained: nn.Module, step: LossStep) -> None:
        super().__init__()
        self.trained, self.step = trained, step

    def forward(self, images: Tensor, labels: Tensor, soft: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        return self.step(images, labels, soft)


def compile_whole(step: LossStep) -> LossStep:
    """``step`` through ``torch.compile`` as one graph that makes again in backward what is cheap to make.

    PyTorch's partitioner by default keeps what a later kernel reads whole, and what was made long ago. Here both are
    made again; bytes are kept, as they are codes. docs/benchmarks.md has the memory.
    """
    whole = compiled(step, fullgraph=True, joint_custom_pre_pass=_KeepBytes())

    def run(images: Tensor, labels: Tensor, soft: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        with torch._functorch.config.patch(_RECOMPUTE):
            loss, numbers = whole(images, labels, soft)
            return loss, numbers

    return run


_RECOMPUTE = {
    "ban_recompute_used_far_apart": False,
    "ban_recompute_long_fusible_chains": False,
    "ban_recompute_materialized_backward": False,
}


class _KeepBytes(CustomGraphPass):
    """Mark the bytes that forward makes as to be kept: chains of recomputation then end at the nearest codes."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        for node in graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, Tensor) and value.dtype in (torch.uint8, torch.int8):
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE

    def uuid(self) -> str:
        return "brfx.train.step._KeepBytes 1"  # part of the key under which compiled code is cached on disk
