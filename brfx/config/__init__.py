"""Settings: what to quantize and how finely, how to train, and a whole run. Nothing here imports torch."""

from brfx.config.images import CHANNEL_ORDERS, CROPS, INTERPOLATIONS, Augmentation
from brfx.config.job import (
    BR_FORMS,
    DATA_DIR,
    DEAD_FILTERS,
    STARTS,
    TASKS,
    TEACHER_SHARE,
    JobConfig,
    code_file,
    listed_class_weights,
    read_job_config,
    read_job_json,
)
from brfx.config.qat import PLACEMENTS, WEIGHT_GRIDS, QATConfig, matches
from brfx.config.train import COMPILE, FLOAT_TRAINING, KEEP, ON_NONFINITE, OPTIMIZERS, PRECISION, TrainConfig

__all__ = [
    "BR_FORMS",
    "CHANNEL_ORDERS",
    "COMPILE",
    "CROPS",
    "DATA_DIR",
    "DEAD_FILTERS",
    "FLOAT_TRAINING",
    "INTERPOLATIONS",
    "KEEP",
    "ON_NONFINITE",
    "OPTIMIZERS",
    "PLACEMENTS",
    "PRECISION",
    "STARTS",
    "TASKS",
    "TEACHER_SHARE",
    "WEIGHT_GRIDS",
    "Augmentation",
    "JobConfig",
    "QATConfig",
    "TrainConfig",
    "code_file",
    "listed_class_weights",
    "matches",
    "read_job_config",
    "read_job_json",
]
