"""Rewritten models are of the user's class, and objects like any other: copied, pickled, saved."""

import copy
import io
import multiprocessing
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

import brfx
from brfx.errors import CheckpointError, ConfigError, NotCalibratedError
from brfx.nn import LSQQuantizer, QuantizedConv2d


class Own(nn.Conv2d):
    """A layer class of the user's own."""


def scores(q, k):
    return q @ k.transpose(-1, -2) if q.shape[0] else q


class Attends(nn.Module):
    """A method and a function that multiply, in a forward that cannot be traced."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def attend(self, x):
        return x @ x.transpose(-1, -2)

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return self.attend(self.fc(x)) + scores(x, self.fc(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(Own(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1))
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(6, 4)

    @property
    def num_classes(self):
        return self.fc.out_features

    def extract(self, x):
        return self.features(x)

    def forward(self, x):
        x = self.extract(x)
        return self.fc(self.drop(x).mean((2, 3)))


@pytest.fixture
def qnet(images):
    torch.manual_seed(0)
    qmodel = brfx.prepare_qat(Net(), brfx.QATConfig(act_bits=4), images)
    brfx.calibrate(qmodel, [images])
    return qmodel.eval()


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(module):
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("again", [saved, pickled, copy.deepcopy, copy.copy])
def test_a_rewritten_model_is_an_object(again, qnet, images):
    other = again(qnet)
    assert type(other).__name__ == "Net" and isinstance(other, Net)
    assert torch.equal(other(images), qnet(images))
    for model in (qnet, other):
        torch.manual_seed(1)
        outputs = model.train()(images)
        model.eval()
    torch.manual_seed(1)
    assert torch.equal(qnet.train()(images), outputs)
    assert [node.meta.get("source_line") for node in other.graph.nodes] == [
        node.meta.get("source_line") for node in qnet.graph.nodes
    ]
    assert brfx.observe(other, images).keys() == brfx.observe(qnet, images).keys()


@pytest.mark.parametrize("again", [saved, pickled, copy.deepcopy])
def test_rewritten_methods_and_functions_are_pickled(again):
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    qmodel = brfx.prepare_qat(Attends(), None, x)
    brfx.calibrate(qmodel, [x])
    other = again(qmodel)
    wanted = qmodel(x)
    assert torch.equal(other(x), wanted)
    assert other.attend.__self__ is other
    for quantizer in other.modules():
        if isinstance(quantizer, LSQQuantizer):
            quantizer.step.data.mul_(3)
    assert not torch.equal(other(x), wanted) and torch.equal(qmodel(x), wanted)


def test_a_method_that_changed_since_it_was_pickled_is_refused(monkeypatch):
    x = torch.randn(2, 3, 8)
    content = pickle.dumps(brfx.prepare_qat(Attends(), None, x))

    def attend(self, x):
        return x

    monkeypatch.setattr(Attends, "attend", attend)
    with pytest.raises(CheckpointError, match="attend multiplies other matrices"):
        pickle.loads(content)


def _answer(model, x, queue):
    queue.put(model(x).detach().numpy())


def test_spawn(qnet, images):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_answer, args=(qnet, images, queue))
    process.start()
    answer = torch.from_numpy(queue.get(timeout=60))
    process.join()
    torch.testing.assert_close(answer, qnet(images).detach())


def test_the_user_s_methods_properties_and_containers_are_there(qnet, images):
    assert qnet.num_classes == 4
    kinds = ["QuantizedOwn", "BatchNorm2d", "QuantizedClippedReLU", "QuantizedConv2d"]
    assert [type(layer).__name__ for layer in qnet.features] == kinds
    assert len(qnet.features) == 4 and isinstance(qnet.features[-1], QuantizedConv2d)
    assert len(qnet.features._modules) > 4  # quantizers beside the user's children
    assert [type(layer).__name__ for layer in qnet.features[1:3]] == kinds[1:3]
    with brfx.quantization_disabled(qnet):
        torch.testing.assert_close(qnet.extract(images), float_of(qnet).extract(images))


def float_of(qmodel):
    model = Net().eval()
    model.load_state_dict(brfx.float_state_dict(qmodel))
    return model


def test_a_whole_sequential_has_its_own_length(images):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    qmodel = brfx.prepare_qat(model, None, images)
    for other in (qmodel, copy.deepcopy(qmodel), pickled(qmodel)):
        assert len(other) == 3 and isinstance(other[-1], QuantizedConv2d) and len(list(other)) == 3


def test_a_model_with_a_name_of_graph_module_s_is_not_traced_whole(images):
    model = Net()
    model.graph = "mine"
    assert brfx.prepare_qat(model, None, images).graph == "mine"


def test_train_is_the_user_s(images):
    class Frozen(Net):
        def train(self, mode=True):
            super().train(mode)
            self.features[1].eval()
            return self

    qmodel = brfx.prepare_qat(Frozen(), None, images)
    assert not qmodel.train().features[1].training and qmodel.features[0].training


def test_weights_that_hooks_compute_are_refused_by_name(images):
    def pruned(layer):
        prune.l1_unstructured(layer, "weight", 0.3)

    for change in (pruned, lambda layer: nn.utils.spectral_norm(layer)):
        model = Net()
        change(model.features[3])
        with pytest.raises(ConfigError, match=r"features\.3: its weight is computed by a hook.*prune.remove"):
            brfx.prepare_qat(model, None, images)
    model = Net()
    prune.random_unstructured(model.features[3], "bias", 0.3)
    with pytest.raises(ConfigError, match=r"features\.3: its bias is computed by a hook.*prune.remove\(layer, 'bias'"):
        brfx.prepare_qat(model, None, images)


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
def test_parametrized_weights_are_copied_and_trained(name, images):
    model = Net()
    getattr(nn.utils.parametrizations, name)(model.features[3])
    qmodel = brfx.prepare_qat(model, None, images)
    brfx.calibrate(qmodel, [images])
    copied = copy.deepcopy(qmodel)
    assert torch.equal(copied.eval()(images), qmodel.eval()(images))
    copied.train()(images).sum().backward()
    assert copied.features[3].parametrizations.weight[0] is not None
    assert all(value.grad is not None for value in copied.features[3].parametrizations.parameters())


def test_kept_activations_are_copied_and_what_cannot_be_copied_is_named(images):
    model = Net()
    model.features[3].kept = model.features[0](images)
    qmodel = brfx.prepare_qat(model, None, images)
    assert torch.equal(copy.deepcopy(qmodel).features[3].kept, model.features[3].kept)
    model.features[3].lock = threading.Lock()
    with pytest.raises(ConfigError, match=r"features\.3\.lock is what stops it"):
        brfx.prepare_qat(model, None, images)


def test_what_a_copy_would_share_with_the_model_or_lack_is_refused(images):
    model = Net()
    model.again = lambda x: model.features(x)
    with pytest.raises(ConfigError, match=r"again is a function that holds a module.*make it a method of its class"):
        brfx.prepare_qat(model, None, images)
    model.again = lambda x: x  # holds none
    brfx.prepare_qat(model, None, images)
    model.fc.weight.register_hook(lambda gradient: gradient * 2)
    with pytest.raises(ConfigError, match=r"fc\.weight has a hook on its gradient.*after prepare_qat"):
        brfx.prepare_qat(model, None, images)


def test_a_rewritten_model_is_not_rewritten_again(qnet, images):
    with pytest.raises(ConfigError, match=r"rewritten already, .* is a quantizer: give the float model"):
        brfx.prepare_qat(qnet, None, images)


def test_scripted_and_exported_models_are_refused_in_one_line(images):
    model = Net().eval()
    exported = torch.export.export(model, (images,))
    for other in (exported, exported.module()):
        with pytest.raises(ConfigError, match=r"the output of torch\.export: give the module itself"):
            brfx.prepare_qat(other)
    with pytest.raises(ConfigError, match=r"takes an nn\.Module in Python, and this is a str"):
        brfx.prepare_qat("resnet20")


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_script_module_is_refused(images):
    with pytest.raises(ConfigError, match=r"the output of torch\.jit"):
        brfx.prepare_qat(torch.jit.trace(nn.Conv2d(3, 4, 1), images))


def test_an_average_made_before_calibration_takes_the_steps_over(images, tmp_path):
    qmodel = brfx.prepare_qat(Net(), None, images)
    average = AveragedModel(qmodel)
    with pytest.raises(NotCalibratedError):
        average.eval()(images)
    brfx.calibrate(qmodel, [images])
    average.update_parameters(qmodel)
    assert torch.equal(average.eval()(images), qmodel.eval()(images))
    brfx.save(average.module, tmp_path / "average.pt")
