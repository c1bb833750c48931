"""Lines that name the task's metric."""

from brfx_cli import render

from brfx.train import EpochMetrics, Evaluation, Means, Score


def test_an_epochs_line_names_the_metric_and_leaves_out_what_is_not_counted():
    def line(means, value, metric):
        return render.epoch_line(EpochMetrics(2, "penalty", 0.5, means, 1.5, value, 1.0, 64.0, metric=metric), 3)

    start, end = "Epoch 2/3 [BR] (LR=0.5): Loss=1.23, ", "1.0 s (64 images/s)"
    means = Means(1.23456, 0.25, {"weight": 0.5})
    assert line(means, 0.5, "accuracy") == f"{start}Train Acc=25.00%, Val Acc=50.00%, BR_W=0.5, {end}"
    assert line(Means(1.23456, None), 0.5, "mIoU") == f"{start}Val mIoU=50.00%, {end}"
    assert line(Means(1.23456, None), None, "mAP50") == f"{start}Val mAP50=-, {end}"


def test_what_was_measured_is_said_with_its_name():
    assert render.evaluation(Evaluation(3, 4, 0.5)) == "75.00 % (3 of 4)"
    assert render.evaluation(Score(0.5, "mIoU", 4, 1.0)) == "50.00 % mIoU (4 images)"
