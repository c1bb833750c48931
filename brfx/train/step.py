"""One forward pass to a loss: eager, with compiled kernels, or compiled whole."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import CheckpointPolicy

from brfx.config import TrainConfig
from brfx.distributed import world_size
from brfx.errors import ConfigError
from brfx.kernels.inductor import compiled
from brfx.kernels.training_form import HasTrainingForm
from brfx.regularizers import Regularizer
from brfx.train.tasks import Task, call, classification, count_correct, takes_smoothing

log = logging.getLogger(__name__)

#: ``(inputs, targets, soft=None) -> (loss, {"task": .., "correct": .., and one entry per term of the penalty})``;
#: ``soft`` is a teacher's output. ``"correct"`` is there where the task counts it.
LossStep = Callable[..., tuple[Tensor, dict[str, Tensor]]]

#: ``(output, targets, soft) -> loss``, a mean over the batch.
Objective = Callable[[Any, Any, Any], Tensor]

#: Of all tensors in a batch's inputs, and of those in its targets.
Shapes = tuple[tuple[torch.Size, ...], ...]

#: Batches that a run must have before ``compile="auto"`` compiles the whole step, or its kernels. From an empty cache
#: the compilations take the time of some 140 to 280 (kernels) and 150 to 550 (whole) compiled batches of ResNet-20
#: (docs/benchmarks.md), and the step is compiled anew when the warm-up is over.
WORTH_COMPILING, WORTH_KERNELS = 1000, 500

#: None is the device's own choice, which nothing runs in: MPS warns of float32.
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def objective(config: TrainConfig, task: Task | None = None) -> Objective:
    """The task's loss, mixed with distillation where there is a teacher's output; by default of a classifier.

    ``(1 - distill) * loss(output, targets) + distill * T^2 * distance(output, soft, T)``, the temperature T; of a
    classifier that is cross-entropy with label smoothing, and ``KL(softmax(soft / T) || softmax(output / T))``.

    Raises:
        ConfigError: the task has no distance that could be distilled, or its loss takes no label smoothing.
    """
    task = task or classification()
    mix, temperature, distance = config.distill, config.temperature, task.distance
    if mix and distance is None:
        raise ConfigError(f"distill={mix}: this task cannot be distilled, it has no distance between two outputs")
    compute = task.loss
    if takes_smoothing(compute):
        compute = partial(compute, label_smoothing=config.label_smoothing)
    elif config.label_smoothing:
        raise ConfigError(f"label_smoothing={config.label_smoothing}: the task's loss takes none, so leave it at 0")

    def loss(output: Any, targets: Any, soft: Any) -> Tensor:
        cost = compute(output, targets)
        if not isinstance(cost, Tensor) or cost.dim():
            shape = f" of shape {tuple(cost.shape)}" if isinstance(cost, Tensor) else ""
            raise ConfigError(f"the loss is a {type(cost).__name__}{shape}: it takes one number, a mean over the batch")
        if soft is None:
            return cost
        assert distance is not None
        return (1 - mix) * cost + mix * temperature**2 * distance(output, soft, temperature)

    return loss


def loss_step(
    model: nn.Module,
    penalty: Any | None,
    *,
    kernels: bool | None = None,
    precision: str = "fp32",
    loss: Objective | None = None,
    correct: Callable[[Any, Any], Tensor] | None = count_correct,
) -> LossStep:
    """The function that is differentiated: ``loss``, plus ``terms.total`` if there is a penalty.

    Args:
        model, penalty: as in :func:`brfx.fit`. A :class:`~brfx.regularizers.Regularizer` says which of its
            terms are logged; of another penalty all are.
        kernels: what a ``training_form`` is asked for, where there is one; ``None``: the modules are called as they
            are.
        precision: ``"bf16"`` and ``"fp16"`` run the model under autocast; the loss is in FP32.
        loss: default cross-entropy.
        correct: as in :class:`brfx.train.Task`.
    """
    module: Any = model if penalty is None else penalty
    forward: Callable[..., Any] = module
    if kernels is not None and isinstance(module, HasTrainingForm):
        forward = module.training_form(kernels)
    device = next(model.parameters()).device.type
    loss = loss or objective(TrainConfig())

    def step(inputs: Any, targets: Any, soft: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(device, PRECISIONS[precision], enabled=precision != "fp32"):
            output, terms = (call(forward, inputs), None) if penalty is None else call(forward, inputs)
        cost = loss(output if precision == "fp32" else in_fp32(output), targets, soft)
        numbers = {"task": cost.detach()}
        if correct is not None:
            numbers["correct"] = correct(output, targets)
        if terms is None:
            return cost, numbers
        fields = [name for name in terms._fields if name != "total"]
        for name in penalty.logged_terms if isinstance(penalty, Regularizer) else fields:
            numbers[name] = getattr(terms, name).detach()
        return cost + terms.total, numbers

    return step


def in_fp32(output: Any) -> Any:
    """``output`` with every floating-point tensor in it in FP32."""
    return tree_map(
        lambda value: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value, output
    )


def how_to_compile(choice: str, batches: int, device: str) -> str:
    """What ``TrainConfig.compile`` means for a run of this many batches: ``"whole"``, ``"kernels"`` or ``"none"``."""
    if choice == "off" or (choice == "auto" and batches < WORTH_KERNELS):
        return "none"
    if not _can_compile(torch.device(device).type):
        return "none"
    small = choice == "kernels" or (choice == "auto" and batches < WORTH_COMPILING)
    return "kernels" if small or world_size() > 1 else "whole"  # bins are summed over ranks between the kernels


#: Seconds that the first batch takes where it is compiled, on two cores (docs/benchmarks.md).
COMPILING_TAKES = {"kernels": "30 to 110 s", "whole": "90 to 220 s"}


def compiles_pieces(model: nn.Module, penalty: Any | None) -> bool:
    """Whether ``compile="kernels"`` compiles anything: not of FP32 models, nor where Python calls islands."""
    module: Any = model if penalty is None else penalty
    form: Any = module.training_form(True) if isinstance(module, HasTrainingForm) else module
    return form is not module


@cache
def _can_compile(device: str) -> bool:
    missing = None
    if sys.platform == "win32" or device not in ("cpu", "cuda"):
        log.warning("nothing is compiled on %s, training is slower", "Windows" if sys.platform == "win32" else device)
        return False
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
    correct: Callable[[Any, Any], Tensor] | None = count_correct,
    shapes: Shapes | None = None,
) -> LossStep:
    """:func:`loss_step` in the form that :func:`how_to_compile` chose, inside DDP where several processes train.

    What is compiled is so for batches of ``shapes``, by default those of the first batch. Batches of other shapes, such
    as a smaller last one, go through the same function uncompiled, so that none causes a compilation.
    """
    common: dict[str, Any] = {"precision": precision, "loss": loss, "correct": correct}
    if how == "none":
        return in_ranks(model, penalty, loss_step(model, penalty, **common))
    eager = loss_step(model, penalty, kernels=False, **common)
    fast = compile_whole(eager) if how == "whole" else loss_step(model, penalty, kernels=True, **common)
    return in_ranks(model, penalty, _for_one_shape(fast, eager, shapes))


def build_teacher(teacher: nn.Module, how: str, shapes: Shapes | None = None) -> Callable[[Any], Any]:
    """``inputs -> output`` of ``teacher``, as it is and without gradients; compiled where the step is.

    It is compiled on its own, so that Python code in a teacher that does not compile as one graph still runs. Batches
    of other shapes run uncompiled, as in :func:`build_step`.
    """
    eager = partial(call, teacher)
    if how == "none":
        return torch.no_grad()(eager)
    return torch.no_grad()(_for_one_shape(partial(call, compiled(teacher)), eager, shapes and shapes[:1]))


def shapes_of(*values: Any) -> Shapes:
    """Of the tensors in each of ``values``."""
    return tuple(
        (value.shape,)
        if isinstance(value, Tensor)
        else tuple(leaf.shape for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
        for value in values
    )


def _for_one_shape(fast: Callable[..., Any], eager: Callable[..., Any], shapes: Shapes | None) -> Callable[..., Any]:
    """``fast`` for a batch of ``shapes``, by default those of the first one, ``eager`` for all others."""
    kept = [] if shapes is None else [shapes]

    def run(*batch: Any) -> Any:
        found = shapes_of(*batch[:2])
        if not kept:
            kept.append(found)
        return (fast if found == kept[0] else eager)(*batch)

    return run


def in_ranks(model: nn.Module, penalty: Any | None, step: LossStep) -> LossStep:
    """``step`` as the forward of a DDP module, which averages gradients over the processes that train together."""
    if world_size() == 1:
        return step
    trained = model if penalty is None else penalty
    device = next(model.parameters()).device
    ids = [device] if device.type == "cuda" else None
    branches = getattr(model, "has_mode_branches", False)
    whole = isinstance(model, torch.fx.GraphModule) and not branches  # nothing in it is passed by
    return DistributedDataParallel(_Stepping(trained, step), device_ids=ids, find_unused_parameters=not whole)


class _Stepping(nn.Module):
    """A step that DDP can wrap, beside the module whose parameters it trains."""

    def __init__(self, trained: nn.Module, step: LossStep) -> None:
        super().__init__()
        self.trained, self.step = trained, step

    def forward(self, inputs: Any, targets: Any, soft: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return self.step(inputs, targets, soft)


def compile_whole(step: LossStep) -> LossStep:
    """``step`` through ``torch.compile`` as one graph that makes again in backward what is cheap to make.

    PyTorch's partitioner by default keeps what a later kernel reads whole, and what was made long ago. Here both are
    made again; bytes are kept, as they are codes. docs/benchmarks.md has the memory.
    """
    whole = compiled(step, fullgraph=True, joint_custom_pre_pass=_KeepBytes())

    def run(inputs: Any, targets: Any, soft: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
        with torch._functorch.config.patch(_RECOMPUTE):
            loss, numbers = whole(inputs, targets, soft)
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
