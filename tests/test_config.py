import pytest

import brfx
from brfx.config import read_qat_config
from brfx.nn import QuantizedClippedReLU, QuantizedLayer


def bits_of(qmodel) -> dict[str, int]:
    layers = {n: m.weight_quantizer.bits for n, m in qmodel.named_modules() if isinstance(m, QuantizedLayer)}
    return layers | {n: m.bits for n, m in qmodel.named_modules() if isinstance(m, QuantizedClippedReLU)}


def test_bits_fill_what_is_not_given():
    config = brfx.QATConfig(bits=3, act_bits=4)
    assert (config.weight_bits, config.act_bits) == (3, 4)


def test_the_last_override_that_matches_wins_setting_by_setting(tiny):
    overrides = [
        ("conv*", {"bits": 4}),
        ("conv2", {"per_channel": True, "weight_bits": 5}),
        ("type:Linear", {"bits": 8}),
    ]
    qmodel = brfx.prepare_qat(tiny, brfx.QATConfig(bits=2, overrides=overrides))
    found = bits_of(qmodel)
    assert (found["conv1"], found["conv2"], found["fc"], found["relu6"]) == (4, 5, 8, 2)
    assert qmodel.conv2.weight_quantizer.step.shape == (6, 1, 1, 1)
    assert qmodel.conv1.weight_quantizer.step.shape == ()


def test_none_leaves_a_layer_in_fp32_and_a_later_pattern_takes_it_back(tiny):
    qmodel = brfx.prepare_qat(tiny, brfx.QATConfig(overrides=[("*", None), ("conv1", {})]))
    assert bits_of(qmodel) == {"conv1": 2}


def test_sites_of_relus_have_names_too(tiny):
    config = brfx.QATConfig(overrides=[("relu6", {"act_bits": 7}), ("type:ReLU", {"clip_value": 3.0})])
    qmodel = brfx.prepare_qat(tiny, config)
    assert qmodel.relu6.bits == 7 and qmodel.relu6.clip_value == 6.0
    assert qmodel.relu.clip_value == 3.0


def test_first_and_last_at_8_bits(tiny):
    qmodel = brfx.prepare_qat(tiny, brfx.QATConfig(first_last_8bit=True, overrides=[("fc", {"bits": 6})]))
    found = bits_of(qmodel)
    assert (found["conv1"], found["conv2"], found["fc"]) == (8, 2, 6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([("conv9", {"bits": 4})], "'conv9' matches no layer; near it: conv"),
        ([("type:Conv3d", None)], "'type:Conv3d' matches no layer"),
        ([("conv1", {"bits": 11})], "'conv1'.*weight_bits=11|'conv1'.*bits=11"),
        ([("conv1", {"tooth": 1})], "sets 'tooth'; it can set"),
    ],
)
def test_wrong_overrides_are_named(tiny, overrides, message):
    with pytest.raises(brfx.BrfxError, match=message):
        brfx.prepare_qat(tiny, brfx.QATConfig(overrides=overrides))


def test_overrides_are_saved_with_the_model(tiny, images, tmp_path):
    config = brfx.QATConfig(overrides=[("conv1", {"bits": 4}), ("fc", None)])
    qmodel = brfx.prepare_qat(tiny, config)
    brfx.calibrate(qmodel, [images])
    brfx.save(qmodel, tmp_path / "model.pt")
    assert bits_of(brfx.load(tmp_path / "model.pt", model=type(tiny)())) == bits_of(qmodel)


def test_toml_says_the_same(tmp_path):
    path = tmp_path / "qat.toml"
    path.write_text(
        'act_bits = 4\n[[overrides]]\nmatch = "conv1"\nbits = 8\n[[overrides]]\nmatch = "fc"\nfp32 = true\n'
    )
    config = brfx.QATConfig(**read_qat_config(path))
    assert config == brfx.QATConfig(act_bits=4, overrides=[("conv1", {"bits": 8}), ("fc", None)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bits = ", "cannot read it as TOML"),
        ("tooth = 1", "no setting is called 'tooth'"),
        ("overrides = 3", "tables with a match"),
        ("[[overrides]]\nbits = 3", "tables with a match"),
    ],
)
def test_wrong_toml(tmp_path, text, message):
    path = tmp_path / "qat.toml"
    path.write_text(text)
    with pytest.raises(brfx.BrfxError, match=message):
        read_qat_config(path)
    with pytest.raises(brfx.BrfxError, match="cannot read"):
        read_qat_config(tmp_path / "absent.toml")
