"""What classes count in the loss: exact, and the same for several batches an update as for one."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import brfx
from brfx.config import JobConfig
from brfx.data import Dataset, Preprocessing, Split
from brfx.errors import ConfigError, DataError
from brfx.jobs.tasks import class_weights
from brfx.train import classification, fit, segmentation


def test_the_loss_is_a_mean_over_the_samples_of_weighted_cross_entropies():
    logits, labels = torch.randn(6, 3), torch.tensor([0, 0, 0, 1, 2, 2])
    weights = torch.tensor([0.5, 2.0, 0.0])
    each = F.cross_entropy(logits, labels, reduction="none")
    loss = classification(weights.tolist()).loss
    torch.testing.assert_close(loss(logits, labels), (weights[labels] * each).sum() / 6)
    shares = F.one_hot(labels, 3).float()
    torch.testing.assert_close(loss(logits, shares), loss(logits, labels))
    assert classification().correct(logits, shares) == classification().correct(logits, labels)


def test_masks_too():
    pytest.importorskip("torchmetrics", reason="mIoU is measured by torchmetrics")
    logits, masks = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    masks[0, 0] = 255
    weights = torch.tensor([0.5, 2.0, 1.0])
    each = F.cross_entropy(logits, masks, reduction="none", ignore_index=255)[masks != 255]
    expected = (weights[masks[masks != 255]] * each).mean()
    torch.testing.assert_close(segmentation(3, class_weights=weights.tolist()).loss(logits, masks), expected)


def test_batches_together_are_the_batch_of_all_their_images():
    images, labels = torch.randn(32, 3, 2, 2).double(), torch.randint(0, 4, (32,))

    def trained(size, accumulate):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).double()
        data = list(zip(images.split(size), labels.split(size), strict=True))
        config = brfx.TrainConfig(epochs=2, lr=0.1, compile="off", accumulate=accumulate)
        fit(model, data, None, config, task=classification([0.1, 1.0, 4.0, 2.0]))
        return model[1].weight

    torch.testing.assert_close(trained(16, 1), trained(4, 4), rtol=1e-6, atol=1e-9)


def dataset(labels, classes):
    split = Split(torch.zeros(len(labels), 3, 2, 2, dtype=torch.uint8), labels)
    names = tuple("abcdef"[:classes])
    return Dataset("mine", names, Preprocessing(2), lambda part: split, flip=True, val_fraction=0.0, seed=0)


def test_balanced_weights_and_given_ones_have_a_mean_of_1_over_the_images():
    data = dataset(torch.tensor([0] * 6 + [1] * 2), 2)

    def of(text, data=data):
        return class_weights(JobConfig(command="train", model="resnet20", class_weights=text), data)

    assert of(None) is None
    assert of("balanced") == pytest.approx((8 / 12, 8 / 4))
    assert of("1,3") == pytest.approx((8 / 12, 2.0)) == of("10,30")
    masks = torch.zeros(2, 2, 2, dtype=torch.uint8)
    masks[0, 0, 0], masks[1] = 1, 255
    assert of("balanced", dataset(masks, 2)) == pytest.approx((4 / 6, 2.0))
    with pytest.raises(DataError, match="--class-weights has 3 numbers, mine has 2 classes"):
        of("1,2,3")
    with pytest.raises(DataError, match="--class-weights 0,0,1: no training image of mine would count"):
        of("0,0,1", dataset(torch.tensor([0, 0, 1, 1]), 3))
    for text in ("equal", "1,-2", "", "0,0", "1,nan", "1,inf"):
        with pytest.raises(ConfigError, match=r"class_weights='.*': takes balanced, or a number a class"):
            of(text)
