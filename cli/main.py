"""The commands of ``brfx``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from brfx.config import FLOAT_TRAINING, TrainConfig
from brfx.errors import BrfxError

from . import render
from .options import (
    build_job,
    data_options,
    model_options,
    penalty_options,
    quantizer_options,
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
def quantize(dry_run: bool, **given: Any) -> None:
    """Train a low-bit network from an FP32 checkpoint and export it."""
    job = build_job("quantize", given)
    from brfx import job as jobs

    if dry_run:
        render.audit(jobs.dry_run(job))
        return
    render.show_log()
    with render.progress("QAT") as callback:
        result = jobs.quantize(job, [callback])
    render.job_result(result, f"W{job.qat.weight_bits}A{job.qat.act_bits}")


@cli.command()
@model_options
@click.option("--epochs", type=int, default=FLOAT_TRAINING.epochs, show_default=True, help="Passes over the images.")
@train_options(FLOAT_TRAINING)
@data_options
def train(**given: Any) -> None:
    """Train an FP32 baseline (best.pth is what `quantize --ckpt` takes)."""
    job = build_job("train", given)
    from brfx import job as jobs

    render.show_log()
    with render.progress("FP32") as callback:
        result = jobs.train_float(job, [callback])
    render.job_result(result, "FP32")


@cli.command()
@model_options
@data_options
def evaluate(**given: Any) -> None:
    """Test accuracy of an FP32 checkpoint (with --model) or of a run's model.pt."""
    job = build_job("evaluate", given)
    from brfx import job as jobs

    kind, result = jobs.evaluate_file(job)
    render.console.print(f"{kind} top-1 accuracy: {render.evaluation(result)}")


@cli.command()
@click.option("--ckpt", required=True, type=click.Path(path_type=Path), help="model.pt of a run.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="File to write; must not exist.")
@click.option("--model", default="", help="path/to/file.py:factory, for a model of your own.")
def export(ckpt: Path, output: Path, model: str) -> None:
    """Write a run's model.pt as ONNX."""
    from brfx import job as jobs

    report = jobs.export_file(ckpt, output, model)
    difference = (
        "" if report.max_difference is None else f", largest difference in ONNX Runtime {report.max_difference:.2g}"
    )
    render.console.print(f"{report.path}  {render.size(report.bytes)}{difference}", markup=False)


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
def inspect(**given: Any) -> None:
    """Show each layer of a rewritten model, or of a run's model.pt: bits, signs, steps, MACs."""
    from brfx import job as jobs

    render.audit(jobs.inspect(build_job("inspect", given)))


def main() -> None:
    """Entry point: a mistake of the user's is one red line and exit code 2; ``--debug`` shows where it arose."""
    debug = "--debug" in sys.argv
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
    except (BrfxError, OSError) as error:
        if debug:
            raise
        render.error(str(error))
        sys.exit(2)
