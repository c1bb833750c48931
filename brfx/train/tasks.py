"""What a model is trained to do: how a batch is read, what an output costs, and how a model is measured."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from brfx.compat import float64_device
from brfx.errors import ConfigError, DataError, TrainingError
from brfx.extras import needed
from brfx.modes import eval_mode
from brfx.train.evaluate import Evaluation, Score, evaluate_classifier


@dataclass(frozen=True, kw_only=True)
class Task:
    """All that :func:`brfx.fit` has to know of a task. :func:`classification`, :func:`segmentation`,
    :func:`detection` and :func:`custom` make one.

    A model is called with a batch's inputs: with a tuple as ``model(*inputs)``, with a mapping as ``model(**inputs)``,
    with anything else, such as a tensor or a list, as ``model(inputs)``.

    Attributes:
        loss: ``loss(output, targets)``, a mean over the batch, on the model's device; the output is in FP32. One that
            also takes ``label_smoothing=`` is given ``TrainConfig.label_smoothing``.
        evaluate: ``evaluate(model, batches)``, an :class:`Evaluation` or :class:`Score`; more is better.
        metric: the name of what that measures.
        split: a batch into inputs and targets.
        size: how many samples inputs are.
        correct: ``correct(output, targets)``, how many samples are right, for the log; of parts of a sample the share.
            ``None``: no such figure is logged.
        distance: ``distance(output, soft, T)``, how far an output is from a teacher's at the temperature T, a mean over
            the batch; the loss has it T^2 times, as gradients at that temperature are so much smaller. ``None``:
            nothing can be distilled.
        compiles: whether a batch of it can be one graph; where not, nothing is compiled.
    """

    loss: Callable[..., Tensor]
    evaluate: Callable[[nn.Module, Iterable[Any]], Evaluation | Score]
    metric: str
    split: Callable[[Any], tuple[Any, Any]]
    size: Callable[[Any], int]
    correct: Callable[[Any, Any], Tensor] | None = None
    distance: Callable[[Any, Any, float], Tensor] | None = None
    compiles: bool = True


def call(model: Callable[..., Any], inputs: Any) -> Any:
    """``model`` of a batch's inputs, see :class:`Task`."""
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def positional(model: nn.Module, inputs: Any) -> Any:
    """A mapping of inputs by name as the tuple that ``model`` takes, where it takes them by position.

        {"mask": m, "x": x}    ->    (x, m)    for forward(self, x, mask=None)

    Raises:
        ConfigError: the model takes no inputs of these names, or not so many.
    """
    named = isinstance(inputs, Mapping)
    if not named and not isinstance(inputs, tuple):
        return inputs
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(**inputs) if named else signature.bind(*inputs)
    except TypeError as error:
        given = ", ".join(map(repr, inputs)) if named else f"{len(inputs)} in a tuple"
        cure = (
            "names them so" if named else "gives as many; what is to stay together goes into a tuple of one, (inputs,)"
        )
        raise ConfigError(
            f"the batches' inputs are {given}, the model's forward takes "
            f"{', '.join(signature.parameters)} ({error}): give split= that {cure}"
        ) from error
    if not named:
        return inputs
    bound.apply_defaults()
    return inputs if bound.kwargs else bound.args


def to_device(values: Any, device: torch.device | str, layout: torch.memory_format | None = None) -> Any:
    """``values`` with every tensor in them, at any depth, on ``device``; images and other 4-d ones in ``layout``."""

    def to(value: Any) -> Any:
        if isinstance(value, Tensor) and layout is not None and value.dim() == 4:
            return value.to(device, non_blocking=True, memory_format=layout)
        if isinstance(value, Tensor):
            return value.to(device, non_blocking=True)
        return value.to(device) if hasattr(value, "to") else value

    return to(values) if isinstance(values, Tensor) else tree_map(to, values)


def pair(batch: Any) -> tuple[Any, Any]:
    """A batch ``(inputs, targets)``.

    Raises:
        ConfigError: it is something else.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        what = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else type(batch).__name__
        raise ConfigError(
            f"a batch is a {what}, no pair (inputs, targets): say how it is split with split=, "
            "such as split=lambda batch: (batch['image'], batch['mask'])"
        )
    return batch[0], batch[1]


def count_samples(inputs: Any) -> int:
    """How many samples inputs are: a list's length, or that of the first tensor.

    Raises:
        ConfigError: there is no tensor in them.
    """
    if isinstance(inputs, Tensor | list):
        return len(inputs)
    found = next((value for value in tree_leaves(inputs) if isinstance(value, Tensor) and value.dim()), None)
    if found is None:
        raise ConfigError(f"there is no tensor in a batch's inputs, a {type(inputs).__name__}: give split=")
    return len(found)


def classification(class_weights: Sequence[float] | None = None) -> Task:
    """Logits ``(batch, classes)``, and labels ``(batch,)`` or shares of the classes ``(batch, classes)``:
    cross-entropy, and top-1 accuracy.

    ``class_weights`` are how much a sample of each class counts in the loss of training, which is divided by the number
    of samples, whatever these weigh: so are several batches an update, and several processes, what one batch is.
    What is distilled is :func:`divergence` (Hinton et al., "Distilling the Knowledge in a Neural Network", 2015).
    """
    return Task(
        loss=F.cross_entropy if class_weights is None else _weighted(class_weights),
        evaluate=evaluate_classifier,
        metric="accuracy",
        split=pair,
        size=count_samples,
        correct=count_correct,
        distance=divergence,
    )


def _weighted(class_weights: Sequence[float]) -> Callable[..., Tensor]:
    weights = torch.tensor(class_weights, dtype=torch.float32)

    def loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        settings: dict[str, Any] = {"weight": _beside(logits, weights), "label_smoothing": label_smoothing}
        return F.cross_entropy(logits, labels, reduction="sum", **settings) / len(labels)

    return loss


def _beside(logits: Tensor, weights: Tensor) -> Tensor:
    """``weights`` where ``logits`` are, and of their type; the host does not wait for the copy."""
    return weights.to(logits.device, logits.dtype, non_blocking=True)


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Of how many samples the largest of ``logits`` (N, classes) is the label's, or the largest of its shares."""
    return (logits.argmax(1) == (labels if labels.dim() == 1 else labels.argmax(1))).sum()


def divergence(logits: Tensor, soft: Tensor, temperature: float) -> Tensor:
    """``KL(softmax(soft / T) || softmax(logits / T))`` of logits ``(batch, classes, ...)``, a mean over the batch and
    what the further dimensions count, such as pixels."""
    student, teacher = F.log_softmax(logits / temperature, 1), F.log_softmax(soft / temperature, 1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) / math.prod(logits.shape[2:])


def segmentation(
    num_classes: int,
    ignore_index: int = 255,
    aux_weight: float = 0.5,
    class_weights: Sequence[float] | None = None,
) -> Task:
    """Logits ``(batch, classes, H, W)``, alone or as ``"out"`` of a dict, and masks ``(batch, H, W)`` of class indices.

    The loss is cross-entropy over the pixels of a batch, plus ``aux_weight`` times that of ``"aux"`` where a model has
    such a head; the metric is mIoU over the classes that the masks or the model's answers have. Pixels of
    ``ignore_index`` count in neither. ``class_weights`` are how much a pixel of each class counts in the loss, which is
    divided by the number of pixels. What is distilled is :func:`divergence` of the pixels of ``"out"``.

    Raises:
        ConfigError: torchmetrics is not installed.
    """
    try:
        from torchmetrics.classification import MulticlassJaccardIndex
    except ImportError as error:
        raise ConfigError(needed("mIoU", "tasks", error)) from error
    mean_iou = MulticlassJaccardIndex(num_classes, average="macro", ignore_index=ignore_index, validate_args=False)
    weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)

    def loss(output: Any, masks: Tensor, label_smoothing: float = 0.0) -> Tensor:
        def of(logits: Tensor) -> Tensor:
            settings: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
            settings["weight"] = None if weights is None else _beside(logits, weights)
            total = F.cross_entropy(logits, masks, reduction="sum", **settings)
            return total / (masks != ignore_index).sum().clamp(min=1)  # a mean of none would be NaN

        aux = output.get("aux") if isinstance(output, Mapping) else None
        return of(pixel_logits(output)) if aux is None else of(pixel_logits(output)) + aux_weight * of(aux)

    def correct(output: Any, masks: Tensor) -> Tensor:
        counted = masks != ignore_index
        right = (pixel_logits(output).argmax(1) == masks) & counted
        return (right.sum((1, 2)) / counted.sum((1, 2)).clamp(min=1)).sum()

    def answer(output: Any, masks: Tensor) -> tuple[Tensor, Tensor]:
        return pixel_logits(output).argmax(1), masks

    return Task(
        loss=loss,
        evaluate=lambda model, data: evaluate_with(mean_iou, model, data, pair, loss, "mIoU", answer),
        metric="mIoU",
        split=pair,
        size=count_samples,
        correct=correct,
        distance=lambda output, soft, temperature: divergence(pixel_logits(output), pixel_logits(soft), temperature),
    )


def pixel_logits(output: Any) -> Tensor:
    """A segmenter's answer: the output itself, or what a dict has as ``"out"``."""
    return output["out"] if isinstance(output, Mapping) else output  # type: ignore[no-any-return]


def detection() -> Task:
    """Detectors as torchvision's are: called with lists of images ``(3, H, W)`` and of targets, ``boxes`` (xyxy) and
    ``labels`` of each, they give a dict of losses in training; without targets, in eval mode, ``boxes``, ``scores`` and
    ``labels``.

    A batch is ``(images, targets)``. The loss is the sum of theirs, the metric mAP50: average precision at an overlap
    of one half, a mean over the classes of the targets; beside it is told mAP, a mean over overlaps of 0.5 to 0.95. At
    most 100 boxes of an image count, those of the highest scores, and boxes with ``iscrowd`` as COCO has it. Nothing
    can be distilled, and nothing is compiled.

    Raises:
        ConfigError: torchmetrics or pycocotools is not installed.
    """
    try:
        from torchmetrics.detection import MeanAveragePrecision

        precision = MeanAveragePrecision()
    except ImportError as error:
        raise ConfigError(needed("mAP50", "tasks", error)) from error
    precision.warn_on_many_detections = False  # it counts the 100 of an image that score highest, as COCO does

    def with_targets(batch: Any) -> tuple[Any, Any]:
        images, targets = pair(batch)
        return (images, targets), targets

    def evaluate(model: nn.Module, data: Iterable[Any]) -> Score:
        metric, device = deepcopy(precision), next(model.parameters()).device
        metric.sync_on_compute = False  # every rank sees all images
        count = 0
        with eval_mode(model), torch.no_grad():
            for images, targets in on_device(data, pair, device):
                metric.update(model(images), targets)
                count += len(images)
        if not count:
            raise DataError("there is nothing to evaluate on: the data gave no batch")
        found = metric.compute()
        if found["map_50"] < 0:
            raise DataError("mAP50 needs a box: there is none in all the images that are evaluated on")
        return Score(float(found["map_50"]), "mAP50", count, further={"mAP": float(found["map"])})

    return Task(
        loss=lambda losses, targets: sum_of(losses),
        evaluate=evaluate,
        metric="mAP50",
        split=with_targets,
        size=lambda inputs: len(inputs[0]),
        compiles=False,
    )


def sum_of(losses: Any) -> Tensor:
    """Of a detector's losses.

    Raises:
        ConfigError: it gave something else.
    """
    if not isinstance(losses, Mapping):
        raise ConfigError(f"a detector gives a dict of losses in training, this model a {type(losses).__name__}")
    return torch.stack(list(losses.values())).sum()


def custom(
    loss: Callable[..., Tensor] | None = None,
    metric: Any = None,
    split: Callable[[Any], tuple[Any, Any]] | None = None,
) -> Task:
    """A task of the user's own, from what :func:`brfx.fit` is given for it.

    Args:
        loss: as in :class:`Task`; default that of :func:`classification`.
        metric: ``metric(model, batches) -> float`` for a model in eval mode, without gradients; or an object with
            ``update(output, targets)``, ``compute()`` and ``reset()``, such as one of torchmetrics, of which a copy is
            used; more is better. ``None``: there is none, and so no validation.
        split: as in :class:`Task`; default :func:`pair`.
    """
    split = split or pair
    cost = loss or F.cross_entropy
    name = name_of(metric)

    def evaluate(model: nn.Module, data: Iterable[Any]) -> Score:
        if all(hasattr(metric, method) for method in ("update", "compute", "reset")):
            return evaluate_with(metric, model, data, split, cost, name)
        with eval_mode(model), torch.no_grad():
            value = metric(model, data)
        return Score(number(value, name), name)

    return Task(loss=cost, evaluate=evaluate, metric=name, split=split, size=count_samples)


def takes_smoothing(loss: Callable[..., Any]) -> bool:
    """Whether a loss can be given ``label_smoothing=``."""
    try:
        parameters = inspect.signature(loss).parameters.values()
    except (TypeError, ValueError):  # of something built in
        return False
    return any(parameter.name == "label_smoothing" for parameter in parameters)


def evaluate_with(
    metric: Any,
    model: nn.Module,
    data: Iterable[Any],
    split: Callable[[Any], tuple[Any, Any]],
    loss: Callable[..., Tensor] | None,
    name: str,
    answer: Callable[[Any, Any], tuple[Any, Any]] = lambda output, targets: (output, targets),
) -> Score:
    """What a metric of torchmetrics' kind computes of ``model``, and the mean ``loss`` unless there is none.

    Every rank sees all of ``data``, so that the ranks' states are not added up.

    Args:
        answer: ``(output, targets)`` to what the metric is updated with.
    """
    metric, device = deepcopy(metric), next(model.parameters()).device
    if hasattr(metric, "sync_on_compute"):
        metric.sync_on_compute = False
    if hasattr(metric, "to"):
        metric = metric.to(device)
    metric.reset()
    total, count = torch.zeros((), dtype=torch.float64, device=float64_device(device)), 0
    with eval_mode(model), torch.no_grad():
        for inputs, targets in on_device(data, split, device):
            output, size = call(model, inputs), count_samples(inputs)
            metric.update(*answer(output, targets))
            if loss is not None:
                total, count = total + loss(output, targets).to(total.device) * size, count + size
            else:
                count += size
        if not count:
            raise DataError("there is nothing to evaluate on: the data gave no batch")
        value = metric.compute()
    return Score(number(value, name), name, count, None if loss is None else float(total) / count)


def on_device(
    data: Iterable[Any], split: Callable[[Any], tuple[Any, Any]], device: torch.device
) -> Iterator[tuple[Any, Any]]:
    for batch in data:
        inputs, targets = split(batch)
        yield to_device(inputs, device), to_device(targets, device)


def number(value: Any, name: str) -> float:
    """What a metric gave, as a number.

    Raises:
        ConfigError: it is none.
        TrainingError: it is NaN or infinity, which no epoch can be compared by.
    """
    try:
        found = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{name} gave a {type(value).__name__}: a metric takes one number, more is better") from error
    if not math.isfinite(found):
        raise TrainingError(f"{name} is {found}, by which no epoch can be compared: see that the data has its classes")
    return found


def name_of(metric: Any) -> str:
    """What a metric is called in logs and files: its function's or its class's name."""
    name = getattr(metric, "__name__", "metric" if metric is None else type(metric).__name__)
    return name if name.isidentifier() and name not in ("loss", "partial") else "metric"
