import re
import xml.etree.ElementTree as ET

from brfx.report.network_svg import BITS, FLOAT, network_svg, rows_of


def place(id, role="other", inputs=(), **more):
    defaults = {"name": id, "kind": "Kind", "weight_bits": None, "act_bits": None, "quantized": None, "macs": 0}
    return defaults | {"id": id, "role": role, "inputs": list(inputs), "reason": "", "relu": False} | more


#: A residual block: a layer whose value is read twice, and one in floating point.
BLOCK = [
    place("x", "input"),
    place("a", "quantizer", ["x"], act_bits=8, reason="input may be negative"),
    place("first", "layer", ["a"], weight_bits=2, act_bits=8, quantized=True, macs=1000),
    place("relu", "quantizer", ["first"], act_bits=2, relu=True),
    place("seen", "observer", ["relu"]),
    place("second", "layer", ["seen"], weight_bits=2, quantized=False, reason="left operand is <what> gives"),
    place("sum", "add", ["relu", "second"]),
    place("1", "other", ["sum"], name="tail.1", kind="BatchNorm2d"),
    place("product", "layer", ["1"], act_bits=4, quantized=True, kind="function", name="matmul"),
    place("output", "output", ["product"]),
]


def texts(svg):
    return [node.text for node in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_rows_begin_at_layers_and_where_values_meet():
    rows = rows_of(BLOCK)
    assert [[part["id"] for part in row.places] for row in rows] == [
        ["x", "a", "first", "relu"],
        ["seen", "second"],
        ["sum", "1", "product", "output"],
    ]
    assert [row.sources for row in rows] == [set(), {0}, {0, 1}]


def test_a_second_layer_begins_a_row_and_so_does_one_too_many():
    chain = [place("a", "layer"), place("b", "layer", ["a"]), place("c", "layer", ["b"])]
    assert [len(row.places) for row in rows_of(chain)] == [1, 1, 1]
    long = [place("x" * 30 + "0", "input")]
    for number in range(1, 9):
        long.append(place("x" * 30 + str(number), "other", [long[-1]["id"]]))
    rows = rows_of(long)
    assert len(rows) > 2 and sum(len(row.places) for row in rows) == 9


def test_bits_are_colours_and_floating_point_is_red_with_its_reason():
    svg = network_svg({"W2A2": BLOCK}, "a <network>")
    root = ET.fromstring(svg)
    assert root.get("aria-label") == "a <network>"
    said = texts(svg)
    assert said[:6] == ["W2A2", "x", "A8", "first W2 A8", "ReLU A2", "second W2 A32"]
    assert "left operand is <what> gives" in said and "BatchNorm2d" in said and "matmul A4" in said
    legend = ["2 bits", "4 bits", "8 bits", "floating point, with the reason", "quantizer"]
    assert said[-6:] == [*legend, "observer (bin regularization sees it)"]
    for box, colour in (("first W2 A8", BITS[1]), ("second W2 A32", FLOAT), ("A8", BITS[7]), ("matmul A4", BITS[3])):
        group = svg[: svg.index(f">{box}<")]
        assert group.rindex(f'fill="{colour}"') > group.rindex("<g>")
    assert "1,000 multiply-accumulates" in svg and "input may be negative" in svg
    assert svg.count('class="observer"') == 2  # one in the graph, one in the legend


def test_values_that_skip_rows_go_down_lanes_that_do_not_cross():
    """A dense block: each value is read by all that follow it."""
    dense = [place("v0", "input")]
    for number in range(1, 6):
        dense.append(place(f"v{number}", "layer", [part["id"] for part in dense]))
    svg = network_svg({"": dense}, "dense")
    bends = re.findall(r"C([\d.]+) [\d.]+ [\d.]+ [\d.]+ [\d.]+ ([\d.]+)V([\d.]+)", svg)
    assert len(bends) == 4 + 3 + 2 + 1
    lanes = {}
    for lane, start, _ in bends:
        lanes.setdefault(lane, set()).add(start)
    assert len(lanes) == 4 and all(len(starts) == 1 for starts in lanes.values())


def test_panels_stand_side_by_side():
    svg = network_svg({"before": BLOCK[:3], "after": BLOCK}, "both")
    heads = [float(x) for x in re.findall(r'class="head" x="([\d.]+)"', svg)]
    assert len(heads) == 2 and heads[1] > heads[0] + 150
    assert float(ET.fromstring(svg).get("width")) > heads[1] + 300
