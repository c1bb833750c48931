"""The rewritten graph as ONNX, written by torch's exporter and checked in ONNX Runtime."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from brfx.calibration import require_calibrated
from brfx.card import card_of
from brfx.errors import ExportError
from brfx.nn import QuantizedLayer


@dataclass(frozen=True)
class OnnxReport:
    """What was written, and how ONNX Runtime's outputs compare to the model's on the example.

    ``max_difference`` is the largest absolute difference of an output, ``same_top1`` the share of samples with the
    same best class; both are ``None`` where ONNX Runtime is not installed.
    """

    path: Path
    bytes: int
    max_difference: float | None = None
    same_top1: float | None = None


def export_onnx(qmodel: nn.Module, path: str | Path, example_inputs: Tensor | tuple[Tensor, ...]) -> OnnxReport:
    """Write the quantized model as ONNX with a free batch size.

    Weights are stored as the levels the network computes with, and each activation quantizer is its arithmetic
    (divide, clip, round, multiply): the file is exact, and runs in floating point.

    Args:
        qmodel: a calibrated model; a copy in eval mode is exported.
        path: of the file to write.
        example_inputs: the model's inputs, a batch of two or more.

    Raises:
        NotCalibratedError: a quantizer has no step.
        ExportError: the extra ``onnx`` is not installed, or the exporter failed.
    """
    require_calibrated(qmodel)
    path = Path(path)
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    try:
        import onnx
        import onnxscript  # noqa: F401  (the exporter needs it)
    except ImportError as error:
        raise ExportError("ONNX export needs the extra: pip install 'brfx[onnx]'") from error
    frozen = _with_levels_as_weights(qmodel)
    try:
        with _quiet(), torch.no_grad():
            batch = torch.export.Dim("batch")
            shapes = tuple({0: batch} for _ in inputs)
            program = torch.onnx.export(
                frozen, inputs, dynamo=True, dynamic_shapes=shapes, input_names=["input"], output_names=["output"]
            )
        assert program is not None
        proto = program.model_proto
        card = card_of(qmodel)
        for key, value in (
            ("brfx_config", asdict(card.config)),
            ("preprocessing", card.preprocessing and asdict(card.preprocessing)),
            ("classes", card.classes),
        ):
            proto.metadata_props.add(key=key, value=json.dumps(value))
        onnx.checker.check_model(proto)
        partial = path.with_name(path.name + ".partial")
        onnx.save(proto, partial)
        partial.replace(path)
    except Exception as error:
        raise ExportError(
            f"torch's ONNX exporter failed: {(str(error).splitlines() or [repr(error)])[0][:200]}"
        ) from error
    return _compare(path, inputs, _eval_output(qmodel, inputs))


@torch.no_grad()
def _with_levels_as_weights(qmodel: nn.Module) -> nn.Module:
    """A copy in eval mode whose weights are the levels that ``qmodel`` computes with, and are quantized no more."""
    frozen = copy.deepcopy(qmodel).eval()
    for module in frozen.modules():
        if isinstance(module, QuantizedLayer) and module.weight_quantizer is not None:
            module.weight.copy_(module.quantized_weight())
            module.weight_quantizer.mode = "pass"
    return frozen


@torch.no_grad()
def _eval_output(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    training = model.training
    try:
        return model.eval()(*inputs)  # type: ignore[no-any-return]
    finally:
        model.train(training)


def _compare(path: Path, inputs: tuple[Tensor, ...], expected: Tensor) -> OnnxReport:
    size = path.stat().st_size
    try:
        import onnxruntime
    except ImportError:
        return OnnxReport(path, size)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {node.name: value.cpu().numpy() for node, value in zip(session.get_inputs(), inputs, strict=True)}
    found = torch.from_numpy(session.run(None, feeds)[0])
    expected = expected.cpu()
    same = (found.argmax(1) == expected.argmax(1)).double().mean()
    return OnnxReport(path, size, float((found - expected).abs().max()), float(same))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints its progress; keep it off the user's screen."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
