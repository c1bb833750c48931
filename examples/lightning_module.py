"""Bin regularization inside PyTorch Lightning: the penalty is the module's model, and three lines are its."""

import sys
from pathlib import Path

import lightning
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import brfx
from brfx.data import load_dataset


class QuantizedClassifier(lightning.LightningModule):
    def __init__(self, qmodel: nn.Module, warmup_epochs: int) -> None:
        super().__init__()
        self.penalty = brfx.BinPenalty(qmodel, weight=0.1, act=0.01)
        self.warmup_epochs = warmup_epochs
        self.history: list[dict[str, float]] = []

    def on_train_epoch_start(self) -> None:
        if self.current_epoch >= self.warmup_epochs:
            self.penalty.begin()  # 1: the warm-up is over; freezes the steps that were to be frozen

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        images, labels = batch
        output, br = self.penalty(images)  # 2: output is what the network gives
        loss = F.cross_entropy(output, labels)
        self.log_dict({"loss": loss, "BR_W": br.weight, "BR_A": br.act}, on_step=False, on_epoch=True)
        return loss + br.total if self.current_epoch >= self.warmup_epochs else loss  # 3

    def on_train_epoch_end(self) -> None:
        self.history.append({name: value.item() for name, value in self.trainer.callback_metrics.items()})
        print(f"epoch {len(self.history)}:", ", ".join(f"{k} {v:.4f}" for k, v in self.history[-1].items()))

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[dict[str, object]]]:
        optimizer = torch.optim.SGD(brfx.parameter_groups(self, lr=0.04, step_lr=0.004), momentum=0.9)
        batches = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, batches)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


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
    qmodel.train()  # Lightning leaves modules in the mode they are in
    module = QuantizedClassifier(qmodel, warmup_epochs=epochs // 3)
    trainer = lightning.Trainer(
        max_epochs=epochs, limit_train_batches=batches, logger=False, enable_checkpointing=False
    )
    trainer.fit(module, train)

    print(f"W2A2 test accuracy {brfx.evaluate(qmodel, test).accuracy:.2%}")
    return qmodel, module.history


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
