"""Tables as they are printed: whole names at 80 columns, sums that add up, and data for programs."""

import csv
import io
import json
from datetime import datetime
from pathlib import Path

import pytest
from brfx_cli import tables
from rich.console import Console

from brfx.analysis.audit import Audit, LayerAudit
from brfx.jobs.runs import Run


def printed(show, *arguments, width=80, **options):
    console = Console(file=io.StringIO(), width=width, highlight=False, soft_wrap=True)
    show(console, *arguments, **options)
    lines = console.file.getvalue().splitlines()
    assert options.get("form") == "wide" or all(len(line.rstrip()) <= width for line in lines)
    assert not any("\u2026" in line for line in lines)
    return [line.rstrip() for line in lines]


def conv(name, step=float("nan"), **settings):
    defaults = {"weight_bits": 2, "act_bits": 2, "signed": True, "parameters": 100, "macs": 1000}
    given = {**defaults, "quantized_macs": 1000, "regularized": True, **settings}
    return LayerAudit(name, "QuantizedConv2d", step=step, **given)


def act(name, step=float("nan"), **settings):
    return LayerAudit(name, "QuantizedClippedReLU", act_bits=2, signed=False, step=step, regularized=True, **settings)


def report(*layers, never=()):
    sums = sum(layer.macs for layer in layers), sum(layer.quantized_macs for layer in layers)
    return Audit(layers, *sums, (), never)


BLOCKS = [conv(f"layer1.{block}.conv{number}") for block in (0, 1) for number in (1, 2)]


def test_repeated_blocks_are_a_line_with_their_sums():
    header, blocks, total, footer = printed(tables.audit, report(*BLOCKS))
    assert header.split() == ["layer", "type", "W", "A", "params", "MACs"]
    assert blocks.split() == ["layer1.{0,1}.conv{1,2}", "x4", "Conv2d", "2", "2", "400", "4.00", "k"]
    assert total.split() == ["total", "400", "4.00", "k"]
    assert footer == "100.0 % of 4.00 k MACs quantized; left: nothing"


def test_steps_are_shown_where_there_are_some():
    assert "step" not in printed(tables.audit, report(conv("a"), act("r")))[0]
    lines = printed(tables.audit, report(conv("a.0", 0.125), conv("a.1", 0.5), act("r", 0.25)))
    assert "0.125..0.5" in lines[1] and lines[5].split() == ["r", "2", "unsigned", "0.25", "ReLU"]
    assert " step " not in printed(tables.audit, report(conv("a"), act("r")), form="wide")[0]


def test_a_layer_in_fp32_is_in_the_table_and_has_its_reason_below():
    fc = conv("fc", macs=1, quantized_macs=0, weight_bits=None, act_bits=None, reason="left operand is x")
    lines = printed(tables.audit, report(*BLOCKS, fc))
    assert lines[0].split()[-1] == "quantized" and lines[2].split()[1:4] == ["Conv2d", "32", "32"]
    assert lines[2].endswith(" 0.0 %") and lines[3].endswith(" 99.9 %")
    assert lines[4] == "in FP32: fc: left operand is x"
    assert lines[5] == "99.9 % of 4.00 k MACs quantized; left: fc"


def test_bin_regularizers_have_a_column_where_there_are_any():
    assert "BR" not in printed(tables.audit, report(*BLOCKS))[0]
    lines = printed(tables.audit, report(*BLOCKS, conv("x", regularized=False)), regularized=True)
    assert lines[0].endswith("BR") and lines[1].endswith("on") and not lines[2].endswith("on")


def test_long_names_and_reasons_are_whole_on_a_narrow_screen():
    name, why = "roi_heads.box_predictor.bbox_pred.input_quantizer", "called by Python code; sign from calibration"
    lines = printed(tables.audit, report(conv(name), act(name, reason=why), never=("a.0", "a.1")))
    text = "".join(line for line in lines)
    assert "roi_heads.box_predictor." in text and "bbox_pred.input_quantizer" in text
    assert "never reached by the example: a.{0,1}" in lines
    whole = printed(tables.audit, report(conv(name), act(name, reason=why)), form="wide")
    assert any(name in line and why in line for line in whole)


def test_the_forms_for_programs_have_every_layer(capsys):
    tables.audit(Console(), report(*BLOCKS, act("r", 0.25)), "json")
    found = json.loads(capsys.readouterr().out)
    assert (found["parameters"], found["macs"], found["quantized_macs"], found["never_hit"]) == (400, 4000, 4000, [])
    assert [row["step"] for row in found["layers"]] == [None] * 4 + [0.25]
    tables.audit(Console(), report(*BLOCKS, act("r", 0.25)), "csv")
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["name"] for row in rows] == [layer.name for layer in BLOCKS] + ["r"]
    assert (rows[0]["macs"], rows[0]["step"], rows[4]["step"]) == ("1000", "", "0.25")


def run(name, **settings):
    defaults = {"model": "resnet20", "weight_bits": 2, "act_bits": 2, "epochs": 9, "epochs_done": 9, "lr": 0.1}
    given = {**defaults, "seed": 0, "lambda_br": 0.0, "lambda_br_act": 0.0, "test_accuracy": 0.5, **settings}
    return Run(path=Path(name), name=name, state="complete", changed=datetime(2026, 1, 2), **given)


def test_what_all_runs_share_is_said_once_and_nothing_is_said_of_no_regularizer():
    common, header, *rows = printed(tables.runs, [run("a", seed=1), run("b", seed=2)], width=120)
    assert common == "all: model resnet20, lr 0.1, state complete"
    assert header.split() == ["run", "bits", "epochs", "seed", "val", "test", "changed"]
    assert [row.split()[:5] for row in rows] == [[n, "W2A2", "9/9", s, "-"] for n, s in (("a", "1"), ("b", "2"))]
    assert printed(tables.runs, [run("a")], width=120)[0].split()[:3] == ["run", "model", "bits"]  # nothing is shared
    header = printed(tables.runs, [run("a", lambda_br=0.1), run("b")])[1]
    assert "BR_W" in header and "BR_A" not in header


def test_columns_that_have_no_room_are_named():
    found = [run(f"sweep/lr{i}/seed{i}/a-long-name", model=f"model{i}", lr=i, seed=i, lambda_br=i) for i in (1, 2)]
    *_, last = printed(tables.runs, found, width=60)
    assert last.startswith("no room for ") and last.endswith(": --wide shows all")
    whole = printed(tables.runs, found, form="wide", width=60)
    assert "sweep/lr1/seed1/a-long-name" in whole[1] and whole[0].split()[:4] == ["run", "model", "bits", "epochs"]


@pytest.mark.parametrize("form", ["folded", "wide"])
def test_a_runs_name_does_not_steer_the_terminal(form):
    lines = printed(tables.runs, [run("[red]a\x1b[2J\nb")], form=form)
    assert any("[red]a?[2J?b" in line for line in lines)


def test_runs_for_programs(capsys):
    tables.runs(Console(), [run("a")], "json")
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["name"], found["test_accuracy"], found["changed"]) == ("a", 0.5, "2026-01-02 00:00:00")
    tables.runs(Console(), [run("a"), run("b")], "csv")
    assert len(capsys.readouterr().out.splitlines()) == 3
