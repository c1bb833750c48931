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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from brfx.analysis.observe import graphs
from brfx.errors import ExportError, first_line
from brfx.export.destination import as_inputs, destination, replacing
from brfx.export.integer import IntegerModel, integer_model
from brfx.export.operators import translations
from brfx.export.parity import SiteParity, compare_codes
from brfx.export.proto import own_zero_points, share_codes, store_quantized, store_weights, strip
from brfx.export.qdq import fold_constants, qdq_translations, store_qdq_weights
from brfx.extras import needed
from brfx.graph.dataflow import operation
from brfx.metadata import metadata_entries
from brfx.modes import eval_mode
from brfx.nn import QuantizedLayer

log = logging.getLogger(__name__)

#: What a profile is for: the opset it needs, and the narrowest type that weights are stored in.
PROFILES = {"compact": (25, 2), "fast": (21, 8), "portable": (21, 4), "qdq": (21, 8), "qdq-int4": (21, 4)}

#: Those with integer operators; the others are in :mod:`brfx.export.qdq`.
_INTEGER = ("compact", "fast", "portable")

#: The entry of a file's metadata with the layers that kernels without VNNI saturate in.
_SATURATING = "brfx_saturating"

#: Up to this share of the outputs' range a difference is that of the order in which floats are summed.
NEGLIGIBLE = 1e-4


@dataclass(frozen=True)
class OnnxReport:
    """The written file, and its comparison with the model.

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
        output_range: the largest absolute value of the trained model's outputs.
        rounding_difference: the largest absolute difference between the reference interpreter and the trained model.
        unsnapped: how many biases are not what the integer form has, see :func:`brfx.snap_biases`.
        saturating: integer layers whose sum of two products can leave 16 bits, see :func:`differences`.
        integer_operators: whether the file has them; profile ``"qdq"`` has ordinary ones between quantizers.
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
    output_range: float = 0.0
    rounding_difference: float = 0.0
    unsnapped: int = 0
    saturating: tuple[str, ...] = ()
    integer_operators: bool = True

    @property
    def flipped(self) -> tuple[int, int]:
        """Differing codes between the trained model and its integer form, and all codes."""
        return sum(site.flipped for site in self.sites), sum(site.codes for site in self.sites)

    @property
    def wrong(self) -> bool:
        """Whether ONNX Runtime computed something else than the reference, by more than the order of summing floats; by
        more than a few codes that are another one, where sums are in floating point."""
        limit = NEGLIGIBLE if self.integer_operators else 0.1
        return (self.reference_difference or 0.0) > limit * self.output_range


def export_onnx(
    qmodel: nn.Module, path: str | Path, example_inputs: Tensor | tuple[Tensor, ...], profile: str = "compact"
) -> OnnxReport:
    """Write the quantized model as ONNX with a free batch size, and compare the file with the model.

    Args:
        qmodel: a calibrated model; its integer form (:mod:`brfx.export.integer`) in eval mode is exported.
        path: of the file to write.
        example_inputs: the model's inputs, a batch of two or more.
        profile: ``"compact"`` packs weights into INT2 and INT4 (opset 25), ``"portable"`` into INT4 (opset 21),
            ``"fast"`` stores them as the INT8 that the kernels read (opset 21). ``"qdq"`` and ``"qdq-int4"`` have
            ordinary operators between quantizers instead of integer ones (:mod:`brfx.export.qdq`, opset 21).

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
        raise ExportError(needed("ONNX export", "onnx", error)) from error
    _require_float32(qmodel)
    integer = integer_model(qmodel)
    trained = _trained(qmodel, inputs)
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
                custom_translation_table=translations()
                if profile in _INTEGER
                else qdq_translations(integer_bias=narrowest == 4),
            )
        assert program is not None
        proto = program.model_proto
    except Exception as error:
        raise ExportError(f"torch's ONNX exporter failed: {_told(error, integer.model)}") from error
    _store(proto, integer, profile, narrowest)
    strip(proto)
    saturating = tuple(name for name, layer in integer.layers.items() if layer.saturates)
    if saturating:
        own_zero_points(proto)
    _describe(proto, qmodel, saturating)
    with replacing(path) as partial:
        onnx.checker.check_model(proto, full_check=True)
        onnx.save(proto, partial)
    report = _compare(path, inputs, qmodel, integer, trained, expected)
    report = dataclasses.replace(report, integer_operators=profile in _INTEGER)
    for line in differences(report):
        log.warning("%s: %s", path, line)
    return report


def _require_float32(qmodel: nn.Module) -> None:
    for name, parameter in qmodel.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise ExportError(
                f"{name} is in {kind}, and an ONNX file is written of a model in float32: give "
                "copy.deepcopy(qmodel).float(), and example_inputs in float32"
            )


def _store(proto: Any, integer: IntegerModel, profile: str, narrowest: int) -> None:
    """Give the weights of an exported graph the types of its profile."""
    if profile not in _INTEGER:
        fold_constants(proto)
        store_qdq_weights(proto, integer, narrowest)
    share_codes(proto)
    if profile in _INTEGER:
        store_weights(proto, integer, narrowest)
        store_quantized(proto, narrowest)


def _told(error: BaseException, model: nn.Module) -> str:
    """The exporter's failure in a line: of an operator that ONNX lacks, its name and the line that calls it."""
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


def _describe(proto: Any, qmodel: nn.Module, saturating: tuple[str, ...]) -> None:
    entries = metadata_entries(qmodel) | ({_SATURATING: saturating} if saturating else {})
    for key, value in entries.items():
        proto.metadata_props.add(key=key, value=json.dumps(value))


@torch.no_grad()
def _trained(qmodel: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The trained model's outputs in eval mode; ExportError if it does not run, or a layer's input has no batch."""
    device = next(qmodel.parameters()).device
    unbatched: dict[str, tuple[int, ...]] = {}

    def look(name: str, dims: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0].dim() < dims:
                unbatched.setdefault(name, tuple(args[0].shape))

        return hook

    handles = [
        module.register_forward_pre_hook(look(name, 2 if isinstance(module, nn.Linear) else module.weight.dim()))
        for name, module in qmodel.named_modules()
        if isinstance(module, QuantizedLayer)
    ]
    try:
        with eval_mode(qmodel):
            output = tensors(qmodel(*(value.to(device) for value in inputs)))
    except Exception as error:
        raise ExportError(f"the model does not run on example_inputs ({first_line(error)})") from error
    finally:
        for handle in handles:
            handle.remove()
    for name, shape in unbatched.items():
        raise ExportError(
            f"{name}: its input of shape {shape} has no batch dimension, which a file needs: give example_inputs a "
            "batch of two or more, as x[None].repeat(2, ...) does"
        )
    return [value.cpu() for value in output]


@torch.no_grad()
def _reference(integer: IntegerModel, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    try:
        return tensors(integer.model(*inputs))
    except Exception as error:
        raise ExportError(f"the integer form of this model does not run ({first_line(error)})") from error


@torch.no_grad()
def _compare(
    path: Path,
    inputs: tuple[Tensor, ...],
    qmodel: nn.Module,
    integer: IntegerModel,
    trained: list[Tensor],
    reference: list[Tensor],
) -> OnnxReport:
    device = next(qmodel.parameters()).device
    report = OnnxReport(
        path,
        path.stat().st_size,
        len(integer.layers),
        integer.float_layers,
        integer.largest_sum,
        tuple(compare_codes(qmodel, integer, *inputs)) if device.type == "cpu" else (),
        output_range=max((float(value.abs().max()) for value in trained if value.numel()), default=0.0),
        rounding_difference=distance(reference, trained),
        unsnapped=sum(
            not torch.equal(qmodel.get_parameter(name).cpu(), value.to(qmodel.get_parameter(name).dtype))
            for name, value in integer.biases.items()
        ),
        saturating=tuple(name for name, layer in integer.layers.items() if layer.saturates),
    )
    try:
        found = tensors(onnx_runner(path)(*inputs))
    except ImportError:
        return report
    same = None
    if found[0].dim() == 2:
        same = float((found[0].argmax(1) == trained[0].argmax(1)).double().mean())
    return dataclasses.replace(
        report,
        reference_difference=distance(found, reference),
        max_difference=distance(found, trained),
        same_top1=same,
    )


def differences(report: OnnxReport) -> list[str]:
    """Warnings about a file, a line each: it computes something else than the model, or may on another machine."""
    lines = []
    if report.rounding_difference > NEGLIGIBLE * report.output_range:
        size = report.rounding_difference
        cure = "; look at `sites` of the report for where it arises"
        if report.unsnapped:
            cure = f": {report.unsnapped} biases are not integers yet; call brfx.snap_biases(qmodel), then export again"
        share = f"{size:.2g}, {size / report.output_range:.1%} of their range"
        lines.append(f"outputs differ from the trained model's by up to {share}{cure}")
    if report.wrong and report.reference_difference is not None:
        lines.append(
            f"ONNX Runtime on this machine computes something else than the integers in the file: outputs differ by up "
            f"to {report.reference_difference:.2g}, {report.reference_difference / report.output_range:.1%} of their "
            "range; " + _why(report)
        )
    if report.saturating:
        lines.append(
            f"{len(report.saturating)} layers of 8-bit weights and inputs need the session option "
            'add_session_config_entry("session.x64quantprecision", "1") on x86 CPUs without VNNI, whose kernels '
            f"saturate otherwise (brfx sets it); fewer weight bits do not, the first is {report.saturating[0]}"
        )
    return lines


def _why(report: OnnxReport) -> str:
    if report.float_layers:
        return "a layer in floating point is rounded differently there, and a quantizer behind it tells another code"
    return "compare on the machine that is to run it: brfx verify model.pt model.onnx"


def onnx_session(path: Path, threads: int = 0) -> Any:
    """An ONNX Runtime session on the CPU, exact on every CPU, and without threads that spin while they wait.

    Raises:
        ImportError: ONNX Runtime is not installed.
        ExportError: it does not load the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if _saturates_here(path):
        options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        why = first_line(error)
        if "under development" in str(error):  # what it says of an opset that is newer than itself
            why = f"{onnxruntime.__version__} is older than its opset; a newer one, or the profile portable, runs"
        raise ExportError(f"{path}: ONNX Runtime does not load this file ({why})") from error


def _saturates_here(path: Path) -> bool:
    """Whether a file of brfx's has layers that this CPU's kernels saturate in, unless told not to."""
    if torch.cpu._is_vnni_supported():
        return False
    try:
        import onnx

        entries = onnx.load(path, load_external_data=False).metadata_props
    except Exception:  # the runtime says what is wrong with the file
        return False
    return any(entry.key == _SATURATING for entry in entries)


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
