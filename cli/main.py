"""The commands of ``brfx``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from brfx.config import FLOAT_TRAINING, TrainConfig
from brfx.errors import BrfxError, Interrupted, explained

from . import render, tables
from .options import (
    build_job,
    data_dir_option,
    data_options,
    model_options,
    penalty_options,
    quantizer_options,
    table_options,
    train_options,
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="brfx")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Take an FP32 network to 1-4 bits: learned steps (LSQ), bin regularization, and files to ship.

    brfx quantize --model resnet20 --ckpt best.pth --bits 2
    """


@cli.command()
@model_options
@quantizer_options
@penalty_options
@train_options(TrainConfig())
@data_options
@click.option("--dry-run", is_flag=True, help="Show what would be quantized, train nothing, write nothing.")
@table_options
def quantize(dry_run: bool, table: str, **given: Any) -> None:
    """Train a low-bit network from an FP32 checkpoint and export it."""
    resume = given["resume"] is not None
    job = build_job("quantize", given)
    from brfx.jobs import job as jobs

    render.show_log(beside=table in ("json", "csv"))
    from .progress import progress

    if dry_run:
        with progress(render.errors) as callback:
            report = jobs.dry_run(job, [callback])
        tables.audit(render.console, report, table, regularized=bool(job.lambda_br or job.lambda_br_act))
        return
    with progress(render.console) as callback:
        result = jobs.quantize(job, [callback], resume=resume)
    render.job_result(result, f"W{job.qat.weight_bits}A{job.qat.act_bits}")


@cli.command()
@model_options
@click.option("--epochs", type=int, default=FLOAT_TRAINING.epochs, show_default=True, help="Passes over the images.")
@train_options(FLOAT_TRAINING)
@data_options
def train(**given: Any) -> None:
    """Train an FP32 baseline (best.pth is what `quantize --ckpt` takes)."""
    resume = given["resume"] is not None
    job = build_job("train", given)
    from brfx.jobs import job as jobs

    from .progress import progress

    render.show_log()
    with progress(render.console) as callback:
        result = jobs.train_float(job, [callback], resume=resume)
    render.job_result(result, "FP32")


@cli.command()
@model_options
@data_options
def evaluate(**given: Any) -> None:
    """Test accuracy, or another task's metric, of an FP32 checkpoint (with --model) or of a run's model.pt."""
    job = build_job("evaluate", given)
    from brfx.jobs import job as jobs

    from .progress import progress

    render.show_log()
    with progress(render.errors) as callback:
        kind, result = jobs.evaluate_file(job, [callback])
    what = "top-1 accuracy" if result.metric == "accuracy" else "test"
    render.console.print(f"{kind} {what}: {render.evaluation(result)}")


@cli.command()
@click.option("--ckpt", required=True, type=click.Path(path_type=Path), help="model.pt of a run.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="File to write; must not exist.")
@click.option("--model", default="", help="path/to/file.py:factory, for a model of your own.")
@click.option(
    "--profile",
    type=click.Choice(["compact", "fast", "portable"]),
    default="compact",
    show_default=True,
    help="Smallest file (opset 25), INT8 weights, or INT4 for older runtimes (opset 21).",
)
def export(ckpt: Path, output: Path, model: str, profile: str) -> None:
    """Write a run's model.pt for other runtimes; the suffix of --output says how.

    .onnx: integer kernels, compared with the model.  .safetensors: packed codes and a header (docs/packed-format.md).
    .pt2: torch.export, loads without brfx.  .qonnx.onnx: QONNX.
    """
    from brfx.jobs import files

    report = files.export_file(ckpt, output, model, profile)
    if report is None:
        render.console.print(f"{output}  {render.size(output.stat().st_size)}", markup=False)
    else:
        render.exported(report)


@cli.command()
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@click.option("--data", default="", help="Test images to compare on.  [default: random images]")
@data_dir_option
@click.option("--images", type=click.IntRange(0), default=0, help="At most so many.  [default: all, or 64 random ones]")
@click.option("--integer", is_flag=True, help="Run a model.pt in its integer form, the reference interpreter.")
def verify(first: Path, second: Path, data: str, data_dir: Path, images: int, integer: bool) -> None:
    """Compare two files of one model (.onnx, or brfx's .pt): outputs, decisions, accuracy, codes by layer."""
    from brfx.jobs import files

    render.verification(files.verify_files(first, second, data, data_dir, images, integer))


@cli.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=50, show_default=True, help="How often each is timed.")
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True, help="Of ONNX Runtime.")
@click.option("--image-size", type=click.IntRange(1), help="Pixels a side.  [default: the model's own, or 224]")
def benchmark(paths: tuple[Path, ...], batch_size: int, rounds: int, threads: int, image_size: int | None) -> None:
    """Time ONNX files in ONNX Runtime, in turns.

    A model.pt among them adds its FP32 export and ONNX Runtime's own INT8 of that, to compare with.
    """
    from brfx.jobs import files

    render.timings(files.benchmark_files(list(paths), batch_size, rounds, threads, image_size))


@cli.command()
@click.argument("pattern", default="*")
def models(pattern: str) -> None:
    """List what --model accepts, or the names that match PATTERN."""
    from fnmatch import fnmatch

    from brfx.models import model_names

    for name in model_names():
        if fnmatch(name, pattern):
            click.echo(name)


@cli.command()
@model_options
@quantizer_options
@click.option("--image-size", type=int, help="Pixels a side of the example.  [default: the model's own]")
@table_options
def inspect(table: str, **given: Any) -> None:
    """Show each layer of a rewritten model, or of a run's model.pt: bits, signs, steps, MACs."""
    from brfx.jobs import job as jobs

    job = build_job("inspect", given)
    render.show_log(beside=table in ("json", "csv"))
    tables.audit(render.console, jobs.inspect(job), table)


@cli.command()
@click.argument("name", required=False)
def recipes(name: str | None) -> None:
    """List what --recipe accepts, or print the recipe NAME, to begin a --config of your own with."""
    from brfx.config.recipes import recipe_names, recipe_text

    click.echo("\n".join(recipe_names()) if name is None else recipe_text(name).rstrip())


@cli.command()
@click.argument("folder", metavar="DIR", default="runs", type=click.Path(path_type=Path))
@table_options
def runs(folder: Path, table: str) -> None:
    """List the runs in DIR and below side by side.  [default: runs]"""
    from brfx.jobs.runs import read_runs

    tables.runs(render.console, read_runs(folder), table)


def main() -> None:
    """Entry point: a mistake of the user's is one red line and exit code 2; ``--debug`` shows where it arose."""
    debug = "--debug" in sys.argv
    if os.environ.get("RANK", "0") != "0":  # of processes that torchrun started, the first one speaks
        render.console.quiet = True
    try:
        cli(standalone_mode=False)
    except click.exceptions.Abort:
        render.error("stopped")
        sys.exit(130)
    except KeyboardInterrupt:
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
        render.error(explained(error) if isinstance(error, OSError) and error.errno is not None else str(error))
        sys.exit(2)
