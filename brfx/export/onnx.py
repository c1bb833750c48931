"""The integer form as ONNX: layers on integer kernels, weights packed, all else written by torch's exporter."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from brfx.card import card_of
from brfx.errors import ExportError, first_line
from brfx.export.destination import as_inputs, destination, replacing
from brfx.export.integer import IntegerModel, integer_model
from brfx.export.operators import translations
from brfx.export.parity import SiteParity, compare_codes
from brfx.export.proto import share_codes, store_quantized, store_weights, strip
from brfx.flow import operation
from brfx.observing import graphs

#: What a profile is for: the opset it needs, and the narrowest type that weights are stored in.
PROFILES = {"compact": (25, 2), "fast": (21, 8), "portable": (21, 4)}


@dataclass(frozen=True)
class OnnxReport:
    """What was written, and how it compares.

    Attributes:
        path, bytes: the file.
        integer_layers: convolutions and linears on integer kernels.
        float_layers: what stays in floating point, and why.
        largest_sum: the largest magnitude an accumulator can reach; 32 bits hold less than ``2**31``.
        sites: codes of the trained model against the integer form's, layer by layer, on the example.
        reference_difference: the largest absolute difference between ONNX Runtime's outputs and the reference
            interpreter's; 0.0 means bit for bit. ``None`` where ONNX Runtime is not installed.
        max_difference: the same between ONNX Runtime and the trained model.
        same_top1: the share of samples with the same best class as the trained model's.
    """

    path: Path
    bytes: int
    integer_layers: int = 0
    float_layers: dict[str, str] | None = None
    largest_sum: int = 0
    sites: tuple[SiteParity, ...] = ()
    reference_difference: float | None = None
    max_difference: float | None = None
    same_top1: float | None = None

    @property
    def flipped(self) -> tuple[int, int]:
        """How many codes differ between the trained model and its integer form, of how many."""
        return sum(site.flipped for site in self.sites), sum(site.codes for site in self.sites)


def export_onnx(
    qmodel: nn.Module, path: str | Path, example_inputs: Tensor | tuple[Tensor, ...], profile: str = "compact"
) -> OnnxReport:
    """Write the quantized model as ONNX with a free batch size, and compare the file with the model.

    Args:
        qmodel: a calibrated model; its integer form (:mod:`brfx.export.integer`) in eval mode is exported.
        path: of the file to write.
        example_inputs: the model's inputs, a batch of two or more.
        profile: ``"compact"`` packs weights into INT2 and INT4 (opset 25), ``"portable"`` into INT4 (opset 21),
            ``"fast"`` stores them as the INT8 that the kernels read (opset 21).

    Raises:
        NotCalibratedError: a quantizer has no step.
        ExportError: the extra ``onnx`` is not installed, the exporter failed, the file cannot be written, or a sum
            could overflow 32 bits.
    """
    if profile not in PROFILES:
        raise ExportError(f"profile={profile!r}: takes {', '.join(PROFILES)}")
    path, inputs = destination(path), as_inputs(example_inputs)
    try:
        import onnx
        import onnxscript  # noqa: F401  (the exporter needs it)
    except ImportError as error:
        raise ExportError("ONNX export needs the extra: pip install 'brfx[onnx]'") from error
    integer = integer_model(qmodel)
    expected = _reference(integer, inputs)
    opset, narrowest = PROFILES[profile]
    try:
        with quiet(), torch.no_grad():
            batch = torch.export.Dim("batch")
            program = torch.onnx.export(
                integer.model,
                inputs,
                dynamo=True,
                dynamic_shapes=tuple({0: batch} for _ in inputs),
                input_names=["input"],
                output_names=["output"],
                opset_version=opset,
                custom_translation_table=translations(),
            )
        assert program is not None
        proto = program.model_proto
    except Exception as error:
        raise ExportError(f"torch's ONNX exporter failed: {_told(error, integer.model)}") from error
    share_codes(proto)
    store_weights(proto, integer, narrowest)
    store_quantized(proto, narrowest)
    strip(proto)
    _describe(proto, qmodel)
    with replacing(path) as partial:
        onnx.checker.check_model(proto, full_check=True)
        onnx.save(proto, partial)
    return _compare(path, inputs, qmodel, integer, expected)


def _told(error: BaseException, model: nn.Module) -> str:
    """What the exporter could not do: where it has no form of an operator, that operator and the line that calls it."""
    while error.__cause__ is not None:
        error = error.__cause__
    unknown = re.search(r"No ONNX function found for <OpOverload\(op='(\w+\.(\w+))'", str(error))
    if unknown is None:
        return first_line(error)
    calls = [
        node for gm in graphs(model).values() for node in gm.graph.nodes if unknown[2] in str(operation(gm, node)[0])
    ]
    lines = list(dict.fromkeys(line for node in calls if (line := node.meta.get("source_line"))))
    where = f", called in {', '.join(lines[:3])}" if lines else ""
    return f"ONNX has no operator for {unknown[1]}{where}; replace it in the model, or export a part of the model"


def _describe(proto: Any, qmodel: nn.Module) -> None:
    card = card_of(qmodel)
    for key, value in (
        ("brfx_version", version("brfx")),
        ("brfx_config", asdict(card.config)),
        ("preprocessing", card.preprocessing and asdict(card.preprocessing)),
        ("classes", card.classes),
    ):
        proto.metadata_props.add(key=key, value=json.dumps(value))


@torch.no_grad()
def _reference(integer: IntegerModel, inputs: tuple[Tensor, ...]) -> Any:
    return integer.model(*inputs)


@torch.no_grad()
def _compare(
    path: Path, inputs: tuple[Tensor, ...], qmodel: nn.Module, integer: IntegerModel, reference: Any
) -> OnnxReport:
    device = next(qmodel.parameters()).device
    sites = tuple(compare_codes(qmodel, integer, *inputs)) if device.type == "cpu" else ()
    size, layers = path.stat().st_size, len(integer.layers)
    report = OnnxReport(path, size, layers, integer.float_layers, integer.largest_sum, sites)
    try:
        found = tensors(onnx_runner(path)(*inputs))
    except ImportError:
        return report
    training = qmodel.training
    try:
        trained = [value.cpu() for value in tensors(qmodel.eval()(*(value.to(device) for value in inputs)))]
    finally:
        qmodel.train(training)
    same = None
    if found[0].dim() == 2:
        same = float((found[0].argmax(1) == trained[0].argmax(1)).double().mean())
    return dataclasses.replace(
        report,
        reference_difference=distance(found, tensors(reference)),
        max_difference=distance(found, trained),
        same_top1=same,
    )


def onnx_session(path: Path, threads: int = 0) -> Any:
    """An ONNX Runtime session on the CPU, without threads that spin while they wait.

    Raises:
        ImportError: ONNX Runtime is not installed.
        ExportError: it does not load the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"{path}: ONNX Runtime does not load this file ({first_line(error)})") from error


def onnx_runner(path: Path) -> Callable[..., list[Tensor]]:
    """The file as a function of tensors; ExportError where it does not run on those it is given."""
    session = onnx_session(path)
    names = [node.name for node in session.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        feeds = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        try:
            return [torch.from_numpy(value) for value in session.run(None, feeds)]
        except Exception as error:
            shapes = ", ".join(str(tuple(value.shape)) for value in inputs)
            raise ExportError(f"{path}: does not run on {shapes} ({first_line(error)})") from error

    return run


def tensors(output: Any) -> list[Tensor]:
    """The tensors of an output, in the order in which an exported file gives them."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest absolute difference of any element."""
    return max(
        (float((a.double() - b.cpu().double()).abs().max()) for a, b in zip(found, expected, strict=True) if a.numel()),
        default=0.0,
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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
