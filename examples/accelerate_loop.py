"""Bin regularization inside Hugging Face Accelerate: prepare the penalty, and call it instead of the network."""

import sys
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import brfx
from brfx.data import load_dataset


def main(
    epochs: int = 6, float_epochs: int = 3, batches: int | None = None
) -> tuple[nn.Module, list[dict[str, float]]]:
    """The trained network, and the means of each epoch; ``batches`` cuts the epochs of QAT short."""
    torch.manual_seed(0)
    data = load_dataset("digits", data_dir=Path("."))
    train, test = (
        DataLoader(TensorDataset(data.preprocessing.normalize(split.images), split.labels), 32, shuffle=True)
        for split in (data.train, data.test)
    )
    net = brfx.build_model("resnet20", num_classes=10)
    brfx.fit(net, train, test, brfx.TrainConfig(epochs=float_epochs, lr=0.1))  # yours comes from a file

    qmodel = brfx.prepare_qat(net, brfx.QATConfig(bits=2))
    brfx.calibrate(qmodel, [images for images, _ in train][:8], batch_statistics=True)

    accelerator = Accelerator()
    penalty = brfx.BinPenalty(qmodel, weight=0.1, act=0.01)
    optimizer = torch.optim.SGD(brfx.parameter_groups(qmodel, lr=0.04, step_lr=0.004), momentum=0.9)
    penalty, optimizer, loader = accelerator.prepare(penalty, optimizer, train)  # the penalty, not qmodel

    warmup, history = epochs // 3, []
    for epoch in range(epochs):
        if epoch == warmup:
            accelerator.unwrap_model(penalty).begin()  # the warm-up is over; freezes the steps that were to be frozen
        penalty.train()
        numbers = []
        for images, labels in islice(loader, batches):
            output, br = penalty(images)  # output is what the network gives
            loss = F.cross_entropy(output, labels)
            accelerator.backward(loss + br.total if epoch >= warmup else loss)
            optimizer.step()
            optimizer.zero_grad()
            numbers.append(torch.stack([loss.detach(), br.weight, br.act]))
        history.append(dict(zip(("loss", "BR_W", "BR_A"), torch.stack(numbers).mean(0).tolist(), strict=True)))
        accelerator.print(f"epoch {epoch + 1}:", ", ".join(f"{k} {v:.4f}" for k, v in history[-1].items()))

    qmodel = accelerator.unwrap_model(penalty).model
    accelerator.print(f"W2A2 test accuracy {brfx.evaluate(qmodel, test).accuracy:.2%}")
    return qmodel, history


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
