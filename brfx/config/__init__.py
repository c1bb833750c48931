"""Settings: what to quantize and how finely, how to train, and a whole run. Nothing here imports torch."""

from brfx.config.job import (
    BR_FORMS,
    DATA_DIR,
    DEAD_FILTERS,
    STARTS,
    TASKS,
    TEACHER_SHARE,
    JobConfig,
    code_file,
    read_job_config,
    read_job_json,
)
from brfx.config.qat import PLACEMENTS, WEIGHT_GRIDS, QATConfig, matches
from brfx.config.train import COMPILE, FLOAT_TRAINING, KEEP, ON_NONFINITE, OPTIMIZERS, PRECISION, TrainConfig

__all__ = [
    "BR_FORMS",
    "COMPILE",
    "DATA_DIR",
    "DEAD_FILTERS",
    "FLOAT_TRAINING",
    "KEEP",
    "ON_NONFINITE",
    "OPTIMIZERS",
    "PLACEMENTS",
    "PRECISION",
    "STARTS",
    "TASKS",
    "TEACHER_SHARE",
    "WEIGHT_GRIDS",
    "JobConfig",
    "QATConfig",
    "TrainConfig",
    "code_file",
    "matches",
    "read_job_config",
    "read_job_json",
]
