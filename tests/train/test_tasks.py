"""Any task: nested batches, one's own loss and metric, and a classifier that trains as it always did."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign

import brfx
from brfx.data import BatchLoader
from brfx.train import Callback, Task, classification, detection, fit, segmentation
from brfx.train.tasks import count_samples, divergence, pair, positional, to_device

from .helpers import small_net


class TwoInputs(nn.Module):
    """A map and a mask in, a map and a number out."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, image, mask, scale=1.0):
        x = self.second(self.first(image) * mask) * scale
        return {"map": x, "mean": x.mean((1, 2, 3))}


def two_inputs():
    torch.manual_seed(0)
    return TwoInputs()


def samples(count=4, batch=8):
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        image = torch.randn(batch, 3, 8, 8, generator=generator)
        mask = (torch.rand(batch, 1, 8, 8, generator=generator) > 0.3).float()
        found.append({"mask": mask, "image": image, "goal": [image[:, :2] * mask, image.mean((1, 2, 3))], "id": "a"})
    return found


def split(batch):
    return {"mask": batch["mask"], "image": batch["image"]}, batch["goal"]


def squares(output, targets):
    return F.mse_loss(output["map"], targets[0]) + F.mse_loss(output["mean"], targets[1])


def closeness(model, data):
    assert not model.training and not torch.is_grad_enabled()
    values = [squares(model(**inputs), targets) for inputs, targets in map(split, data)]
    return -float(torch.stack(values).mean())


def rewritten():
    model = two_inputs()
    batch = samples(1)[0]
    qmodel = brfx.prepare_qat(model, brfx.QATConfig(bits=4), (batch["image"], batch["mask"]))
    brfx.calibrate(qmodel, samples(2), forward=lambda gm, batch: gm(batch["image"], batch["mask"]))
    return qmodel


own = {"loss": squares, "metric": closeness, "split": split}


@pytest.mark.parametrize("compile", ["off", "kernels", "on"])
def test_a_batch_of_any_structure_trains_with_a_penalty_and_the_metric_chooses(tmp_path, compile):
    torch._dynamo.reset()
    qmodel = rewritten()
    settings = {"keep": "best", "reestimate_bn": 2, "ema": 0.5, "step_lr": 0.001}
    config = brfx.TrainConfig(epochs=4, warmup_epochs=1, compile=compile, **settings)
    data = [*samples(), *samples(1, batch=3)]  # the last one is smaller
    result = fit(qmodel, data, samples(2), config, **own, penalty=brfx.BinPenalty(qmodel, 0.01, 0.01), run_dir=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    values = [line["val_closeness"] for line in lines]
    assert result.metric == "closeness" and result.val_metric == max(values[1:]) < 0 and result.val_accuracy is None
    assert values[-1] > -0.7 > values[0] and not any(name.startswith("val_acc") for name in lines[0])
    assert [line["train"]["accuracy"] for line in lines] == [None] * 4 and set(lines[3]["train"]["terms"]) == {
        "weight", "act",
    }  # fmt: skip
    assert closeness_of(qmodel) == pytest.approx(result.val_metric, rel=1e-5)
    best = torch.load(tmp_path / "best.pth", weights_only=True)
    assert best["metrics"]["val_closeness"] == result.val_metric


def closeness_of(model):
    with torch.no_grad():
        return closeness(model.eval(), samples(2))


class Cut(Callback):
    def on_epoch(self, metrics):
        if metrics.epoch == 2:
            raise KeyboardInterrupt


def test_a_run_of_ones_own_task_goes_on_bit_for_bit(tmp_path):
    config = brfx.TrainConfig(epochs=3, warmup_epochs=1, compile="off", step_lr=0.001)
    whole, cut = rewritten(), rewritten()
    fit(whole, samples(), samples(2), config, **own, penalty=brfx.BinPenalty(whole))
    with pytest.raises(KeyboardInterrupt):
        settings = {"penalty": brfx.BinPenalty(cut), "run_dir": tmp_path, "callbacks": [Cut()]}
        fit(cut, samples(), samples(2), config, **own, **settings)
    again = rewritten()
    settings = {"penalty": brfx.BinPenalty(again), "run_dir": tmp_path, "resume": True}
    with pytest.raises(brfx.BrfxError, match="begun with metric='closeness', now it is 'accuracy'"):
        fit(again, samples(), samples(2), config, **settings)
    result = fit(again, samples(), samples(2), config, **own, **settings)
    assert [metrics.metric for metrics in result.history] == ["closeness"] * 3
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())


def test_what_is_not_finite_is_named_at_any_depth():
    for place, message in (
        (lambda batch: batch["image"], r"epoch 1, batch 3: input \[0\] 5 of the batch"),
        (lambda batch: batch["goal"][1].view(-1, 1), r"epoch 1, batch 3: target \[1\] 5 of the batch"),
    ):
        data = samples()
        place(data[2])[5, 0] = torch.nan
        with pytest.raises(brfx.BrfxError, match=message):
            fit(two_inputs(), data, None, brfx.TrainConfig(epochs=1, compile="off"), loss=squares, split=split)
    model = two_inputs()
    model.second.register_forward_hook(lambda module, inputs, output: output / 0)
    with pytest.raises(brfx.BrfxError, match="the output of second is not finite"):
        fit(model, samples(), None, brfx.TrainConfig(epochs=1, compile="off"), loss=squares, split=split)


class Right:
    """A metric of torchmetrics' kind."""

    def __init__(self):
        self.right = self.count = 7  # of another use, which reset ends

    def reset(self):
        self.right = self.count = 0

    def update(self, logits, labels):
        self.right, self.count = self.right + int((logits.argmax(1) == labels).sum()), self.count + len(labels)

    def compute(self):
        return torch.tensor(self.right / self.count)


def loaders(digits):
    train = BatchLoader(digits.train, digits.preprocessing, 64, augment=True, flip=False, drop_last=True)
    return train, BatchLoader(digits.val, digits.preprocessing, 256)


def test_a_classifier_by_parts_is_the_built_in_one_bit_for_bit(digits):
    config = brfx.TrainConfig(epochs=2, compile="off", label_smoothing=0.1)
    default, by_parts = small_net(), small_net()
    metric = Right()
    first = fit(default, *loaders(digits), config)
    second = fit(by_parts, *loaders(digits), config, loss=F.cross_entropy, metric=metric)
    assert all(torch.equal(value, by_parts.state_dict()[name]) for name, value in default.state_dict().items())
    for built_in, mine in zip(first.history, second.history, strict=True):
        assert mine.metric == "Right" and mine.val_metric == pytest.approx(built_in.val_accuracy)
        assert mine.train.loss == built_in.train.loss and mine.train.accuracy is None
    assert metric.count == 7  # the user's own object is as it was


def test_a_classifier_trains_as_before_tasks_came(digits):
    """The losses that brfx had on these digits when it could train nothing else."""
    qmodel = brfx.prepare_qat(small_net(), brfx.QATConfig(bits=2), torch.zeros(2, 3, 16, 16))
    train, val = loaders(digits)
    brfx.calibrate(qmodel, [next(iter(train))], batch_statistics=True)
    config = brfx.TrainConfig(epochs=2, warmup_epochs=1, compile="off", label_smoothing=0.1)
    result = fit(qmodel, train, val, config, penalty=brfx.BinPenalty(qmodel, 0.1, 0.01))
    assert [metrics.train.loss for metrics in result.history] == pytest.approx(LOSSES, rel=1e-3)
    assert list(result.history[0].as_dict()) == [
        "epoch", "stage", "lr", "train", "val_loss", "val_accuracy", "seconds", "images_per_second", "weights",
    ]  # fmt: skip
    assert list(result.history[0].as_dict()["train"]) == ["loss", "accuracy", "terms"]


LOSSES = [2.2582420349121093, 2.18756103515625]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": squares, "task": classification()}, "task= has its own loss: give task= or loss="),
        ({"loss": squares, "split": split}, r"loss= is your own, so say how val_data is measured: metric="),
        ({"loss": squares, "metric": closeness}, r"a batch is a dict of 4, no pair .*say how it is split with split="),
        (own | {"split": lambda b: ({"x": b["image"]}, 0)}, r"inputs are 'x', the model's forward takes image, mask"),
        (own | {"loss": lambda out, goal: out["mean"]}, r"the loss is a Tensor of shape \(8,\): it takes one number"),
        (own | {"loss": lambda out, goal: 1.0}, r"the loss is a float: it takes one number"),
        (own | {"metric": lambda *_: torch.zeros(2)}, "metric gave a Tensor: a metric takes one number"),
        (own | {"metric": lambda *_: torch.nan}, "metric is nan, by which no epoch can be compared"),
    ],
)
def test_mistakes_are_said_in_one_line(settings, message):
    with pytest.raises(brfx.BrfxError, match=message) as caught:
        fit(two_inputs(), samples(1), samples(1), brfx.TrainConfig(epochs=1, compile="off"), **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("setting", ["label_smoothing", "distill"])
def test_what_the_task_cannot_do_is_refused(setting):
    config, teacher = brfx.TrainConfig(epochs=1, **{setting: 0.5}), two_inputs() if setting == "distill" else None
    with pytest.raises(brfx.BrfxError, match=f"^{setting}=0.5: "):
        fit(two_inputs(), samples(1), None, config, loss=squares, split=split, teacher=teacher)


def test_a_task_of_ones_own_distills_its_outputs():
    """One step of SGD on the mixture of both losses, by hand and by fit."""
    task = Task(
        loss=squares, evaluate=None, metric="m", split=split, size=count_samples,
        distance=lambda output, soft, temperature: F.mse_loss(output["map"], soft["map"]) / temperature,
    )  # fmt: skip
    config = brfx.TrainConfig(
        epochs=1, lr_warmup=0, momentum=0, weight_decay=0, compile="off", distill=0.25, temperature=2.0
    )
    teacher, trained, plain = two_inputs().eval(), two_inputs(), two_inputs().train()
    teacher.second.weight.data.mul_(2)
    batch = samples(1)[0]
    fit(trained, [batch], None, config, task=task, teacher=teacher)
    inputs, targets = split(batch)
    output, soft = plain(**inputs), teacher(**inputs)
    loss = 0.75 * squares(output, targets) + 0.25 * 4 * F.mse_loss(output["map"], soft["map"].detach()) / 2
    loss.backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(trained.get_parameter(name), parameter - config.lr * parameter.grad, msg=name)


def test_inputs_by_name_go_where_the_model_takes_them():
    batch = samples(1)[0]
    inputs, _ = split(batch)
    image, mask, scale = positional(two_inputs(), inputs)
    assert image is batch["image"] and mask is batch["mask"] and scale == 1.0
    assert positional(nn.Identity(), image) is image
    assert len(positional(two_inputs(), (image, mask))) == 2  # not the defaults of what is not given
    with pytest.raises(brfx.BrfxError, match=r"inputs are 2 in a tuple, the model's forward takes input .*\(inputs,\)"):
        positional(nn.Identity(), (image, mask))


def test_parts_of_a_batch():
    nested = {"x": [torch.zeros(2, 3, 4, 4), (torch.ones(2), "name", None)]}
    there = to_device(nested, "cpu", torch.channels_last)
    assert there["x"][0].is_contiguous(memory_format=torch.channels_last) and there["x"][1][1:] == ("name", None)
    assert [count_samples(value) for value in (torch.zeros(5, 2), [1, 2, 3], nested)] == [5, 3, 2]
    assert pair([1, 2]) == (1, 2)
    logits, soft = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    flat = [value.movedim(1, -1).reshape(-1, 3) for value in (logits, soft)]
    torch.testing.assert_close(divergence(logits, soft, 2.0), divergence(*flat, 2.0))


@pytest.fixture
def masks():
    pytest.importorskip("torchmetrics", reason="mIoU is measured by torchmetrics")
    masks = torch.randint(0, 3, (4, 6, 6), generator=torch.Generator().manual_seed(0))
    masks[:, :2] = 255
    return masks


def test_a_segmenters_loss_leaves_out_what_is_of_no_class_and_counts_the_auxiliary_head(masks):
    task, (out, aux) = segmentation(4), torch.randn(2, 4, 4, 6, 6)
    flat = masks != 255

    def expected(logits):
        return F.cross_entropy(logits.movedim(1, -1)[flat], masks[flat], label_smoothing=0.1)

    torch.testing.assert_close(task.loss(out, masks, label_smoothing=0.1), expected(out))
    both = task.loss({"out": out, "aux": aux}, masks, label_smoothing=0.1)
    torch.testing.assert_close(both, expected(out) + 0.5 * expected(aux))
    assert float(task.loss(out, torch.full_like(masks, 255))) == 0
    right = (out.argmax(1) == masks).float()
    torch.testing.assert_close(task.correct({"out": out}, masks), right[:, 2:].mean((1, 2)).sum())
    torch.testing.assert_close(task.distance({"out": out}, {"out": aux}, 2.0), divergence(out, aux, 2.0))


def test_miou_is_the_mean_over_the_classes_that_are_there(masks):
    answers = torch.randint(0, 3, (4, 6, 6), generator=torch.Generator().manual_seed(1))  # class 3 is nowhere
    model = nn.Conv2d(4, 4, 1, bias=False)
    model.weight.data.copy_(torch.eye(4)[..., None, None])
    data = [(F.one_hot(a[None], 4).movedim(-1, 1).float(), m[None]) for a, m in zip(answers, masks, strict=True)]
    score = brfx.evaluate(model.train(), data, segmentation(4))
    there = masks != 255
    ious = [((answers == k) & (masks == k)).sum() / (((answers == k) | (masks == k)) & there).sum() for k in range(3)]
    assert (score.metric, score.count) == ("mIoU", 4) and model.training
    assert score.value == pytest.approx(float(torch.stack(ious).mean()), abs=1e-6)


def test_a_segmenter_trains_with_a_penalty_and_distillation(masks):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
            self.head, self.aux = nn.Conv2d(8, 3, 1), nn.Conv2d(8, 3, 1)

        def forward(self, x):
            x = self.body(x)
            return {"out": self.head(x), "aux": self.aux(x)}

    torch.manual_seed(0)
    net = Net()
    images = F.one_hot(masks.clamp(max=2), 3).movedim(-1, 1).float()
    qmodel = brfx.prepare_qat(net, brfx.QATConfig(bits=4), images)
    brfx.calibrate(qmodel, [images])
    config = brfx.TrainConfig(epochs=30, warmup_epochs=20, lr=0.1, compile="off", distill=0.1, precision="bf16")
    data = [(images, masks)]
    settings = {"task": segmentation(3), "teacher": net, "penalty": brfx.BinPenalty(qmodel, 0.001, 0.001)}
    result = fit(qmodel, data, data, config, **settings)
    assert result.metric == "mIoU" and result.val_metric > 0.9 > result.history[0].val_metric
    assert result.history[-1].train.accuracy > 0.9 and result.history[-1].val_loss < result.history[0].val_loss


@pytest.fixture
def boxes():
    """Two batches of images with a white square each, in its box."""
    pytest.importorskip("torchmetrics", reason="mAP50 is measured by torchmetrics")
    pytest.importorskip("pycocotools", reason="mAP50 is measured with pycocotools")
    generator, batches = torch.Generator().manual_seed(0), []
    for _ in range(2):
        images, targets = [], []
        for height, width in ((48, 64), (64, 56)):
            x, y = (int(torch.randint(4, 20, (), generator=generator)) for _ in range(2))
            image = torch.rand(3, height, width, generator=generator) / 4
            image[:, y : y + 24, x : x + 24] = 1
            images.append(image)
            targets.append({"boxes": torch.tensor([[x, y, x + 24.0, y + 24.0]]), "labels": torch.tensor([1])})
        batches.append((images, targets))
    return batches


class Told(nn.Module):
    """A detector that says in eval mode what it was told, of the ``good`` ones exactly."""

    def __init__(self, told, good):
        super().__init__()
        self.told, self.good, self.weight = iter(told), iter(good), nn.Parameter(torch.zeros(()))

    def forward(self, images, targets=None):
        found = []
        for _ in images:
            box = next(self.told)["boxes"]
            box = box if next(self.good) else box + 20
            found.append({"boxes": box, "labels": torch.tensor([1]), "scores": torch.tensor([0.9])})
        return found


def test_map50_is_the_precision_of_what_overlaps_by_half(boxes):
    targets = [target for _, batch in boxes for target in batch]
    score = brfx.evaluate(Told(targets, [True] * 4), boxes, detection())
    assert (score.value, score.metric, score.count) == (pytest.approx(1.0), "mAP50", 4)
    assert score.further == {"mAP": pytest.approx(1.0)}
    assert brfx.evaluate(Told(targets, [False] * 4), boxes, detection()).value == 0
    near = [{"boxes": target["boxes"] + torch.tensor([0.0, 0.0, 8.0, 0.0])} for target in targets]  # 24 of 32 wide
    score = brfx.evaluate(Told(near, [True] * 4), boxes, detection())
    assert (score.value, score.further["mAP"]) == (pytest.approx(1.0), pytest.approx(0.6))  # 0.5 to 0.75 of 0.5 to 0.95
    crowds = [(images, [{**of, "iscrowd": torch.tensor([i])} for i, of in enumerate(batch)]) for images, batch in boxes]
    inside = [
        {"boxes": of["boxes"] - i * torch.tensor([0.0, 0.0, 16.0, 0.0])}
        for i, of in zip([0, 1] * 2, targets, strict=True)
    ]
    assert brfx.evaluate(Told(inside, [True] * 4), boxes, detection()).value < 1  # a third of its box
    assert brfx.evaluate(Told(inside, [True] * 4), crowds, detection()).value == pytest.approx(1.0)  # in a crowd
    none = [([torch.zeros(3, 8, 8)], [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}])]
    with pytest.raises(brfx.BrfxError, match="mAP50 needs a box"):
        brfx.evaluate(Told(targets, [True]), none, detection())


def small_detector():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
    body.out_channels = 8
    anchors = AnchorGenerator(((24,),), ((1.0,),))
    pool, head = MultiScaleRoIAlign(["0"], 3, 2), TwoMLPHead(8 * 3 * 3, 16)
    return FasterRCNN(
        body, rpn_anchor_generator=anchors, box_roi_pool=pool, box_head=head,
        box_predictor=FastRCNNPredictor(16, 2), min_size=64, max_size=64,
    )  # fmt: skip


def test_torchvisions_detector_trains_with_a_penalty_and_goes_on_bit_for_bit(boxes, tmp_path):
    model = small_detector()

    def quantized():
        qmodel = brfx.prepare_qat(model, brfx.QATConfig(bits=4))
        brfx.calibrate(qmodel, [(boxes[0][0],)], batch_statistics=True)
        return qmodel

    config = brfx.TrainConfig(epochs=3, warmup_epochs=1, lr=0.001, compile="on", keep="best")
    whole, cut, again = quantized(), quantized(), quantized()
    result = fit(whole, boxes, boxes, config, task=detection(), penalty=brfx.BinPenalty(whole, 0.1, 0.001))
    assert (result.metric, result.compiled) == ("mAP50", "none") and 0 <= result.val_metric <= 1
    assert result.history[1].train.terms["weight"] > 0 and result.history[1].val_loss is None
    settings = {"task": detection(), "run_dir": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        fit(cut, boxes, boxes, config, penalty=brfx.BinPenalty(cut, 0.1, 0.001), callbacks=[Cut()], **settings)
    fit(again, boxes, boxes, config, penalty=brfx.BinPenalty(again, 0.1, 0.001), resume=True, **settings)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())


def test_a_model_that_gives_no_losses_is_no_detector(boxes):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, images, targets=None):
            return [self.weight]

    with pytest.raises(brfx.BrfxError, match="gives a dict of losses in training, this model a list"):
        fit(Net(), boxes, None, brfx.TrainConfig(epochs=1), task=detection())
