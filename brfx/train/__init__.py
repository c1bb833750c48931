"""The generic trainer. It sees a module, data, settings and a penalty, and imports no quantizer."""

from brfx.config import TrainConfig
from brfx.train.batch_norm import reestimate_batch_norm
from brfx.train.evaluate import Evaluation, Score, evaluate
from brfx.train.loop import Penalty, fit, seed_everything
from brfx.train.optim import parameter_groups
from brfx.train.report import Callback, EpochMetrics, FitResult, Means, Phase, Progress
from brfx.train.tasks import Task, classification, detection, segmentation
from brfx.train.tensorboard import TensorBoard

__all__ = [
    "Callback",
    "EpochMetrics",
    "Evaluation",
    "FitResult",
    "Means",
    "Penalty",
    "Phase",
    "Progress",
    "Score",
    "Task",
    "TensorBoard",
    "TrainConfig",
    "classification",
    "detection",
    "evaluate",
    "fit",
    "parameter_groups",
    "reestimate_batch_norm",
    "seed_everything",
    "segmentation",
]
