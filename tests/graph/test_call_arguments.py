"""Arguments that may be None, and inputs that may be a dict: a trace takes the branch that the callers take."""

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

import brfx
from brfx.errors import ConfigError
from brfx.graph.call_arguments import CallRecorder
from brfx.graph.trace import trace_islands


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Linear(4, 4)

    def forward(self, x, labels=None, double=False):
        o = self.fc(self.relu(self.conv(x)).mean((2, 3)))
        if double:
            o = o * 2
        return o if labels is None else (F.cross_entropy(o, labels), o)


class Around(nn.Module):
    """Cannot be traced whole."""

    def __init__(self, *settings):
        super().__init__()
        self.inner, self.settings = Optional(), settings

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        outputs = [self.inner(x, **each) for each in self.settings]
        return sum(o if isinstance(o, Tensor) else o[1] + o[0] for o in outputs)


class FromDict(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Optional()

    def forward(self, x):
        if not isinstance(x, torch.Tensor):
            x = x["image"]
        y = self.inner(x)
        return y if torch.is_tensor(y) and isinstance(y, torch.Tensor) else y[0]


LABELS = torch.arange(8) % 4


def same(qmodel, model, *inputs, **more):
    model.eval(), qmodel.eval()
    with brfx.quantization_disabled(qmodel):
        torch.testing.assert_close(qmodel(*inputs, **more), model(*inputs, **more))


def test_an_argument_that_no_caller_gives_is_held_at_none_and_refused_by_name(images):
    model = Optional()
    qmodel = brfx.prepare_qat(model, None, images)
    assert isinstance(qmodel, GraphModule)
    same(qmodel, model, images)
    same(qmodel, model, images, None)
    same(qmodel, model, images, labels=None, double=False)
    with brfx.quantization_disabled(qmodel):
        with pytest.raises(ConfigError, match=r"labels=None and is called with a Tensor.*concrete_args"):
            qmodel(images, LABELS)
        with pytest.raises(ConfigError, match="double=False and is called with True"):
            qmodel(images, double=True)


def test_an_argument_that_callers_give_is_an_input(images):
    model = Optional()
    qmodel = brfx.prepare_qat(model, None, (images, LABELS))
    same(qmodel, model, images, LABELS.flip(0))
    with brfx.quantization_disabled(qmodel), pytest.raises(ConfigError, match="with a labels and is called without"):
        qmodel(images)


def test_without_example_inputs_it_is_held_at_none(images):
    model = Optional()
    qmodel = brfx.prepare_qat(model, concrete_args={"double": True})
    same(qmodel, model, images, double=True)
    with brfx.quantization_disabled(qmodel):
        torch.testing.assert_close(qmodel.eval()(images), model(images, double=True))
    with brfx.quantization_disabled(qmodel), pytest.raises(ConfigError, match="labels=None"):
        qmodel(images, LABELS, True)


@pytest.mark.parametrize("settings", [[{}], [{"labels": None}], [{"labels": LABELS}], [{}, {"labels": LABELS}]])
def test_below_a_model_that_cannot_be_traced(settings, images):
    model = Around(*settings)
    for example in (None, images):
        qmodel = brfx.prepare_qat(model, None, example)
        same(qmodel, model, images)
    assert isinstance(qmodel.inner, GraphModule) == (len(settings) == 1)


def test_a_child_of_whose_calls_nothing_is_known_is_no_island():
    assert list(trace_islands(Around({})).islands) == []


def test_an_input_that_is_a_tensor_or_a_dict(images):
    model = FromDict()
    for example in (images, {"image": images}):
        qmodel = brfx.prepare_qat(model, None, example)
        assert isinstance(qmodel, GraphModule)
        same(qmodel, model, example)


def test_an_input_that_is_asked_for_the_methods_of_a_dict(images):
    class Asks(FromDict):
        def forward(self, x):
            return self.inner(x["image"] if hasattr(x, "keys") else x)

    model = Asks()
    for example in (images, {"image": images}):
        qmodel = brfx.prepare_qat(model, None, example)
        assert isinstance(qmodel, GraphModule)
        same(qmodel, model, example)


def test_a_value_whose_type_a_trace_does_not_know_is_not_guessed(images):
    class Asks(nn.Sequential):
        def forward(self, x):
            half = self[0](x).chunk(2, 1)
            return half[0] if isinstance(half, tuple) else half

    model = Asks(nn.Conv2d(3, 4, 1))
    qmodel = brfx.prepare_qat(model, None, images)
    assert not isinstance(qmodel, GraphModule)
    same(qmodel, model, images)


def test_recorded_calls(images):
    model = Around({}, {"labels": LABELS, "double": True})
    with CallRecorder(model) as recorder:
        model(images)
    kinds = {"x": ["Tensor"], "labels": ["absent", "Tensor"], "double": ["absent", "bool"]}
    assert recorder.calls.arguments == {"": {"x": ["Tensor"]}, "inner": kinds}
    assert recorder.calls.opened == []
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
