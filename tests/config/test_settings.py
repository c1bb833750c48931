import re
from datetime import date
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import brfx
from brfx.config import JobConfig, QATConfig, TrainConfig, code_file
from brfx.errors import ConfigError
from brfx.nn import QuantizedClippedReLU, QuantizedLayer, StreamQuantizer
from brfx.quant.grid import Grid


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
    relus = [module for module in qmodel.modules() if isinstance(module, QuantizedClippedReLU)]
    assert len(relus) > 2 and all(relu.clip_value == 3.0 for relu in relus if relu is not qmodel.relu6)


def test_stream_bits_and_weight_grid(tiny):
    qmodel = brfx.prepare_qat(tiny, brfx.QATConfig(stream_bits=5, weight_grid="symmetric"))
    assert [module.bits for module in qmodel.modules() if isinstance(module, StreamQuantizer)] == [5]
    assert qmodel.conv1.weight_quantizer.grid == Grid(2, True, symmetric=True)
    mixed = brfx.QATConfig(weight_grid="symmetric", overrides=[("fc", {"weight_grid": "signed", "bits": 8})])
    assert brfx.prepare_qat(tiny, mixed).fc.weight_quantizer.grid == Grid(8, True)
    ends = brfx.prepare_qat(tiny, brfx.QATConfig(weight_grid="symmetric", first_last_8bit=True))
    assert ends.fc.weight_quantizer.grid == Grid(8, True) and ends.conv2.weight_quantizer.grid.symmetric


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stream_bits": 0}, "stream_bits=0: takes 1 to 8"),
        ({"stream_bits": 32}, "stream_bits=32: takes 1 to 8"),
        ({"weight_grid": "even"}, "weight_grid='even': takes 'signed' or 'symmetric'"),
        ({"weight_grid": "symmetric", "bits": 5}, "weight_bits 1 to 4, got 5: set weight_grid='signed'"),
        ({"weight_grid": "symmetric", "overrides": [("fc", {"bits": 8})]}, "'fc': weight_grid='symmetric'"),
    ],
)
def test_streams_and_grids_that_there_are_none(settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        brfx.QATConfig(**settings)


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


@pytest.mark.parametrize(
    ("kind", "name", "value", "message"),
    [
        (QATConfig, "bits", "two", "bits='two': takes a whole number"),
        (QATConfig, "weight_bits", 2.0, "weight_bits=2.0: takes a whole number, or None"),
        (QATConfig, "act_bits", True, "act_bits=True: takes a whole number, or None"),
        (QATConfig, "per_channel", 3, "per_channel=3: takes true or false"),
        (QATConfig, "clip_value", "6", "clip_value='6': takes a number, or None"),
        (QATConfig, "placement", ["deploy"], "placement=['deploy']: takes a string"),
        (QATConfig, "skip", "conv1", "skip='conv1': takes a list of strings"),
        (QATConfig, "overrides", {"fc": None}, "overrides={'fc': None}: takes a list of (pattern, settings or None)"),
        (QATConfig, "overrides", [("fc", 8)], "overrides=[('fc', 8)]: takes a list of (pattern, settings or None)"),
        (QATConfig, "overrides", [("fc", {"bits": "two"})], "overrides: 'fc': bits='two': takes a whole number"),
        (QATConfig, "overrides", [("fc", {1: 2})], "overrides: 'fc' sets 1; it can set act_bits, "),
        (TrainConfig, "epochs", "3", "epochs='3': takes a whole number"),
        (TrainConfig, "lr", "fast", "lr='fast': takes a number"),
        (TrainConfig, "device", 0, "device=0: takes a string"),
        (TrainConfig, "channels_last", 1, "channels_last=1: takes true or false"),
        (JobConfig, "command", None, "command=None: takes a string"),
        (JobConfig, "data_dir", "data", "data_dir='data': takes a pathlib.Path"),
        (JobConfig, "data_dir", Path("~nobody-of-this-name/x"), "no such user's home"),
        (JobConfig, "mean", (0.5, 0.5), "mean=(0.5, 0.5): takes one number or three, or None"),
        (JobConfig, "qat", {}, "qat={}: takes a QATConfig"),
        (JobConfig, "batch_size", 1.5, "batch_size=1.5: takes a whole number"),
    ],
)
def test_wrong_types_are_named(kind, name, value, message):
    with pytest.raises(ConfigError) as caught:
        kind(**{"command": "train"} | {name: value} if kind is JobConfig else {name: value})
    assert message in str(caught.value)


def test_what_is_too_long_for_a_message_is_cut():
    with pytest.raises(ConfigError, match=r"^bits=\(int too long to show\): takes 1 to 8"):
        QATConfig(bits=1 << 20_000)
    with pytest.raises(ConfigError, match=r"^placement='x{199} \.\.\.: takes 'deploy' or"):
        QATConfig(placement="x" * 1000)


def test_types_that_mean_the_same_are_taken():
    assert QATConfig(clip_value=6, skip=["fc"]) == QATConfig(clip_value=6.0, skip=("fc",))
    assert JobConfig(command="train", mean=[0, 0.5, 1]).mean == (0, 0.5, 1)
    assert all(TrainConfig(epochs=n).warmup_epochs == int(0.3 * n) for n in range(500))


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5)
ANYTHING = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(LEAVES, inner, max_size=3), max_leaves=5
)
PLAUSIBLE = st.sampled_from(
    [1, 2, 8, 32, 0.5, True, None, "deploy", "sgd", "fc", date(2024, 1, 1), Path("x"), (0.5, 0.5, 0.5), ["fc"], 10**400]
)


def table_of(config):
    """Up to three fields, each with its value there or another one."""
    one = st.sampled_from(list(vars(config).items()))
    field = one.flatmap(lambda pair: st.tuples(st.just(pair[0]), st.just(pair[1]) | PLAUSIBLE | ANYTHING))
    return st.lists(field, max_size=3).map(dict)


QAT, TRAIN, JOB = QATConfig(), TrainConfig(), JobConfig(command="train")
PATTERNS = st.text("[]*?!-fc:", max_size=4)
OVERRIDES = st.lists(st.tuples(PATTERNS, st.none() | table_of(QAT)) | ANYTHING, max_size=2)


def make(kind, table):
    """The settings, or ``None`` where an error of one line says why there are none."""
    try:
        return kind(**table)
    except ConfigError as error:
        assert "\n" not in str(error)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(table_of(QAT), st.none() | OVERRIDES)
def test_any_table_is_a_config_or_a_config_error(table, overrides):
    config = make(QATConfig, table if overrides is None else table | {"overrides": overrides})
    if config is not None:
        assert {config.bits, config.weight_bits, config.act_bits} <= {*range(1, 9), 32}
        config.at("fc", "Linear")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(table_of(TRAIN), table_of(JOB))
def test_any_settings_of_training_are_taken_or_a_config_error(train, job):
    make(TrainConfig, train)
    make(JobConfig, {"command": "train"} | job)


def test_lambdas_that_are_not_given_are_those_of_the_form():
    found = [JobConfig(command="quantize", br_form=form) for form in ("mean", "per_value")]
    assert [(job.lambda_br, job.lambda_br_act) for job in found] == [(0.1, 0.01), (0.001, 0.0)]
    given = JobConfig(command="quantize", br_form="per_value", lambda_br=0.0, lambda_br_act=1e-5)
    assert (given.lambda_br, given.lambda_br_act) == (0.0, 1e-5)
    with pytest.raises(ConfigError, match="br_form='sum': takes mean or per_value"):
        JobConfig(command="quantize", br_form="sum")
    with pytest.raises(ConfigError, match="dead_filters='cut': takes keep or revive or ignore"):
        JobConfig(command="quantize", dead_filters="cut")
    with pytest.raises(ConfigError, match="--br-form per_value trains no step"):
        JobConfig(command="quantize", br_form="per_value", br_backprop_to_alpha_act=True)


def test_a_models_file_may_stand_on_a_drive():
    assert code_file("mine.py:make") == ("mine.py", "make")
    assert code_file("C:\\models\\mine.py:make") == ("C:\\models\\mine.py", "make")
    assert code_file("D:/mine.py") == ("D:/mine.py", "")
    assert code_file("resnet20") is code_file("my.python") is code_file("") is None
