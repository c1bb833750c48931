"""A training loop of your own: bin regularization is the wrapper, its output, and one term of the loss."""

import sys
from pathlib import Path

import torch
from torch.nn import functional as F

import brfx
from brfx.data import BatchLoader, load_dataset


def main(epochs: int = 8, compiled: bool = False) -> float:
    torch.manual_seed(0)
    data = load_dataset("digits", data_dir=Path("."))
    train = BatchLoader(data.train, data.preprocessing, 32, augment=True, flip=data.flip, drop_last=True)
    test = BatchLoader(data.test, data.preprocessing, 256)
    net = brfx.build_model("resnet20", num_classes=10)
    brfx.fit(net, train, test, brfx.TrainConfig(epochs=4, lr=0.1))  # an FP32 network; yours comes from a file

    qmodel = brfx.prepare_qat(net, brfx.QATConfig(bits=2), next(iter(train))[0][:2])
    brfx.calibrate(qmodel, [images for images, _ in train][:8], batch_statistics=True)

    model = brfx.BinPenalty(qmodel, weight=0.1, act=0.01)  # wrap this, not qmodel, in DDP
    if compiled:
        model.compile()  # twice as fast from the second batch on, the same numbers
    optimizer = torch.optim.SGD(brfx.parameter_groups(qmodel, lr=0.04, step_lr=0.004), momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(train))
    for epoch in range(1, epochs + 1):
        train.set_epoch(epoch)
        qmodel.train()
        for images, labels in train:
            output, br = model(images)
            loss = F.cross_entropy(output, labels) + br.total
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch}: loss {loss:.3f}, BR_W {br.weight:.4f}, BR_A {br.act:.4f}")

    brfx.snap_biases(qmodel)  # so that an exported file decides what this model does
    accuracy = brfx.evaluate(qmodel, test).accuracy
    print(f"W2A2 test accuracy {accuracy:.2%}")
    return accuracy


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
