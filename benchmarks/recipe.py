"""The short runs behind the defaults of `brfx quantize`: where steps start, batch, rates, lambda.

    python benchmarks/recipe.py start|rate|steps|lambda --ckpt resnet20.th --data DIR [--weights run/best.pth]

prints one row a run as markdown. ResNet-20, W2A2, eager, one seed; a minute or so a row.
"""

import argparse
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

import brfx
from brfx.calibration import quantizers
from brfx.data import BatchLoader, Dataset, Preprocessing, load_dataset
from brfx.io.float_checkpoint import load_float, read_state_dict
from brfx.nn import LSQWeightQuantizer
from brfx.train import fit, reestimate_batch_norm

PAPER = brfx.QATConfig(bits=2, placement="paper")
CONFIG = brfx.TrainConfig(epochs=1, warmup_epochs=0, compile="off")


def some(data: Dataset, images: int, batch: int) -> BatchLoader:
    chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:images]
    return BatchLoader(data.train.take(chosen), data.preprocessing, batch, augment=True, drop_last=True)


def prepared(model, train: BatchLoader, activations: str, weights: str, batch_statistics: bool):
    """Calibrated with one rule for activations and another for weights, batch norms re-estimated."""
    qmodel, other = brfx.prepare_qat(model, PAPER), brfx.prepare_qat(model, PAPER)
    batches = [images for images, _ in islice(train, 3)]
    brfx.calibrate(qmodel, batches, start=activations, batch_statistics=batch_statistics)
    brfx.calibrate(other, batches[:1], start=weights)
    for mine, theirs in zip(quantizers(qmodel).values(), quantizers(other).values(), strict=True):
        if isinstance(mine, LSQWeightQuantizer):
            mine.step.data.copy_(theirs.step.data)
    reestimate_batch_norm(qmodel, batches)
    return qmodel


def start(model, data: Dataset, val: BatchLoader, _: Path | None) -> None:
    train = some(data, 60 * 128, 128)
    for activations, weights, statistics in [
        ("mse", "mse", False),
        ("mse", "lsq", False),
        ("lsq", "lsq", True),
        ("mse", "lsq", True),
        ("mse", "mse", True),
    ]:
        qmodel = prepared(model, train, activations, weights, statistics)
        before = brfx.evaluate(qmodel, val).accuracy
        epoch = fit(qmodel, train, val, replace(CONFIG, lr=0.01, step_lr=0.01)).history[0]
        cells = [f"{activations} / {weights}", "batch" if statistics else "running", f"{before:.1%}"]
        print(
            "| " + " | ".join([*cells, f"{epoch.train.accuracy:.1%}", f"{epoch.val_accuracy:.1%}"]) + " |", flush=True
        )


def rate(model, data: Dataset, val: BatchLoader, _: Path | None) -> None:
    for batch, lr in [(128, 0.015), (128, 0.04), (64, 0.015), (64, 0.02), (64, 0.04)]:
        train = some(data, 22_528, batch)
        qmodel = prepared(model, train, "mse", "mse", True)
        epoch = fit(qmodel, train, val, replace(CONFIG, lr=lr, step_lr=lr / 10)).history[0]
        print(f"| {batch} | {lr} | {epoch.val_accuracy:.1%} |", flush=True)


def steps(model, data: Dataset, val: BatchLoader, _: Path | None) -> None:
    for optimizer, lr, step_lr in [
        ("sgd", 0.015, 0.0015),
        ("sgd", 0.015, 0.015),
        ("sgd", 0.03, 0.003),
        ("adamw", 1e-3, 5e-4),
        ("adamw", 2e-3, 1e-3),
    ]:
        train = some(data, 30_016, 64)
        qmodel = prepared(model, train, "mse", "mse", True)
        decay = 1e-4 if optimizer == "adamw" else CONFIG.weight_decay
        config = replace(CONFIG, optimizer=optimizer, lr=lr, step_lr=step_lr, weight_decay=decay, compile="on")
        epoch = fit(qmodel, train, val, config).history[0]
        print(f"| {optimizer} | {lr} | {step_lr} | {epoch.train.accuracy:.1%} | {epoch.val_accuracy:.1%} |", flush=True)


def lambdas(model, data: Dataset, val: BatchLoader, weights: Path | None) -> None:
    assert weights is not None, "--weights: the best.pth of a run with LSQ alone"
    for weight, act in [(0, 0), (1, 0), (0.1, 0), (0, 1), (0, 0.1), (0, 0.01)]:
        train = some(data, 50 * 128, 128)
        qmodel = brfx.prepare_qat(model, PAPER)
        qmodel.load_state_dict(read_state_dict(weights))
        penalty = brfx.BinPenalty(qmodel, weight, act) if weight or act else None
        epoch = fit(qmodel, train, val, replace(CONFIG, lr=0.02, step_lr=0.002), penalty=penalty).history[0]
        with torch.no_grad():
            after = brfx.BinPenalty(qmodel.eval())(next(iter(val))[0])[1]
        print(f"| {weight} | {act} | {epoch.train.loss:.3f} | {after.weight:.3f} | {after.act:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["start", "rate", "steps", "lambda"])
    parser.add_argument("--ckpt", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", type=Path)
    given = parser.parse_args()
    model = brfx.build_model("resnet20", 10)
    load_float(model, given.ckpt)
    data = load_dataset(given.data, data_dir=Path(), preprocessing=Preprocessing(32))
    val = BatchLoader(data.val, data.preprocessing, 500)
    {"start": start, "rate": rate, "steps": steps, "lambda": lambdas}[given.what](model, data, val, given.weights)


if __name__ == "__main__":
    main()
