"""The settings of a layer are those of a configuration that all its overrides are put into, one after the other."""

from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brfx.config import QATConfig, matches
from brfx.config.layer_settings import LayerSettings
from brfx.errors import ConfigError

CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "bits": st.sampled_from([2, 4, 32]),
        "weight_bits": st.sampled_from([None, 1, 3, 8, 32]),
        "act_bits": st.sampled_from([None, 3, 8, 32]),
        "clip_value": st.sampled_from([None, 6.0]),
        "per_channel": st.booleans(),
        "input_bits": st.sampled_from([4, 8]),
        "residual_bits": st.sampled_from([8, 32]),
        "stream_bits": st.sampled_from([4, 8]),
        "weight_grid": st.sampled_from(["signed", "symmetric"]),
        "weight_quantizer": st.sampled_from(["lsq", "dorefa"]),
        "act_quantizer": st.sampled_from(["lsq", "pact"]),
    },
)
OVERRIDES = st.lists(st.tuples(st.sampled_from(["fc", "f*", "type:Linear", "conv"]), st.none() | CHANGES), max_size=4)


def chained(config, name, kind):
    """A whole configuration for the layer, made and checked anew for each override; ``None``: FP32."""
    base = found = replace(config, overrides=())
    for pattern, changes in config.overrides:
        if not matches(pattern, name, kind):
            continue
        if changes is not None and "bits" in changes:
            changes = {"weight_bits": changes["bits"], "act_bits": changes["bits"]} | changes
        found = None if changes is None else replace(found or base, **changes)
    return found


@settings(max_examples=300, deadline=None, derandomize=True)
@given(CHANGES, st.sampled_from(["deploy", "paper"]), OVERRIDES)
def test_settings_of_a_layer(base, placement, overrides):
    try:
        config = QATConfig(**base, placement=placement, overrides=tuple(overrides))
    except ConfigError:
        return
    try:
        expected = chained(config, "fc", "Linear")
    except ConfigError as error:
        with pytest.raises(ConfigError, match="overrides: ") as refused:
            config.at("fc", "Linear")
        assert str(refused.value).endswith(str(error))
        return
    found = config.at("fc", "Linear")
    assert (found is None) == (expected is None)
    if found is not None:
        same = {field.name for field in fields(LayerSettings)} - {"weight_bits", "act_bits", "symmetric"}
        assert all(getattr(found, name) == getattr(expected, name) for name in same)
        assert (found.weight_bits or 32, found.act_bits or 32) == (expected.weight_bits, expected.act_bits)
        assert found.symmetric == (expected.weight_grid == "symmetric")


@pytest.mark.parametrize(
    ("placement", "bits", "expected"), [("deploy", 2, 2), ("deploy", 32, None), ("paper", 2, None)]
)
def test_operands_inside_a_layer_are_quantized_where_its_inputs_are(placement, bits, expected):
    assert QATConfig(bits=bits, placement=placement).at("fc", "Linear").inner_act_bits == expected


def test_two_overrides_that_contradict_each_other_are_refused():
    config = QATConfig(overrides=(("fc", {"weight_grid": "symmetric"}), ("type:Linear", {"weight_bits": 8})))
    assert config.at("conv", "Conv2d") == QATConfig().at("conv", "Conv2d")
    with pytest.raises(ConfigError, match=r"^overrides: 'type:Linear': weight_grid='symmetric' takes weight_bits 1 to"):
        config.at("fc", "Linear")
