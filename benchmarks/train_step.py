"""What a step of quantization-aware training costs: brfx, the published way, Brevitas and torchao against FP32.

    python benchmarks/train_step.py            # all models: benchmarks/train_step.json and docs/benchmarks.md

Every case of a model runs in one process, one step of each in turn, so that a ratio compares steps that ran next to
each other. Memory is measured in a process of its own for each case. A run writes after each model and leaves what
the files hold of other models and of machines with another instruction set.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, fx, nn
from torch.nn import functional as F

import brfx
from brfx.nn import QuantizedLayer
from brfx.train.step import LossStep, build_step, loss_step
from brfx.train.update import Update

ROOT = Path(__file__).resolve().parent.parent
BITS = 2
LAMBDA_WEIGHT, LAMBDA_ACT = 0.1, 0.01  # the command line's defaults
FORMS = ("eager", "compiled")
WARM_UP = 4  # steps before the first timed one
COMPILE_LIMIT_S = 1800.0
PROFILED = 8  # steps of each case under the profiler
QUIET = 0.1  # by so much of itself may a profile's time for products differ from another's to be compared with it
#: What a profiled step is divided into, and the operations that count as products.
SPENT = ("convolutions and products", "generated kernels", "all else")
PRODUCTS = frozenset({"aten::convolution_backward", "aten::mkldnn_convolution", "aten::addmm", "aten::mm"})


@dataclass(frozen=True)
class Setting:
    """A model and its inputs. ``check_pixels``: of the small batch on which gradients are compared in float64."""

    classes: int
    pixels: int
    batch: int
    memory_batch: int
    check_pixels: int


MODELS = {
    "resnet20": Setting(10, 32, 128, 512, 32),
    "resnet18": Setting(1000, 224, 8, 8, 64),
    "mobilenet_v2": Setting(1000, 224, 8, 8, 64),
}


# The cases. Each is built from a float model and returns what is trained and the step in one form.

Built = tuple[nn.Module, LossStep]


def float_case(model: nn.Module, images: Tensor, form: str) -> Built:
    if form == "compiled":
        return model, torch.compile(loss_step(model, None), dynamic=False)
    return model, build_step(model, None, "none")


def fit_case(model: nn.Module, images: Tensor, form: str) -> Built:
    """The float model as ``brfx.fit`` compiles it."""
    return model, build_step(model, None, "whole" if form == "compiled" else "kernels")


def brfx_case(
    model: nn.Module, images: Tensor, form: str, *, weight: float = 0.0, act: float = 0.0, placement: str = "paper"
) -> Built:
    """``form`` "reference" is the plain eager step that the other two are checked against."""
    qmodel = brfx.prepare_qat(model, brfx.QATConfig(bits=BITS, placement=placement))
    brfx.calibrate(qmodel, [images], start="mse", batch_statistics=True)
    qmodel.to(dtype=images.dtype).train()
    penalty = brfx.BinPenalty(qmodel, weight=weight, act=act).to(dtype=images.dtype) if weight or act else None
    if form == "reference":
        return qmodel, loss_step(qmodel, penalty)
    return qmodel, build_step(qmodel, penalty, "whole" if form == "compiled" else "kernels")


def own_loop_case(model: nn.Module, images: Tensor, form: str) -> Built:
    """The penalty as a loop of one's own calls it: plain, and after ``penalty.compile()``."""
    qmodel = brfx.prepare_qat(model, brfx.QATConfig(bits=BITS, placement="paper"))
    brfx.calibrate(qmodel, [images], start="mse", batch_statistics=True)
    penalty = brfx.BinPenalty(qmodel.train(), weight=LAMBDA_WEIGHT, act=LAMBDA_ACT)
    if form == "compiled":
        penalty.compile()
    return qmodel, loss_step(qmodel, penalty)


class PublishedLSQ(nn.Module):
    """LSQ as its paper's appendix prints it: autograd operations and two ``detach`` tricks."""

    own_rate = ("step",)

    def __init__(self, low: int, high: int, step: Tensor, features: int) -> None:
        super().__init__()
        self.low, self.high = low, high
        self.scale = 1 / math.sqrt(features * high)
        self.step = nn.Parameter(step)

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The quantized values and their codes."""
        scaled = self.step * self.scale
        step = scaled + (self.step - scaled).detach()
        ratio = (values / step).clamp(self.low, self.high)
        code = ratio + (ratio.round() - ratio).detach()
        return code * step, code


def published_bins(values: Tensor, codes: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """The sum over bins of ``(mean - k * step)^2 + var``, bin by bin."""
    loss = step.new_zeros(())
    for code in range(low, high + 1):
        inside = values[codes == code]
        if inside.numel():
            loss = loss + (inside.mean() - code * step).square() + inside.var(unbiased=False)
    return loss


def first_step(values: Tensor, high: int) -> Tensor:
    """``2 * mean|v| / sqrt(Qp)``."""
    return values.detach().abs().mean() * (2 / math.sqrt(high))


class PublishedLayer(nn.Module):
    """A convolution or linear with quantized weights, and the weights' bins."""

    def __init__(self, layer: nn.Conv2d | nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        low, high = -(1 << BITS - 1), (1 << BITS - 1) - 1
        self.quantizer = PublishedLSQ(low, high, first_step(layer.weight, high), layer.weight.numel())
        self.bins: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        layer, lsq = self.layer, self.quantizer
        weight, codes = lsq(layer.weight)
        self.bins = published_bins(layer.weight, codes.detach().round(), lsq.step, lsq.low, lsq.high)
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, layer.bias)
        return layer._conv_forward(x, weight, layer.bias)


class PublishedReLU(nn.Module):
    """A ReLU (with a ceiling) with a quantized output, and the output's bins. The first batch sets the step."""

    def __init__(self, ceiling: float | None) -> None:
        super().__init__()
        self.ceiling = ceiling
        self.quantizer: PublishedLSQ | None = None
        self.bins: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        values = x.relu() if self.ceiling is None else x.clamp(0, self.ceiling)
        if self.quantizer is None:
            high = (1 << BITS) - 1
            self.quantizer = PublishedLSQ(0, high, first_step(values, high), values[0].numel())
        lsq = self.quantizer
        quantized, codes = lsq(values)
        self.bins = published_bins(values, codes.detach().round(), lsq.step.detach(), lsq.low, lsq.high)
        return quantized


def published_case(model: nn.Module, images: Tensor, form: str) -> Built:
    swapped = swap(model, PublishedLayer, lambda ceiling: PublishedReLU(ceiling))
    with torch.no_grad():
        swapped(images)
    layers = [module for module in swapped.modules() if isinstance(module, PublishedLayer)]
    relus = [module for module in swapped.modules() if isinstance(module, PublishedReLU)]

    def step(images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits = swapped(images)
        task = F.cross_entropy(logits, labels)
        weight = torch.stack([module.bins for module in layers]).sum()
        act = torch.stack([module.bins for module in relus]).sum()
        numbers = {"task": task.detach(), "correct": (logits.argmax(1) == labels).sum()}
        numbers |= {"weight": weight.detach(), "act": act.detach()}
        return task + LAMBDA_WEIGHT * weight + LAMBDA_ACT * act, numbers

    return swapped, torch.compile(step) if form == "compiled" else step


def brevitas_case(model: nn.Module, images: Tensor, form: str) -> Built:
    """Layers with a learned scale for the weights, ReLUs with a learned scale that the first batch starts."""
    import brevitas.nn as qnn
    from brevitas.inject.enum import ScalingImplType
    from brevitas.quant import Int8WeightPerTensorFloat, Uint8ActPerTensorFloat, Uint8ActPerTensorFloatMaxInit

    class Weight(Int8WeightPerTensorFloat):
        bit_width = BITS
        narrow_range = False
        scaling_impl_type = ScalingImplType.PARAMETER_FROM_STATS

    class Act(Uint8ActPerTensorFloat):
        bit_width = BITS
        collect_stats_steps = 1

    class CeilingAct(Uint8ActPerTensorFloatMaxInit):
        bit_width = BITS

    def layer(old: nn.Conv2d | nn.Linear) -> nn.Module:
        bias = old.bias is not None
        if isinstance(old, nn.Linear):
            new = qnn.QuantLinear(old.in_features, old.out_features, bias=bias, weight_quant=Weight)
        else:
            sizes = {name: getattr(old, name) for name in ("kernel_size", "stride", "padding", "dilation", "groups")}
            new = qnn.QuantConv2d(old.in_channels, old.out_channels, **sizes, bias=bias, weight_quant=Weight)
        new.load_state_dict(old.state_dict(), strict=False)
        return new

    def relu(ceiling: float | None) -> nn.Module:
        if ceiling is None:
            return qnn.QuantReLU(act_quant=Act)
        return qnn.QuantReLU(act_quant=CeilingAct, max_val=ceiling)

    swapped = swap(model, layer, relu)
    return compiled_or_not(swapped, [images] * 2, form)


def torchao_case(model: nn.Module, images: Tensor, form: str) -> Built:
    """The pt2e way: export, then fake quantization where the X86 quantizer puts it, 8 bits."""
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    exported = torch.export.export(model.train(), (images,)).module()
    return compiled_or_not(prepare_qat_pt2e(exported, quantizer), [images], form)


def compiled_or_not(model: nn.Module, batches: Sequence[Tensor], form: str) -> Built:
    """``model`` after a forward pass of each of ``batches``, which starts its scales."""
    with torch.no_grad():
        for images in batches:
            model(images)
    step = loss_step(model, None)
    return model, torch.compile(step) if form == "compiled" else step


def swap(
    model: nn.Module, layer: Callable[[Any], nn.Module], relu: Callable[[float | None], nn.Module]
) -> fx.GraphModule:
    """``model`` with each convolution, linear and ReLU replaced; every call of a ReLU gets a module of its own."""
    swapped = fx.symbolic_trace(model)
    modules = dict(swapped.named_modules())
    for index, node in enumerate(swapped.graph.nodes):
        old = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(old, (nn.Conv2d, nn.Linear)):
            name, new = str(node.target), layer(old)
        elif isinstance(old, (nn.ReLU, nn.ReLU6)):
            name, new = f"relu_{index}", relu(6.0 if isinstance(old, nn.ReLU6) else None)
        elif node.op == "call_function" and node.target is F.relu:
            name, new = f"relu_{index}", relu(None)
        else:
            continue
        swapped.set_submodule(name, new)
        node.op, node.target, node.args, node.kwargs = "call_module", name, node.args[:1], {}
    swapped.recompile()
    return swapped.to(memory_format=torch.channels_last).train()


CASES: dict[str, Callable[[nn.Module, Tensor, str], Built]] = {
    "FP32": float_case,
    "FP32 in brfx.fit": fit_case,
    "brfx LSQ": brfx_case,
    "brfx LSQ + BR(W)": partial(brfx_case, weight=LAMBDA_WEIGHT),
    "brfx LSQ + BR(W+A)": partial(brfx_case, weight=LAMBDA_WEIGHT, act=LAMBDA_ACT),
    'brfx LSQ + BR(W+A), "deploy"': partial(brfx_case, weight=LAMBDA_WEIGHT, act=LAMBDA_ACT, placement="deploy"),
    "brfx LSQ + BR(W+A), a loop of one's own": own_loop_case,
    "published LSQ + BR(W+A)": published_case,
    "Brevitas, learned scales": brevitas_case,
    "torchao pt2e, W8A8": torchao_case,
}
#: ``torch.export`` drops what dynamo has compiled, so that these are built first.
EXPORTED = ("torchao pt2e, W8A8",)
NEEDS = {"Brevitas, learned scales": "brevitas", "torchao pt2e, W8A8": "torchao"}


class Runner:
    """A case in one form, with its optimizer and a batch; calling it is one step of ``fit``."""

    def __init__(
        self, model_name: str, case: str, form: str, *, batch: int, pixels: int, dtype: torch.dtype = torch.float32
    ) -> None:
        torch.manual_seed(0)
        setting = MODELS[model_name]
        model = brfx.build_model(model_name, setting.classes)
        if dtype == torch.float64:  # the check: dropout draws other masks in other forms
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        model.to(dtype=dtype, memory_format=torch.channels_last).train()
        images = torch.randn(batch, 3, pixels, pixels, dtype=dtype)
        self.images = images.to(memory_format=torch.channels_last)
        self.labels = torch.randint(setting.classes, (batch,))
        self.model, self.step = CASES[case](model, self.images, form)
        self.update = Update(self.model, brfx.TrainConfig(), total=1_000_000)

    def forward_backward(self) -> Tensor:
        loss, _ = self.step(self.images, self.labels)
        torch.autograd.backward(loss)
        return loss

    def __call__(self) -> float:
        """Seconds of a step."""
        start = perf_counter()
        loss, _ = self.step(self.images, self.labels)
        self.update(loss)
        return perf_counter() - start


# Checks, before anything is timed.


def check(model_name: str, case: str, form: str) -> None:
    """Compare a brfx case's gradients with those of the plain eager step, in float64 so that no code moves."""
    batch, pixels = 4, MODELS[model_name].check_pixels
    expected, actual = (
        Runner(model_name, case, which, batch=batch, pixels=pixels, dtype=torch.float64)
        for which in ("reference", form)
    )
    actual.model.load_state_dict(copy.deepcopy(expected.model.state_dict()))
    expected.forward_backward()
    actual.forward_backward()
    wanted = {name: parameter.grad for name, parameter in expected.model.named_parameters()}
    floor = 1e-12 * max(float(grad.norm()) for grad in wanted.values() if grad is not None)
    for name, parameter in actual.model.named_parameters():
        grad, want = parameter.grad, wanted[name]
        if grad is None or want is None:
            if grad is not want:
                raise SystemExit(f"{model_name}, {case}, {form}: {name} has a gradient in one form only")
        elif not float((grad - want).norm()) <= 1e-6 * float(want.norm()) + floor:
            error = float((grad - want).norm() / want.norm())
            raise SystemExit(f"{model_name}, {case}, {form}: the gradient of {name} is off by {error:.2g} of its norm")


def check_gradients_exist(where: str, model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.grad is None or not 0 < float(parameter.grad.abs().sum()) < math.inf:
            raise SystemExit(f"{where}: the gradient of {name} is missing, zero or not finite")


# Time.


def warm_up(runner: Runner, where: str, *, is_brfx: bool) -> dict[str, Any]:
    """The first steps. Records the seconds of the first, and how many graphs a compiled form consists of."""
    stats = torch._dynamo.utils.counters["stats"]
    graphs = stats["unique_graphs"]
    start = perf_counter()
    with time_limit(COMPILE_LIMIT_S):
        runner.forward_backward()
        first = perf_counter() - start
        if not is_brfx:
            check_gradients_exist(where, runner.model)
        runner.update.clear()
        for _ in range(WARM_UP - 1):
            runner()
    return {"first_step_s": first, "graphs": stats["unique_graphs"] - graphs, "times": []}


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"not compiled within {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def first_line(error: object) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:200]


def measure_times(name: str, cases: Sequence[str], options: argparse.Namespace, caches: Path) -> dict[str, Any]:
    """Warm up every case, then time one step of each, round by round in a rotating order."""
    results: dict[str, Any] = {case: {} for case in cases}
    runners: dict[tuple[str, str], Runner] = {}
    for case in sorted(cases, key=lambda case: case not in EXPORTED):
        package = NEEDS.get(case)
        if package is not None and not installed(package):
            results[case] = {"missing": f"{package} is not installed"}
            continue
        for form in FORMS:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_of(caches, name, case, form))
            where = f"{name}, {case}, {form}"
            try:
                runner = Runner(name, case, form, batch=batch_of(name, options), pixels=MODELS[name].pixels)
                results[case][form] = warm_up(runner, where, is_brfx=case.startswith("brfx"))
            except Exception as error:
                if package is None and case != "published LSQ + BR(W+A)":
                    raise
                results[case][form] = {"error": first_line(error)}
                say(f"{where}: {first_line(error)}")
                continue
            runners[case, form] = runner
            say(f"{where}: first step {results[case][form]['first_step_s']:.1f} s")
    time_rounds(runners, results, options.rounds)
    own = {
        case: runner
        for (case, form), runner in runners.items()
        if form == "compiled" and case.startswith(("FP32", "brfx"))
    }
    profiles = [{case: profile_of(runner) for case, runner in own.items()} for _ in range(PROFILED)]
    for case, runner in own.items():
        results[case]["compiled"]["profile"] = {
            kind: median(profile[case][kind] for profile in profiles) for kind in SPENT
        }
        if case.startswith("brfx"):
            results[case]["compiled"]["quantized"] = quantized_values(runner)
    return results


def profile_of(runner: Runner) -> dict[str, float]:
    """Milliseconds of one step by what they are spent in."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        runner()
    products, kernels, other = SPENT
    spent = dict.fromkeys(SPENT, 0.0)
    for event in found.key_averages():
        kind = products if event.key in PRODUCTS else kernels if "CompiledFxGraph" in event.key else other
        spent[kind] += event.self_cpu_time_total / 1000
    return spent


def quantized_values(runner: Runner) -> dict[str, int]:
    """How many activations and weights a step quantizes."""
    with torch.no_grad():
        activations = sum(values.numel() for values in brfx.observe(runner.model, runner.images).values())
    layers = [module for module in runner.model.modules() if isinstance(module, QuantizedLayer)]
    return {"activations": activations, "weights": sum(w.numel() for layer in layers for w, _ in layer.regularized())}


def time_rounds(runners: dict[tuple[str, str], Runner], results: dict[str, Any], rounds: int) -> None:
    keys = list(runners)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    gc.collect()
    gc.disable()
    for index in range(rounds):
        start = index % len(keys)
        for case, form in keys[start:] + keys[:start]:
            results[case][form]["times"].append(runners[case, form]())
    gc.enable()
    more = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
    if more:
        say(f"{more} graphs were compiled during the timed rounds: some times include compilation")


def installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def batch_of(name: str, options: argparse.Namespace) -> int:
    return options.batch or MODELS[name].batch


# Memory.


def measure_memory(name: str, case: str, form: str, batch: int) -> dict[str, float]:
    """In a fresh process: MB that the third step's forward and backward add at their peak, and MB kept for backward."""
    runner = Runner(name, case, form, batch=batch, pixels=MODELS[name].pixels)
    runner()
    runner()
    found = {}
    gc.collect()
    if Path("/proc/self/clear_refs").exists():
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = status_mb("VmRSS")
        runner.forward_backward()
        found["peak_mb"] = status_mb("VmHWM") - before
        runner.update.clear()
    found["saved_mb"] = saved_mb(runner)
    return found


def status_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def saved_mb(runner: Runner) -> float:
    """MB of the storages that forward keeps for backward and that are no parameter, buffer or input."""
    known = [runner.images, runner.labels, *runner.model.parameters(), *runner.model.buffers()]
    known_storages = {tensor.untyped_storage().data_ptr() for tensor in known}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known_storages:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = runner.step(runner.images, runner.labels)
    del loss
    return sum(saved.values()) / 2**20


def in_subprocess(job: str, name: str, case: str, form: str, options: argparse.Namespace, cache: Path) -> str:
    """Run this file for one case; its last line of output. RuntimeError with the last line of what went wrong."""
    command = [sys.executable, __file__, job, f"{case}/{form}", "--models", name, "--threads", str(options.threads)]
    if options.batch:
        command += ["--batch", str(options.batch)]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1])
    return (done.stdout.strip().splitlines() or [""])[-1]


def cache_of(caches: Path, name: str, case: str, form: str) -> Path:
    """A folder for each case's compiled code, so that none finds what another has compiled."""
    return caches / f"{name}-{list(CASES).index(case)}-{form}"


# The page.


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The order statistics that hold the median with 95 % probability; of fewer than 6 values the extremes."""
    ordered, count = sorted(values), len(values)
    below, rank = 0.0, 0
    while rank < count // 2:
        below += math.comb(count, rank) / 2**count  # P(at most ``rank`` values are below the median)
        if 2 * below > 0.05:
            break
        rank += 1
    rank = max(rank, 1)
    return ordered[rank - 1], ordered[count - rank]


def ratio(entry: dict[str, Any], base: dict[str, Any]) -> str:
    if "error" in entry:
        return f"does not run: {entry['error']}".replace("|", "\\|")
    if not entry.get("times") or not base.get("times"):
        return "-"
    ratios = [own / other for own, other in zip(entry["times"], base["times"], strict=True)]
    low, high = interval(ratios)
    return f"{median(ratios):.2f} [{low:.2f}, {high:.2f}]"


def of_base(entry: dict[str, Any], base: dict[str, Any], key: str) -> str:
    own, other = entry.get("memory", {}).get(key), base.get("memory", {}).get(key)
    return f"{own / other:.2f}" if own is not None and other else "-"


def table(model: dict[str, Any]) -> list[str]:
    cases = model["cases"]
    lines = [
        "| case | eager, of eager FP32 | compiled, of compiled FP32 | compile s, eager / compiled "
        "| peak memory, eager / compiled | saved for backward, eager / compiled |",
        "|---|---|---|---|---|---|",
    ]
    for name, case in cases.items():
        if "missing" in case:
            lines.append(f"| {name} | {case['missing']} | | | | |")
            continue
        pairs = [(case.get(form, {}), cases["FP32"][form]) for form in FORMS]
        seconds = " / ".join(f"{entry['first_step_s']:.1f}" if "first_step_s" in entry else "-" for entry, _ in pairs)
        memory = [" / ".join(of_base(*pair, key) for pair in pairs) for key in ("peak_mb", "saved_mb")]
        lines.append(f"| {name} | {' | '.join(ratio(*pair) for pair in pairs)} | {seconds} | {' | '.join(memory)} |")
    return lines


def regularizers(model: dict[str, Any]) -> list[str]:
    """What bin regularization costs beyond LSQ, of the steps of one round."""
    plain, full = (model["cases"].get(f"brfx LSQ{terms}", {}) for terms in ("", " + BR(W+A)"))
    if not all(case.get(form, {}).get("times") for case in (plain, full) for form in FORMS):
        return []
    found = ", ".join(f"{ratio(full[form], plain[form])} {form}" for form in FORMS)
    return [f"A step with both regularizers takes, of one with LSQ alone: {found}.", ""]


def profile_table(model: dict[str, Any]) -> list[str]:
    profiles = {
        name: case["compiled"] for name, case in model["cases"].items() if "profile" in case.get("compiled", {})
    }
    if not profiles:
        return []
    lines = ["| compiled, ms a step under the profiler | " + " | ".join(SPENT) + " |", "|---|---|---|---|"]
    for name, entry in profiles.items():
        lines.append(f"| {name} | " + " | ".join(f"{entry['profile'][kind]:.0f}" for kind in SPENT) + " |")
    lines.append("")
    plain, full = (profiles.get(f"brfx LSQ{terms}") for terms in ("", " + BR(W+A)"))
    if plain and full:
        values = full["quantized"]
        text = (
            f"A step quantizes {values['activations'] / 1e6:.1f} million activations and {values['weights'] / 1e6:.1f} "
            "million weights."
        )
        products, kernels = ([entry["profile"][kind] for entry in (plain, full)] for kind in SPENT[:2])
        if max(products) < (1 + QUIET) * min(products):
            more = kernels[1] - kernels[0]
            text += (
                f" The bins of both take {more:.0f} ms of generated kernels, "
                f"{1e6 * more / sum(values.values()):.2f} ns a value, forward and backward together."
            )
        lines += [text, ""]
    return lines


def section(name: str, model: dict[str, Any]) -> list[str]:
    ran = model["environment"]
    base = [model["cases"]["FP32"][form] for form in FORMS]
    own = " and ".join(
        f"{1000 * median(entry['times']):.0f} ms {form}" for entry, form in zip(base, FORMS, strict=True)
    )
    memory = [
        f"{entry['memory']['peak_mb']:.0f} MB {form}"
        for entry, form in zip(base, FORMS, strict=True)
        if "peak_mb" in entry.get("memory", {})
    ]
    versions = ", ".join(f"{package} {number}" for package, number in ran["versions"].items())
    return [
        f"## {name}, {model['pixels']} px, batch {model['batch']}" + (f", {ran['simd']}" if "simd" in ran else ""),
        "",
        f"FP32 takes {own} a step"
        + (f", and at its peak {' and '.join(memory)} at batch {model['memory_batch']}" if memory else "")
        + f". {model['rounds']} rounds, {ran['threads']} threads of {ran['cpu']}; {versions}.",
        "",
        *table(model),
        "",
        *regularizers(model),
        *profile_table(model),
        f"{ran['date']}: `{ran['command']}`",
        "",
    ]


PAGE = f"""# What a training step costs

Written by `benchmarks/train_step.py`; `make bench` makes it again, `benchmarks/train_step.json` has every time.

A step is that of `brfx.fit`: forward, loss, backward, the gradients' norm, optimizer, on one random batch in
channels-last. The cases of a model run in one process, one step of each in turn in an order that rotates. A figure is
the median over rounds of the step's time by that of the FP32 step of the same round, with the order statistics around
it that hold the median with 95 % probability (of fewer than 6 rounds: the least and the greatest ratio).

- **brfx** has {BITS}-bit weights and ReLUs, the first and the last layer included (`placement="paper"`), as the
  published way and Brevitas have here; `"deploy"`, the default, has every operand of a product on a grid. Eager is
  `compile="kernels"` of `fit`: each convolution, which stays PyTorch's own, and what follows it up to its quantizer are
  one compiled function, and eager autograd runs between them; compiled is `compile="on"`. Before anything is timed, the
  gradients of each case are compared with those of the plain eager step in float64 on a small batch, to 1e-6 of each
  one's norm (`--no-check` leaves that to `tests/regularizers/test_bin_penalty.py`). Memory that a step frees goes back
  to the kernel or not as the C library decides, in all cases alike; `fit` itself keeps it
  (`benchmarks/kept_memory.py`).
- **FP32** is plain eager, or `torch.compile` as it comes, and what all ratios are to. **FP32 in brfx.fit** is the same
  float model with the compiler options that `fit` gives (`brfx/kernels/inductor.py`): part of what brfx gains is
  open to every network.
- **a loop of one's own** calls the penalty as the README does: plain, without any compiler, in the first column, and
  after `penalty.compile()` in the second.
- **published** is LSQ from autograd operations with `detach`, and the regularizer's loop over bins, mean and variance
  of the values that a mask selects, as the papers print them.
- **Brevitas** has learned scales for weights and ReLUs, {BITS} bits. **torchao** is `prepare_qat_pt2e` with
  `X86InductorQuantizer`, 8 bits. Neither has a regularizer. Their compiled form, and that of the published way, is
  `torch.compile` of the same step, graph breaks allowed.
- **compile s** is the first step, from an empty cache; the pieces that brfx compiles in its eager form are shared by
  the cases of a process, so that later rows find some of them made.
- **peak memory** is what the resident set of a process with this case alone rises by during forward and backward of
  its third step; **saved for backward** counts what forward keeps besides parameters and inputs. Both are ratios to
  FP32 in the same form.
- **the profile** is the median of {PROFILED} more steps, each case in turn (sections of 2026-11-26 and before: the mean
  of 4, one case after another). All cases have the same products: where these differ the machine did, and rows do not
  compare. What bins take, the difference of two rows, is said only where products differ by less than {QUIET:.0%}.

"""


def write(results: dict[str, Any], options: argparse.Namespace) -> None:
    options.json.write_text(json.dumps(results, indent=1) + "\n")
    found = results["models"]  # by model and instruction set; the oldest have none in their names
    known = [key for name in MODELS for key in found if key.partition(",")[0] == name]
    lines = [line for key in known for line in section(key.partition(",")[0], found[key])]
    options.page.write_text(PAGE + "\n".join(lines))


# The run.


def environment(options: argparse.Namespace) -> dict[str, Any]:
    packages = ("torch", "torchvision", "brevitas", "torchao", "brfx")
    arguments = [str(Path(sys.argv[0]).resolve().relative_to(ROOT)), *sys.argv[1:]]
    return {
        "date": date.today().isoformat(),
        "command": shlex.join(["python", *arguments]),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages if installed(package)},
        "cpu": cpu_model(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "threads": options.threads,
    }


def cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run_model(
    name: str, cases: Sequence[str], options: argparse.Namespace, results: dict[str, Any], caches: Path
) -> None:
    for case in cases:
        for form in FORMS:
            if case.startswith("brfx") and not options.no_check:
                try:
                    in_subprocess("--check", name, case, form, options, caches / "check")
                except RuntimeError as error:
                    raise SystemExit(f"check failed: {error}") from None
                say(f"{name}, {case}, {form}: gradients agree")
    measured = measure_times(name, cases, options, caches)
    setting = MODELS[name]
    results["models"][f"{name}, {torch.backends.cpu.get_cpu_capability()}"] = {
        "environment": environment(options),
        "pixels": setting.pixels,
        "batch": batch_of(name, options),
        "memory_batch": options.batch or setting.memory_batch,
        "rounds": options.rounds,
        "cases": measured,
    }
    write(results, options)
    if options.no_memory:
        return
    for case, forms in measured.items():
        for form in FORMS:
            entry = forms.get(form, {"error": ""})
            if "error" in entry:
                continue
            try:
                line = in_subprocess("--memory-case", name, case, form, options, cache_of(caches, name, case, form))
                entry["memory"] = json.loads(line)
            except RuntimeError as error:
                entry["memory_error"] = first_line(error)
            say(f"{name}, {case}, {form}: {entry.get('memory') or entry['memory_error']}")
            write(results, options)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="FP32 is always there")
    parser.add_argument("--rounds", type=int, default=20, help="timed steps of each case, at least 1")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, help="instead of each model's own, for a quick try")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "train_step.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md")
    parser.add_argument("--no-check", action="store_true", help="do not compare gradients first")
    parser.add_argument("--no-memory", action="store_true", help="times alone")
    parser.add_argument("--memory-case", metavar="CASE/FORM", help=argparse.SUPPRESS)
    parser.add_argument("--check", metavar="CASE/FORM", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds takes 1 or more")
    return options


def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    torch._dynamo.config.recompile_limit = 1024  # all cases of a process share the code of a step
    torch._dynamo.config.accumulated_recompile_limit = 8192
    warnings.filterwarnings("ignore")
    if options.check:
        check(options.models[0], *options.check.rsplit("/", 1))
        return
    if options.memory_case:
        name = options.models[0]
        batch = options.batch or MODELS[name].memory_batch
        case, form = options.memory_case.rsplit("/", 1)
        print(json.dumps(measure_memory(name, case, form, batch)))
        return
    results = json.loads(options.json.read_text()) if options.json.exists() else {"models": {}}
    cases = [case for case in CASES if case == "FP32" or case in options.cases]
    with tempfile.TemporaryDirectory(prefix="brfx-bench-", ignore_cleanup_errors=True) as caches:
        for name in options.models:
            run_model(name, cases, options, results, Path(caches))


if __name__ == "__main__":
    main()
