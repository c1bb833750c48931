"""Names to patterns and back: a pattern stands for exactly the names that went in."""

import re
from itertools import product

from brfx_cli.folding import broken, fold, grouped, that_fit
from hypothesis import given
from hypothesis import strategies as st


def counted(names):
    return [(pattern, len(places)) for pattern, places in fold(names)]


def expanded(pattern):
    """The names that a pattern stands for, as a shell would write them."""

    def values(part):
        for each in part.split(","):
            first, _, last = each.partition("..")
            yield from map(str, range(int(first), int(last) + 1)) if last else [first]

    parts = re.split(r"\{(.*?)\}", pattern)
    return {"".join(found) for found in product(*(values(p) if i % 2 else [p] for i, p in enumerate(parts)))}


def test_repeated_blocks_become_one_pattern():
    convs = [f"layer1.{block}.conv{conv}" for block, conv in product((0, 1), (1, 2))]
    assert counted(convs) == [("layer1.{0,1}.conv{1,2}", 4)]
    assert counted(["conv1", "fc"]) == [("conv1", 1), ("fc", 1)]
    assert counted([f"h.{i}.attn" for i in range(12)]) == [("h.{0..11}.attn", 12)]
    assert counted(["h.0.a", "h.2.a", "h.3.a", "h.4.a", "h.7.a"]) == [("h.{0,2..4,7}.a", 5)]
    assert counted([]) == []


def test_a_pattern_stands_for_no_name_that_was_not_there():
    assert fold(["a1.conv2", "a2.conv1", "a2.conv2"]) == [("a{1,2}.conv2", [0, 2]), ("a2.conv1", [1])]
    assert counted(["a.01", "a.02", "a.03", "a.4"]) == [("a.{01,02,03,4}", 4)]
    assert counted(["relu", "relu_1", "relu_2"]) == [("relu", 1), ("relu_{1,2}", 2)]
    assert counted(["x.1", "x.1"]) == [("x.1", 2)]


names = st.builds(lambda a, b, c: f"l{a}.{b}.c{c}", *[st.integers(0, 4)] * 3) | st.sampled_from(["fc", "x.0", "x.1"])


@given(st.lists(names, unique=True))
def test_every_name_is_in_one_pattern(found):
    patterns = fold(found)
    assert sorted(place for _, places in patterns for place in places) == list(range(len(found)))
    for pattern, places in patterns:
        assert expanded(pattern) == {found[place] for place in places}


def test_rows_share_a_line_if_all_else_is_equal():
    rows = [("conv1", 8), ("b.0.conv", 2), ("b.1.conv", 2), ("b.2.conv", 4), ("fc", 8)]
    assert grouped(rows) == [("conv1", [0]), ("b.{0,1}.conv x2", [1, 2]), ("b.2.conv", [3]), ("fc", [4])]


def test_columns_are_taken_in_order_while_they_fit():
    assert that_fit([10, 5, 5, 3], [0, 1, 2, 3], 22) == [0, 1, 3]  # 10 + 2 + 5 + 2 + 3
    assert that_fit([10, 5, 5], [0, 2, 1], 17) == [0, 2]
    assert that_fit([50, 5], [0, 1], 20) == [0]


def test_a_long_name_goes_on_in_the_next_line_whole():
    assert broken("conv1", 20) == "conv1"
    assert broken("roi_heads.box_predictor.bbox_pred.input", 24) == "roi_heads.box_predictor.\n  bbox_pred.input"
    for name in ("a" * 50, "sweep/lr0.1/seed0/again", "x.{0..11}.attention.self x12"):
        lines = broken(name, 12).split("\n")
        assert all(len(line) <= 12 for line in lines)
        assert "".join(line.strip() for line in lines).replace(" ", "") == name.replace(" ", "")
