"""The commands of ``brfx``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from brfx.config import FLOAT_TRAINING, TrainConfig
from brfx.errors import BrfxError, Interrupted, explained

from . import completion, render, summary, tables
from .help import Group
from .options import (
    budget_options,
    data_dir_option,
    data_options,
    model_options,
    penalty_options,
    quantizer_options,
    table_options,
    train_options,
)
from .report import report, report_of_finished, write_graph
from .settings import build_job


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="brfx")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Take an FP32 network to 1-4 bits: learned steps (LSQ), bin regularization, and files to ship.

    \b
    brfx train --model resnet20 --data digits --epochs 8 --output-dir fp32
    brfx quantize --model resnet20 --data digits --ckpt fp32/best.pth --bits 2
    """


@cli.command(
    examples=[
        "brfx quantize --model resnet20 --ckpt best.pth --data DIR --bits 2",
        "brfx quantize --model mine.py:make --ckpt mine.pth --data DIR --bits 4",
        "brfx quantize --model resnet20 --ckpt best.pth --data DIR --dry-run",
        "brfx quantize --resume runs/resnet20-w2a2",
    ]
)
@model_options
@quantizer_options
@budget_options
@penalty_options
@train_options(TrainConfig())
@data_options
@click.option("--dry-run", is_flag=True, help="Show what would be quantized, train nothing, write nothing.")
@table_options
def quantize(dry_run: bool, table: str, **given: Any) -> None:
    """Train a low-bit network from an FP32 checkpoint and export it."""
    resume = given["resume"] is not None
    job = build_job("quantize", given)
    from brfx.jobs import inspect as inspect_job
    from brfx.jobs import job as jobs

    render.show_log(beside=table in ("json", "csv"))
    from .progress import progress

    if dry_run:
        with progress(render.errors) as callback:
            report = inspect_job.dry_run(job, [callback])
        tables.audit(render.console, report, table, regularized=bool(job.lambda_br or job.lambda_br_act))
        return
    with progress(render.console) as callback:
        result = jobs.quantize(job, [callback], resume=resume)
    report_of_finished(result.run_dir)
    summary.show(result, job)


@cli.command(
    examples=[
        "brfx train --model resnet20 --data digits --epochs 8 --output-dir fp32",
        "brfx train --model resnet18 --ckpt imagenet.pth --data DIR --epochs 20",
    ]
)
@model_options
@click.option("--epochs", type=int, default=FLOAT_TRAINING.epochs, show_default=True, help="Passes over the images.")
@train_options(FLOAT_TRAINING)
@data_options
@click.option("--dry-run", is_flag=True, help="Show what would be trained, train nothing, write nothing.")
def train(dry_run: bool, **given: Any) -> None:
    """Train an FP32 baseline.

    Its best.pth is what `brfx quantize --ckpt` takes.
    """
    resume = given["resume"] is not None
    job = build_job("train", given)
    from brfx.jobs import inspect as inspect_job
    from brfx.jobs import job as jobs

    from .progress import progress

    render.show_log()
    if dry_run:
        with progress(render.errors) as callback:
            line = inspect_job.dry_run_float(job, [callback])
        render.console.print(line, markup=False)
        return
    with progress(render.console) as callback:
        result = jobs.train_float(job, [callback], resume=resume)
    summary.show(result, job)


@cli.command(
    examples=[
        "brfx evaluate --model resnet20 --ckpt best.pth --data DIR",
        "brfx evaluate --ckpt runs/resnet20-w2a2/model.pt --data DIR",
        "brfx evaluate --ckpt runs/resnet20-w2a2/model.onnx --data DIR",
    ]
)
@model_options
@data_options
def evaluate(**given: Any) -> None:
    """Measure a checkpoint or a file on the test images.

    An FP32 checkpoint needs its model's name. A run's model.pt knows its own preprocessing, and so does a .onnx, .pt2
    or .safetensors that was exported from it.
    """
    job = build_job("evaluate", given)
    from brfx.jobs import evaluate as evaluate_job

    from .progress import progress

    render.show_log()
    with progress(render.errors) as callback:
        kind, result = evaluate_job.evaluate_file(job, [callback])
    what = "top-1 accuracy" if result.metric == "accuracy" else "test"
    render.console.print(f"{kind} {what}: {render.evaluation(result)}")


@cli.command(
    examples=[
        "brfx export --ckpt model.pt --output model.onnx --profile portable",
        "brfx export --ckpt model.pt --output model.safetensors",
    ]
)
@click.option("--ckpt", required=True, type=click.Path(path_type=Path), help="The model.pt of a run.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="The file to write; it must not exist.")
@click.option(
    "--model",
    default="",
    shell_complete=completion.code_files,
    help="A model of your own that it is of: path/to/file.py:factory.",
)
@click.option(
    "--profile",
    type=click.Choice(["compact", "fast", "portable", "qdq", "qdq-int4"]),
    default="compact",
    show_default=True,
    help="Write the smallest file (opset 25), INT8 weights (fast), INT4 for older runtimes (portable, opset 21), or "
    "QuantizeLinear and DequantizeLinear around ordinary operators, for runtimes other than ONNX Runtime (qdq).",
)
def export(ckpt: Path, output: Path, model: str, profile: str) -> None:
    """Write a run's model.pt for other runtimes.

    The suffix of --output says how.

    \b
    .onnx         integer kernels, compared with the model
    .safetensors  packed codes and a header (docs/packed-format.md)
    .pt2          torch.export, loads without brfx
    .qonnx.onnx   QONNX
    """
    from brfx.jobs import files

    report = files.export_file(ckpt, output, model, profile)
    if report is None:
        render.console.print(f"{output}  {render.size(output.stat().st_size)}", markup=False)
    else:
        render.exported(report)


@cli.command(
    examples=[
        "brfx verify model.pt model.onnx",
        "brfx verify model.pt model.onnx --data DIR --images 500",
    ]
)
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@click.option(
    "--data",
    default="",
    shell_complete=completion.data,
    help="Compare on these test images, a name or a folder.  [default: random ones]",
)
@data_dir_option
@click.option(
    "--images",
    type=click.IntRange(0),
    default=0,
    help="Compare on so many images.  [default: all, or 64 random ones]",
)
@click.option(
    "--model",
    default="",
    shell_complete=completion.code_files,
    help="A model of your own that a .pt is of: path/to/file.py:factory.",
)
@click.option("--integer", is_flag=True, help="Run a model.pt in its integer form, the reference interpreter.")
def verify(first: Path, second: Path, data: str, data_dir: Path, images: int, model: str, integer: bool) -> None:
    """Compare two files of one model, image by image.

    They are .onnx, .pt2, .safetensors or brfx's .pt. Outputs, decisions and accuracy are compared, and of a .pt the
    codes by layer.
    """
    from brfx.jobs import files

    render.verification(files.verify_files(first, second, data, data_dir, images, integer, model))


@cli.command(
    examples=[
        "brfx benchmark model.pt model.onnx --threads 4",
    ]
)
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--batch-size", type=click.IntRange(1), default=1, show_default=True, help="Time batches of so many images."
)
@click.option("--rounds", type=click.IntRange(1), default=50, show_default=True, help="Time each so many times.")
@click.option(
    "--threads", type=click.IntRange(1), default=2, show_default=True, help="Let ONNX Runtime have so many threads."
)
@click.option(
    "--image-size", type=click.IntRange(1), help="Use images of so many pixels a side.  [default: what the files say]"
)
@click.option(
    "--model",
    default="",
    shell_complete=completion.code_files,
    help="A model of your own that a .pt is of: path/to/file.py:factory.",
)
def benchmark(
    paths: tuple[Path, ...], batch_size: int, rounds: int, threads: int, image_size: int | None, model: str
) -> None:
    """Time files in ONNX Runtime, in turns.

    A model.pt among them adds its FP32 export and ONNX Runtime's own INT8 of that, to compare with. Of files in a run's
    folder the figures are kept there, in benchmark.json, and `brfx report` shows them.
    """
    from brfx.jobs import files

    found = files.benchmark_files(list(paths), batch_size, rounds, threads, image_size, model)
    render.timings(found)
    kept = files.keep_timings(paths, found, batch_size, threads)
    if kept is not None:
        render.console.print(f"{kept}: `brfx report {kept.parent}` shows it", markup=False)


@cli.command(
    examples=[
        "brfx models",
        "brfx models 'resnet*'",
    ]
)
@click.argument("pattern", default="*")
def models(pattern: str) -> None:
    """List what --model accepts.

    With a PATTERN, such as 'resnet*', the names that match; those of timm begin with timm/.
    """
    from fnmatch import fnmatch

    from brfx.hubs import TIMM, timm_names
    from brfx.models import model_names

    for name in timm_names() if pattern.startswith(TIMM) else model_names():
        if fnmatch(name, pattern):
            click.echo(name)


@cli.command(
    examples=[
        "brfx inspect --model resnet20 --bits 2",
        "brfx inspect --ckpt model.pt --wide",
        "brfx inspect --ckpt model.pt --json > layers.json",
    ]
)
@model_options
@quantizer_options
@click.option("--image-size", type=int, help="Use an example of so many pixels a side.  [default: the model's own]")
@click.option(
    "--graph", type=click.Path(path_type=Path), help="Write a picture of the graph before and after, an .svg."
)
@table_options
def inspect(table: str, graph: Path | None, **given: Any) -> None:
    """Show what is quantized, layer by layer.

    Of a model by its name as it would be rewritten, or of a run's model.pt. Layers that are alike share a line:
    layer1.{0,1}.conv1 x2 is layer1.0.conv1 and layer1.1.conv1, with the sum of their parameters and MACs.
    """
    from brfx.jobs import inspect as inspect_job

    job = build_job("inspect", given)
    render.show_log(beside=table in ("json", "csv"))
    if graph is None:
        tables.audit(render.console, inspect_job.inspect(job), table)
        return
    found, before, after = inspect_job.inspect_graphs(job)
    tables.audit(render.console, found, table)
    write_graph(before, after, graph)


@cli.command(
    examples=[
        "brfx sensitivity --model resnet20 --ckpt best.pth --data DIR",
        "brfx sensitivity --model resnet20 --ckpt a.pth --bit-budget 3 --output a.toml",
    ]
)
@model_options
@quantizer_options
@budget_options
@click.option("--batches", type=click.IntRange(1), default=4, show_default=True, help="Of training, to measure on.")
@click.option("--output", type=click.Path(path_type=Path), help="New file for the budget's bits, a --config.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the tables.")
@data_options
def sensitivity(batches: int, output: Path | None, as_json: bool, **given: Any) -> None:
    """Measure what each layer's bits cost alone.

    A figure is the Kullback-Leibler divergence of the classes' probabilities from the FP32 network's, in nats an image,
    where the weights of one layer, or one activation, are quantized alone, on training images.
    """
    from brfx.io.atomic import write_text_atomically
    from brfx.jobs import bits
    from brfx.jobs import inspect as inspect_job

    job = build_job("sensitivity", given)
    bits.require_output(job, output)
    if not as_json:
        render.show_log()
    report = inspect_job.sensitivity(job, batches)
    if output is not None:
        write_text_atomically(output, report.toml())
    render.sensitivity(report, as_json)


@cli.command(
    examples=[
        "brfx recipes",
        "brfx recipes lsq-paper > mine.toml",
    ]
)
@click.argument("name", required=False, shell_complete=completion.recipes)
def recipes(name: str | None) -> None:
    """List what --recipe accepts, or print one.

    What `brfx recipes NAME` prints is a file for --config to begin your own with.
    """
    from brfx.config.recipes import recipe_names, recipe_summary, recipe_text

    if name is not None:
        click.echo(recipe_text(name).rstrip())
        return
    found = recipe_names()
    width = max(map(len, found))
    click.echo("\n".join(f"{each:<{width}}  {recipe_summary(each)}" for each in found))


@cli.command(
    examples=[
        "brfx runs runs",
        "brfx runs runs --csv > runs.csv",
    ]
)
@click.argument("folder", metavar="DIR", default="runs", type=click.Path(path_type=Path))
@table_options
def runs(folder: Path, table: str) -> None:
    """List the runs in a folder side by side.

    DIR and all below it is read; without it, runs. What all runs share is said once above the table.
    """
    from brfx.jobs.runs import read_runs

    tables.runs(render.console, read_runs(folder), table)


cli.add_command(report)


def main() -> None:
    """Entry point: a mistake of the user's is one red line and exit code 2; ``--debug`` shows where it arose."""
    debug = "--debug" in sys.argv
    if os.environ.get("RANK", "0") != "0":  # of processes that torchrun started, the first one speaks
        render.console.quiet = True
    try:
        cli(standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):
        render.error("stopped")
        sys.exit(130)
    except click.ClickException as error:
        hint = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "brfx"
        render.error(f"{error.format_message()} (see {hint} --help)")
        sys.exit(2)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except Interrupted as error:
        render.error(str(error))
        sys.exit(128 + error.signal)
    except (BrfxError, OSError) as error:
        if debug:
            raise
        render.error(explained(error) if isinstance(error, OSError) else str(error))
        sys.exit(2)
