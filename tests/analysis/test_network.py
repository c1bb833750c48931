import torch
from torch import nn
from torch.nn import functional as F

import brfx
from brfx.analysis.audit import Audit, LayerAudit
from brfx.analysis.network import network
from brfx.graph.trace import trace


def rewritten(model, images, **config):
    qmodel = brfx.prepare_qat(model, brfx.QATConfig(**config))
    return qmodel, brfx.audit(qmodel, images)


def lines(places):
    """A line a place: name, role, bits."""
    return [
        " ".join(str(part) for part in (place.name, place.role, place.weight_bits, place.act_bits) if part is not None)
        for place in places
    ]


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

    def forward(self, x):
        x = F.relu(self.first(x))
        x = F.relu(self.second(x) + x)
        return self.fc(x.mean((2, 3)))


def test_a_network_before_and_after(images):
    before = network(trace(Small()))
    assert lines(before) == [
        *("x input", "first layer", "relu other", "second layer", "add add", "relu other"),
        *("mean other", "fc layer", "output output"),
    ]
    assert {place.quantized for place in before} == {None}
    after = network(*rewritten(Small(), images, bits=2))
    assert lines(after) == [
        *(
            "x input",
            "first_input quantizer 8",
            "first layer 2 8",
            "relu quantizer 8",
            "second_input_observer observer",
        ),
        *("second_input quantizer 2", "second layer 2 2", "add add", "relu#2 quantizer 8", "mean other"),
        *("fc_input quantizer 8", "fc layer 2 8", "output output"),
    ]
    by_name = {place.name: place for place in after}
    assert [by_name["relu"].relu, by_name["second_input"].relu] == [True, False]
    assert all(place.quantized for place in after if place.role == "layer")
    assert by_name["second"].macs == 8 * 8 * 8 * 16
    ids = {place.id for place in after}
    assert len(ids) == len(after) and all(set(place.inputs) <= ids for place in after)
    sources = {after[index].name: [p.name for p in after if p.id in after[index].inputs] for index in range(len(after))}
    assert sources["add"] == ["relu", "second"] and sources["second_input"] == ["second_input_observer"]


def test_what_stays_in_floating_point_says_why(images):
    after = network(*rewritten(Small(), images, bits=2, placement="paper"))
    layers = {place.name: place for place in after if place.role == "layer"}
    assert [layers[name].quantized for name in ("first", "second", "fc")] == [False, True, False]
    assert (layers["first"].weight_bits, layers["first"].act_bits) == (2, None)
    assert "placement 'paper'" in layers["first"].reason and not layers["second"].reason


def test_a_module_of_several_products_is_quantized_if_all_are():
    rows = (
        LayerAudit("fc", "linear", weight_bits=2, act_bits=4, macs=5, quantized_macs=5),
        LayerAudit("fc.inside", "matmul", act_bits=8, macs=7, quantized_macs=0, reason="why"),
    )
    places = network(trace(Small()), Audit(rows, 12, 5, (), ()))
    layer = next(place for place in places if place.name == "fc")
    assert (layer.weight_bits, layer.act_bits, layer.quantized, layer.macs) == (2, 8, False, 12)
    assert layer.reason == "why"


def test_a_product_of_activations_is_a_layer_of_its_function(images):
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            x = self.conv(x).flatten(2)
            return x @ x.transpose(1, 2)

    after = network(*rewritten(Product(), images, bits=4))
    product = next(place for place in after if place.role == "layer" and place.kind == "function")
    assert (product.weight_bits, product.act_bits, product.quantized) == (None, 4, True)


def test_between_islands_there_is_what_the_audit_saw(images):
    class Unequal(nn.Module):
        """Python decides, so that no graph can be traced of the whole."""

        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            x = self.body(x)
            if x.sum() > 1e9:
                x = -x
            return self.fc(x.mean((2, 3)))

    qmodel, audit = rewritten(Unequal(), images, bits=2)
    places = network(qmodel, audit)
    layers = [place for place in places if place.role == "layer"]
    assert [place.name for place in layers] == ["body.0", "body.2", "fc"]
    assert layers[-1].inputs == () and layers[-1].weight_bits == 2
    assert sum(place.macs for place in layers) == audit.macs


def test_a_branch_of_training_alone_is_not_there(images):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.extra = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            x = self.conv(x)
            return self.extra(x) if self.training else x.relu()

    qmodel, audit = rewritten(Branching(), images, bits=2)
    names = [place.name for place in network(qmodel, audit)]
    assert "conv" in names and "extra" not in names
    torch.testing.assert_close(audit.macs, 8 * 64 * 12)
