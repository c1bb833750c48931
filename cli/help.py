"""Help pages: options in groups, the ones that matter first, and examples at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

#: Options that need no groups.
MANY = 20

#: Options by title, under the names of their settings. What is in none of them stands last.
GROUPS = {
    "The first to know": ("model", "ckpt", "data", "bits", "epochs", "output_dir"),
    "Model and checkpoint": ("task", "ckpt_key", "strict", "num_classes", "cifar_stem"),
    "Images": (
        *("data_dir", "download", "image_size", "resize", "stretch", "interpolation", "mean", "std", "channel_order"),
        *("divisor", "batch_size", "workers", "skip_bad_images", "val_fraction", "limit_batches"),
    ),
    "Augmentation": ("crop", "flip", "rand_augment", "mixup", "cutmix", "erasing"),
    "Bits and levels": (
        *("weight_bits", "act_bits", "input_bits", "residual_bits", "stream_bits", "weight_grid", "per_channel"),
        *("weight_quantizer", "act_quantizer", "clip_value", "placement", "skip", "first_last_8bit"),
        *("bit_budget", "size_budget"),
    ),
    "Bin regularization and steps": (
        *("warmup_epochs", "lambda_br", "lambda_br_act", "br_form", "lambda_kurtosis", "br_backprop_to_alpha_act"),
        *("freeze_alpha", "freeze_weight_alpha", "freeze_act_alpha", "start", "dead_filters", "reconstruct"),
    ),
    "Training": (
        *("lr", "step_lr", "optimizer", "momentum", "weight_decay", "accumulate", "label_smoothing", "class_weights"),
        *("clip_grad", "ema", "reestimate_bn", "distill", "teacher", "temperature", "seed", "device", "compile"),
        *("precision", "on_nonfinite"),
    ),
    "The run": (
        *("recipe", "config", "dry_run", "table", "resume", "keep", "patience", "checkpoint_minutes"),
        *("keep_checkpoints", "tensorboard", "batches", "graph", "output", "as_json"),
    ),
}


class Command(click.Command):
    """A command whose help has its options in :data:`GROUPS`, if there are many, and ``examples`` at the end."""

    def __init__(self, *args: Any, examples: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.examples = examples

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rest = [
            (option.name, record)
            for option in self.get_params(ctx)
            if isinstance(option, click.Option) and (record := option.get_help_record(ctx)) is not None
        ]
        many = len(rest) > MANY
        for title, names in GROUPS.items() if many else ():
            found = [record for wanted in names for name, record in rest if name == wanted]
            rest = [(name, record) for name, record in rest if name not in names]
            if found:
                with formatter.section(title):
                    formatter.write_dl(found)
        with formatter.section("More" if many else "Options"):
            formatter.write_dl([record for _, record in rest])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.examples:
            with formatter.section("Examples"):
                for example in self.examples:
                    formatter.write(f"{'':{formatter.current_indent}}{example}\n")


class Group(click.Group):
    """A group of such commands, listed in the order in which they are used."""

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)
