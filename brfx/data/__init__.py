"""Image data sets: found by name or folder, decoded once, augmented in batches."""

from brfx.data.datasets import Dataset, Split, load_dataset
from brfx.data.detection import DetectionLoader, DetectionSplit, load_detection
from brfx.data.image_files import ImageFiles
from brfx.data.loader import BatchLoader
from brfx.data.preprocessing import DEFAULTS, Preprocessing, with_overrides
from brfx.data.segmentation import load_segmentation

__all__ = [
    "DEFAULTS",
    "BatchLoader",
    "Dataset",
    "DetectionLoader",
    "DetectionSplit",
    "ImageFiles",
    "Preprocessing",
    "Split",
    "load_dataset",
    "load_detection",
    "load_segmentation",
    "with_overrides",
]
