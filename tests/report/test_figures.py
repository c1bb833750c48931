import warnings
from dataclasses import replace

import pytest

from brfx.report.figures import figures, headline, levels_of
from brfx.report.run_files import read_run_files
from brfx.report.style import INK, VARIABLES, figure_style, inline_svg

pytest.importorskip("matplotlib", reason="figures need matplotlib, the extra 'report'")


def drawn(runs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return {name: figure for name, _, figure in figures(runs)}


def lines(figure):
    """Each line of the figure's only panel, by its label."""
    (axes,) = figure.axes
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}


def test_a_run_has_a_figure_of_everything_that_it_kept(finished):
    run = read_run_files(finished)
    found = drawn([run])
    assert list(found) == [
        *("metric", "loss", "term-weight", "rate", "weights-distance", "weights-mse", "weights-closed"),
        *("weights-flips", "steps-weights", "histograms-weights", "over-time-weights"),
        *("steps-activations", "histograms-activations", "over-time-activations"),
    ]
    curves = lines(found["metric"])
    assert curves["validation"] == ([1, 2, 3, 4], [100 * line["val_accuracy"] for line in run.metrics])
    assert curves["test, FP32 network"][1] == [100 * run.float_test] * 2
    stars = [xy for xy in lines(found["metric"]).values() if xy == ([4], [100 * run.run.test_accuracy])]
    assert len(stars) == 1
    losses = [xy for xy in lines(found["loss"]).values() if len(xy[0]) == 4]
    assert losses == [([1, 2, 3, 4], [line["train"]["loss"] for line in run.metrics])]
    assert any(xy[0] == [1.5, 1.5] for xy in lines(found["loss"]).values())  # the stage boundary
    steps = lines(found["steps-weights"])["fc (last)"]
    first = run.histograms[0]["weights"]["fc"]["step"]
    assert steps == ([0, 1, 2, 3, 4], [line["weights"]["fc"]["step"] / first for line in run.histograms])


def test_histograms_are_densities_against_the_levels(finished):
    run = read_run_files(finished)
    figure = drawn([run])["histograms-weights"]
    assert [axes.get_title("left") for axes in figure.axes] == ["conv1", "conv2", "fc"]
    axes = figure.axes[1]
    for patch, line in zip(axes.patches[1::2], (run.before, run.after), strict=True):
        counts, width = line["weights"]["conv2"]["counts"], line["weights"]["conv2"]["width"]
        total = sum(counts) + line["weights"]["conv2"]["below"] + line["weights"]["conv2"]["above"]
        assert patch.get_data().values == pytest.approx([count / total / width for count in counts])
    assert [line.get_xdata()[0] for line in axes.get_lines()] == [-2, -1, 0, 1]
    assert levels_of(run.after["weights"]["conv2"]) == [-2, -1, 0, 1]


def test_a_peak_that_would_hide_the_rest_is_cut_and_its_share_written(finished):
    run = read_run_files(finished)
    figures_ = run.histograms[-1]["weights"]["conv2"]
    counts = [0] * len(figures_["counts"])
    counts[10:13] = [900, 50, 50]
    after = run.histograms[-1] | {"weights": {"conv2": figures_ | {"counts": counts, "below": 0, "above": 0}}}
    axes = drawn([replace(run, histograms=[after])])["histograms-weights"].axes[0]
    assert axes.get_ylim()[1] < 2 * 0.05 / figures_["width"]
    assert [text.get_text() for text in axes.texts] == ["90 %"]


def test_several_runs_are_laid_over_each_other(finished):
    run = read_run_files(finished)
    other = replace(run, label="other")
    found = drawn([run, other])
    assert {"finished", "other"} <= set(lines(found["metric"]))
    means = lines(found["weights-mse"])["finished"][1]
    assert means[-1] == pytest.approx(sum(layer["mse"] for layer in run.metrics[-1]["weights"].values()) / 3)
    assert {"histograms-weights", "1-histograms-weights", "2-over-time-activations"} <= set(found)
    assert len(found["histograms-weights"].axes[0].patches) == 4
    assert headline([run, other]) is not None


def test_runs_on_different_grids_are_compared_where_they_agree(finished):
    run = read_run_files(finished)
    after = run.histograms[-1]
    coarse = after["weights"] | {"fc": after["weights"]["fc"] | {"levels": [-1, 1, 2]}}
    other = replace(run, label="other", histograms=[after | {"weights": coarse}])
    titles = [axes.get_title("left") for axes in drawn([run, other])["histograms-weights"].axes]
    assert titles == ["conv1", "conv2"]


def test_older_and_unfinished_runs_have_figures_of_what_is_there(older, unfinished):
    old = read_run_files(older)
    assert not [name for name in drawn([old]) if name.startswith(("steps", "histograms", "over-time"))]
    assert headline([old]) is None and headline([old, read_run_files(unfinished)]) is None
    cut_off = read_run_files(unfinished)
    assert "over-time-weights" in drawn([cut_off])
    begun = replace(cut_off, metrics=[], histograms=cut_off.histograms[:1])
    assert list(drawn([begun])) == ["histograms-weights", "histograms-activations"]
    assert headline([begun]) is not None


def test_colours_of_an_inline_figure_are_the_pages(finished):
    with figure_style():
        svg = inline_svg(drawn([read_run_files(finished)])["loss"], "a <loss>")
    assert svg.startswith("<svg ") and svg.endswith("</svg>") and 'aria-label="a &lt;loss&gt;"' in svg
    assert not [colour for colour in VARIABLES if colour in svg] and f"var({VARIABLES[INK]})" in svg
    assert "<style" not in svg and "metadata" not in svg


def test_sensitivities_are_points_and_a_ring_is_where_the_run_is(measured):
    figure = drawn([read_run_files(measured)])["sensitivity-weights"]
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["conv1", "conv2", "fc"]
    points = lines(figure)
    assert points["2 bits"] == ([0.5, 2.0, 0.125], [0, 1, 2])
    assert points["8 bits"] == ([0.0625, 0.0001, 0.0001], [0, 1, 2])  # none is 0 on a logarithmic axis
    rings = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.get_lines() if line.get_markersize() == 8]
    assert rings == [(0.25, 0), (2.0, 1), (0.125, 2)]  # conv1 has 4 bits, the others 2
