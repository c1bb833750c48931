"""Models of other libraries, and the evaluation transforms that come with them: ``timm/NAME`` and ``hf/FOLDER``.

Neither library is needed but for such a name, nothing is downloaded, and no code of a folder is run.
"""

from __future__ import annotations

import difflib
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brfx.errors import CheckpointError, ConfigError, first_line
from brfx.extras import needed
from brfx.modes import eval_mode

log = logging.getLogger(__name__)

TIMM, HF = "timm/", "hf/"

#: Mean difference, in levels of 255, by which the pixels of a slow wave may differ: what a shift by one pixel makes.
_ROUNDING = 2.0


def is_hub_model(name: str) -> bool:
    return name.startswith((TIMM, HF))


def require_hub_model(name: str) -> None:
    """Raise ConfigError if :func:`build_hub_model` has no model of this name, or its library is not installed."""
    if name.startswith(HF):
        _hf_config(name)
        return
    known, wanted = _timm().list_models(), name.removeprefix(TIMM)
    if wanted not in known:
        nearest = difflib.get_close_matches(wanted, known, n=4) or ["resnet18"]
        raise ConfigError(f"timm has no model {wanted!r}: did you mean {', '.join(TIMM + near for near in nearest)}?")


def timm_names() -> list[str]:
    """Every ``timm/NAME``."""
    return [TIMM + name for name in _timm().list_models()]


def build_hub_model(name: str, num_classes: int | None = None) -> nn.Module:
    """A model with random weights.

    Args:
        name: ``timm/NAME``, or ``hf/FOLDER``: an image classifier or a segmenter that ``save_pretrained`` of Hugging
            Face's left. Its logits are the output; a segmenter's are resized to the image.
        num_classes: default the model's own.

    Raises:
        ConfigError: no such model, no such folder, or another kind of model in it.
    """
    if name.startswith(TIMM):
        require_hub_model(name)
        classes = {} if num_classes is None else {"num_classes": num_classes}
        return _timm().create_model(name.removeprefix(TIMM), pretrained=False, **classes)  # type: ignore[no-any-return]
    config = _hf_config(name)
    if num_classes is not None:
        config.num_labels = num_classes
    wrapper = HubSegmenter if hub_task(name) == "segmentation" else HubClassifier
    model = wrapper(_hf_class(name).from_config(config, trust_remote_code=False))
    size = getattr(config, "image_size", None) or 64
    height, width = (size, size) if isinstance(size, int) else size
    with eval_mode(model), torch.no_grad():  # its first call attaches hooks, which a rewritten model must have too
        model(torch.zeros(1, getattr(config, "num_channels", 3), height, width))
    return model


def hub_state_dict(name: str) -> dict[str, Tensor]:
    """The weights in a Hugging Face folder under the keys of :func:`build_hub_model`, read by its own library, which
    gives what older files have today's names.

    Raises:
        CheckpointError: they cannot be read, or some are missing.
    """
    folder = _folder(name)
    try:
        model, found = _hf_class(name).from_pretrained(
            folder, output_loading_info=True, dtype="float32", trust_remote_code=False
        )
    except Exception as error:
        raise CheckpointError(f"{folder}: transformers cannot read its weights ({first_line(error)})") from error
    missing = sorted(found["missing_keys"])
    if missing:
        raise CheckpointError(f"{folder}: its weights lack {', '.join(missing[:3])}: fine-tune it first")
    return {f"model.{key}": value for key, value in model.state_dict().items()}


class HubClassifier(nn.Module):
    """Logits ``(batch, classes)`` of a Hugging Face classifier."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, return_dict=False)[0]  # type: ignore[no-any-return]


class HubSegmenter(HubClassifier):
    """Logits ``(batch, classes, H, W)`` of a Hugging Face segmenter, which gives them for coarser pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(super().forward(x), size=x.shape[-2:], mode="bilinear", align_corners=False)


def hub_task(name: str) -> str:
    """``"classification"`` or ``"segmentation"``."""
    if name.startswith(TIMM):
        return "classification"
    architectures = _hf_config(name).architectures or []
    for ending, task in (("ForImageClassification", "classification"), ("ForSemanticSegmentation", "segmentation")):
        if any(architecture.endswith(ending) for architecture in architectures):
            return task
    what = ", ".join(architectures) or "no architecture"
    raise ConfigError(f"{name}: its config.json has {what}: takes an image classifier or a segmenter")


def hub_weights(name: str) -> Path | None:
    """The file of weights in a Hugging Face folder, or the index of several, if there is one."""
    if not name.startswith(HF):
        return None
    whole = ("model.safetensors", "pytorch_model.bin")
    found = (_folder(name) / file for file in (*whole, *(f"{file}.index.json" for file in whole)))
    return next((path for path in found if path.is_file()), None)


def hub_transform(name: str) -> dict[str, Any] | None:
    """The evaluation transform that a model comes with, as fields of :class:`brfx.data.Preprocessing`; ``None``: there
    is none in its folder.

    Raises:
        ConfigError: the model sees pictures that are no squares.
    """
    if name.startswith(TIMM):
        return _timm_transform(name)
    folder = _folder(name)
    if not any((folder / file).is_file() for file in ("preprocessor_config.json", "processor_config.json")):
        return None
    import transformers

    reader: Any = transformers.AutoImageProcessor
    try:
        processor = reader.from_pretrained(folder, trust_remote_code=False)
        transform = _hf_transform(processor)
    except Exception as error:  # of another library, for files of any kind
        raise ConfigError(f"{name}: its image processor cannot be read ({first_line(error)})") from error
    _compare(name, processor, transform)
    return transform


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise ConfigError(needed("timm/NAME", "timm", error)) from error
    return timm


def _timm_transform(name: str) -> dict[str, Any]:
    require_hub_model(name)
    timm = _timm()
    config = timm.get_pretrained_cfg(name.removeprefix(TIMM))
    found = timm.data.resolve_data_config({}, pretrained_cfg=config.to_dict() if config is not None else {})
    height, width = found["input_size"][1:]
    if height != width or found["crop_mode"] not in ("center", "squash"):
        raise ConfigError(f"{name}: sees pictures of {height}x{width}, crop {found['crop_mode']}: takes squares")
    return {
        "image_size": height,
        "resize": math.floor(height / found["crop_pct"]),
        "stretch": found["crop_mode"] == "squash",
        "interpolation": found["interpolation"],
        "mean": tuple(found["mean"]),
        "std": tuple(found["std"]),
    }


def _folder(name: str) -> Path:
    return Path(name.removeprefix(HF)).expanduser()


def _hf_config(name: str) -> Any:
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise ConfigError(needed("hf/FOLDER", "hf", error)) from error
    folder = _folder(name)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{name}: there is no {folder}/config.json: give the folder that save_pretrained wrote")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise ConfigError(f"{folder}/config.json: transformers cannot read it ({first_line(error)})") from error


def _hf_class(name: str) -> Any:
    import transformers
    from transformers.utils import logging as own

    speak: Any = own.disable_progress_bar
    speak()
    segments = hub_task(name) == "segmentation"
    return transformers.AutoModelForSemanticSegmentation if segments else transformers.AutoModelForImageClassification


def _hf_transform(processor: Any) -> dict[str, Any]:
    """What an image processor's settings say."""
    size, crop = dict(processor.size or {}), dict(getattr(processor, "crop_size", None) or {})
    stretch = size.get("shortest_edge") is None
    resize = size["height"] if stretch else size["shortest_edge"]
    image_size = resize
    if getattr(processor, "do_center_crop", False):
        image_size = crop["height"]
    elif getattr(processor, "crop_pct", None) is not None:  # ConvNeXt's: a crop below 384 pixels, else the whole
        stretch = resize >= 384
    if getattr(processor, "crop_pct", None) is not None and not stretch:
        resize = int(image_size / processor.crop_pct)
    normalizes = getattr(processor, "do_normalize", False)
    mean, std = (processor.image_mean, processor.image_std) if normalizes else ((0.0,) * 3, (1.0,) * 3)
    if getattr(processor, "include_top", False):  # EfficientNet's divides once more
        std = [value * value for value in std]
    names = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
    return {
        "image_size": image_size,
        "resize": resize,
        "stretch": stretch,
        "interpolation": names[int(processor.resample)],
        "mean": tuple(mean),
        "std": tuple(std),
        "channel_order": "bgr" if getattr(processor, "do_flip_channel_order", False) else "rgb",
        "divisor": _round_inverse(processor.rescale_factor) if processor.do_rescale else 1.0,
    }


def _round_inverse(factor: float) -> float:
    """``1 / factor``, a whole number where it is one but for rounding."""
    inverse = 1 / factor
    return float(round(inverse)) if math.isclose(inverse, round(inverse), rel_tol=1e-6) else inverse


def _compare(name: str, processor: Any, transform: dict[str, Any]) -> None:
    """Warn where a picture comes out otherwise than of the processor, whose class may do what no setting says."""
    from PIL import Image

    from brfx.data import Preprocessing
    from brfx.data.image_files import pixels

    wave = np.sin(np.arange(300)[:, None, None] / 60 + np.arange(420)[None, :, None] / 80 + np.arange(3))
    picture = Image.fromarray((127.5 * (wave + 1)).astype(np.uint8))
    ours = Preprocessing(**transform)
    mine = ours.normalize(pixels(ours.square(picture))[None])
    theirs = processor(picture, return_tensors="pt")["pixel_values"]
    unit = ours.divisor / 255 * min(ours.std) if theirs.shape == mine.shape else 0.0
    if theirs.shape != mine.shape or float((theirs - mine).abs().mean()) * 255 * unit > _ROUNDING:
        log.warning(
            "%s: its %s does more than its settings say; images are read as %s: see --resize, --mean ...",
            name,
            type(processor).__name__,
            ours,
        )
