import itertools
import random

import pytest
import torch
from torch import nn

import brfx
from brfx.analysis.sensitivity import LayerSensitivity
from brfx.bit_budget import Choice, knapsack, mean_bits
from brfx.errors import ConfigError
from brfx.export.packed_reader import read_packed


def brute_force(layers, budget):
    affordable = [chosen for chosen in itertools.product(*layers) if sum(choice.cost for choice in chosen) <= budget]
    return min((sum(choice.loss for choice in chosen), sum(choice.cost for choice in chosen)) for chosen in affordable)


@pytest.mark.parametrize("seed", range(60))
def test_the_knapsack_is_that_of_brute_force(seed):
    """Losses are sums of powers of two, so that they are equal to the last digit whatever the order."""
    draw = random.Random(seed)
    layers = [
        [
            Choice(bits, draw.randint(0, 20) if seed % 3 else bits * 7, draw.choice([-1, 0, 1, 2, 5, 9]) / 4)
            for bits in draw.sample((2, 3, 4, 8), draw.randint(1, 4))
        ]
        for _ in range(draw.randint(1, 6))
    ]
    least = sum(min(choice.cost for choice in choices) for choices in layers)
    assert knapsack(layers, least - 1) is None
    for budget in (least, least + 3, least + draw.randint(0, 60), 10_000):
        chosen = knapsack(layers, budget)
        assert all(choice in choices for choice, choices in zip(chosen, layers, strict=True))
        found = sum(choice.loss for choice in chosen), sum(choice.cost for choice in chosen)
        assert found == brute_force(layers, budget)


def test_the_knapsack_of_a_large_network_is_as_good_as_its_linear_relaxation_says_it_can_be():
    draw = random.Random(0)
    layers = []
    for _ in range(120):
        count, scale = draw.randint(100, 2_000_000), 10 ** draw.uniform(-4, 0)
        layers.append([Choice(bits, bits * count, scale * 4.0**-bits) for bits in (2, 3, 4, 8)])
    budget = int(2.5 * sum(choices[0].cost / 2 for choices in layers))
    chosen = knapsack(layers, budget)
    assert sum(choice.cost for choice in chosen) <= budget
    # The steepest steps first, and of the first that does not fit a fraction, is the relaxation: nothing whole can be
    # below it. Without the fraction it is whole.
    spent, relaxed = sum(choices[0].cost for choices in layers), sum(choices[0].loss for choices in layers)
    steps = sorted(
        ((b.loss - a.loss) / (b.cost - a.cost), b.cost - a.cost)
        for choices in layers
        for a, b in itertools.pairwise(choices)
    )
    whole = relaxed
    for slope, cost in steps:
        taken = min(cost, budget - spent)
        spent, relaxed = spent + taken, relaxed + slope * taken
        if taken < cost:
            break
        whole = relaxed
    assert relaxed <= sum(choice.loss for choice in chosen) <= whole


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.body = nn.Conv2d(8, 15, 3)
        self.fc = nn.Linear(15, 5)

    def forward(self, x):
        x = torch.relu(self.depthwise(torch.relu(self.stem(x))))
        return self.fc(torch.relu(self.body(x)).mean((2, 3)))


COUNTS = {"stem": 216, "depthwise": 72, "body": 1080, "fc": 75}


def prepared(example, **settings):
    torch.manual_seed(0)
    return brfx.prepare_qat(Net(), brfx.QATConfig(**settings), example)


def losses(of=lambda name, bits: COUNTS[name] * 4.0**-bits):
    return [
        LayerSensitivity(name, "weights", 2, count, {bits: of(name, bits) for bits in (2, 3, 4, 8)})
        for name, count in COUNTS.items()
    ]


def bits_of(overrides):
    return {name: settings["weight_bits"] for name, settings in overrides}


def test_a_mean_of_bits_is_kept_and_a_layer_that_needs_bits_gets_them(images):
    qmodel = prepared(images)
    needy = losses(lambda name, bits: (1000 if name == "depthwise" else 1) * 4.0**-bits)
    chosen = brfx.assign_bits(qmodel, needy, mean_bits=2.5)
    assert bits_of(chosen)["depthwise"] == 8
    assert mean_bits(prepared(images, overrides=chosen)) <= 2.5
    assert bits_of(brfx.assign_bits(qmodel, needy, mean_bits=2)) == dict.fromkeys(COUNTS, 2)
    assert bits_of(brfx.assign_bits(qmodel, needy, mean_bits=8)) == dict.fromkeys(COUNTS, 8)


@pytest.mark.parametrize("grid", ["signed", "symmetric"])
def test_a_size_is_that_of_the_weights_in_the_exported_files(images, tmp_path, grid):
    onnx = pytest.importorskip("onnx")
    qmodel = prepared(images, weight_grid=grid)
    settings = {"weight_grid": "signed"} if grid == "symmetric" else {}
    wanted = {"stem": 8, "depthwise": 8, "body": 2, "fc": 4}
    size = 216 + 72 + 270 + 38
    chosen = brfx.assign_bits(qmodel, losses(lambda name, bits: float(bits < wanted[name])), size=size)
    assert bits_of(chosen) == wanted
    assert dict(chosen)["stem"] == {"weight_bits": 8, **settings}
    with pytest.raises(ConfigError, match=r"^360 bytes are too few: the weights take 361$"):
        brfx.assign_bits(qmodel, losses(), size=360)

    small = prepared(images, weight_grid=grid, overrides=chosen)
    brfx.calibrate(small, [images])
    assert brfx.weight_bytes(small) == size
    brfx.export_packed(small, tmp_path / "net.safetensors")
    packed = read_packed(tmp_path / "net.safetensors")
    weights = [
        node["attributes"]["weight"]["tensor"] for node in packed.header["nodes"] if "weight" in node["attributes"]
    ]
    from safetensors import safe_open

    with safe_open(tmp_path / "net.safetensors", "np") as file:
        assert sum(file.get_tensor(name).nbytes for name in weights) == size
    brfx.export_onnx(small, tmp_path / "net.onnx", images)
    proto = onnx.load(tmp_path / "net.onnx")
    stored = {26: 2, 22: 4, 3: 8}
    found = [value for value in proto.graph.initializer if value.data_type in stored and sum(value.dims) > 1]
    assert sum(len(value.raw_data) for value in found) == size


def test_bits_that_the_configuration_names_are_kept_and_paid_for(images):
    fixed = {"overrides": (("stem", {"bits": 8}), ("type:Linear", None), ("body", {"act_bits": 4}))}
    qmodel = prepared(images, **fixed)
    size = 216 + 72 + 270 + 4 * 75
    chosen = brfx.assign_bits(qmodel, losses(), size=size)
    assert chosen[-3:] == qmodel.meta["brfx"].config.overrides
    assert bits_of(chosen[:-3]) == {"depthwise": 8, "body": 2}
    small = prepared(images, overrides=chosen)
    brfx.calibrate(small, [images])
    assert brfx.weight_bytes(small) == size
    with pytest.raises(ConfigError, match=r"take 804, 300 of them for weights in FP32"):
        brfx.assign_bits(qmodel, losses(), size=100)
    ends = prepared(images, first_last_8bit=True)
    assert set(bits_of(brfx.assign_bits(ends, losses(), mean_bits=5)[:-2])) == {"depthwise", "body"}


def test_attention_has_a_size_too(images):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 8)
    qmodel = brfx.prepare_qat(model, brfx.QATConfig(bits=4), x)
    measured = brfx.sensitivity(qmodel, [x], distance=lambda output, reference: (output - reference).square().mean())
    chosen = brfx.assign_bits(qmodel, measured, size=8 * 8 * 3 + 8 * 8 + 2 * 8 * 16 - 32)
    small = brfx.prepare_qat(model, brfx.QATConfig(bits=4, overrides=chosen), x)
    brfx.calibrate(small, [x])
    assert brfx.weight_bytes(small) <= 8 * 8 * 4 + 2 * 8 * 16 - 32
    assert set(bits_of(chosen)) == {"self_attn", "linear1", "linear2"}


def test_the_three_input_projections_of_an_attention_are_packed_each_for_itself():
    """Nine weights of 2 bits take three bytes, 27 would take seven."""
    x = torch.randn(2, 5, 3)
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(3, 1, 4, dropout=0.0, batch_first=True)
    qmodel = brfx.prepare_qat(model, brfx.QATConfig(bits=2), x)
    brfx.calibrate(qmodel, [x])
    measured = [LayerSensitivity(name, "weights", 2, 1, {2: 0.0}) for name in ("self_attn", "linear1", "linear2")]
    assert brfx.weight_bytes(qmodel) == 4 * 3 + 2 * 3
    with pytest.raises(ConfigError, match="the weights take 18"):
        brfx.assign_bits(qmodel, measured, size=17)


class Functional(Net):
    def forward(self, x):
        return nn.functional.linear(x.flatten(1), self.body.weight.flatten()[: 5 * x[0].numel()].reshape(5, -1))


def test_budgets_that_cannot_be_are_refused(images):
    qmodel = prepared(images)
    for given in ({}, {"mean_bits": 3, "size": 100}):
        with pytest.raises(ConfigError, match="one budget, mean_bits= or size="):
            brfx.assign_bits(qmodel, losses(), **given)
    with pytest.raises(ConfigError, match=r"^1\.9 bits a weight are too few: widths and overrides take 2$"):
        brfx.assign_bits(qmodel, losses(), mean_bits=1.9)
    with pytest.raises(ConfigError, match="fc: its sensitivity is missing"):
        brfx.assign_bits(qmodel, losses()[:-1], mean_bits=3)
    small = torch.randn(2, 3, 2, 2)
    functional = brfx.prepare_qat(Functional(), brfx.QATConfig(bits=4), small)
    with pytest.raises(ConfigError, match="this weight belongs to a function"):
        brfx.assign_bits(functional, [], mean_bits=3)
