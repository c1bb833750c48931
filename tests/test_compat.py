import os
import signal
from importlib import import_module

import pytest
import torch
from torch import nn

import brfx
from brfx.compat import float64_device, in_float64, memory_bytes, saved_tensors_are_hooked
from brfx.data import Preprocessing
from brfx.data.image_files import ImageFiles
from brfx.models import _user_factory
from brfx.train.memory import memory_kept


def test_the_memory_is_what_the_system_tells():
    assert 1 << 28 < memory_bytes() < 1 << 48


def answer(value):
    def sysconf(name):
        if isinstance(value, Exception):
            raise value
        return value

    return sysconf


@pytest.mark.parametrize("value", [None, ValueError("unrecognized configuration name"), OSError(22, "Invalid"), -1, 0])
def test_eight_gib_are_assumed_where_it_tells_nothing(monkeypatch, value):
    if value is None:
        monkeypatch.delattr(os, "sysconf")  # Windows has none
    else:
        monkeypatch.setattr(os, "sysconf", answer(value))
    assert memory_bytes() == 8 << 30


def test_float64_is_on_the_cpu_for_mps_alone():
    assert float64_device(torch.device("mps", 0)) == torch.device("cpu")
    for device in ("cpu", "cuda:1", "xpu"):
        assert float64_device(torch.device(device)) == torch.device(device)


def test_values_in_float64_keep_their_gradient():
    values = torch.ones(3, requires_grad=True)
    in_float64(values).square().sum().backward()
    assert in_float64(values).dtype == torch.float64 and values.grad.tolist() == [2, 2, 2]


def test_an_evaluation_sums_where_float64_is(monkeypatch, tiny, images):
    asked = []

    def elsewhere(device):
        asked.append(device)
        return torch.device("meta")

    batches = [(images, torch.zeros(len(images), dtype=torch.long))]
    monkeypatch.setattr(import_module("brfx.train.evaluate"), "float64_device", elsewhere)
    with pytest.raises(RuntimeError, match="meta"):  # the sums, which are read at the end
        brfx.evaluate(tiny, batches)
    assert asked == [torch.device("cpu")]


@pytest.mark.parametrize("workers", [0, 2])
def test_images_are_read_where_children_send_no_signal(monkeypatch, tmp_path, workers):
    from PIL import Image

    monkeypatch.delattr(signal, "SIGCHLD")  # Windows has none
    monkeypatch.setattr("torch.utils.data._utils.signal_handling._set_SIGCHLD_handler", lambda: None)
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    for number, path in enumerate(paths):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(path)
    found = torch.cat(list(ImageFiles(paths, Preprocessing(4), workers).batches(torch.arange(4).split(2))))
    assert found[:, 0, 0, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("platform", "method"), [("linux", "fork"), ("darwin", None), ("win32", None)])
def test_workers_are_forked_on_linux_alone(monkeypatch, tmp_path, platform, method):
    given = []

    def loader(*args, multiprocessing_context, **settings):
        given.append(multiprocessing_context)
        raise OSError("no workers here")

    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setattr("brfx.data.image_files.DataLoader", loader)
    with pytest.raises(OSError, match="no workers here"):
        next(ImageFiles([tmp_path] * 4, Preprocessing(4), 2).batches(torch.arange(4).split(2)))
    assert given == [method]


def test_memory_is_kept_with_glibc_alone(monkeypatch):
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))  # macOS, Windows, musl
    monkeypatch.delattr("ctypes.CDLL")
    with memory_kept():
        pass


def test_a_path_of_windows_has_a_colon_of_its_own(monkeypatch):
    seen = []
    monkeypatch.setattr("brfx.models.Path", lambda file: seen.append(file) or FoundNowhere())
    with pytest.raises(brfx.BrfxError, match=r"^C:\\nets\\mine\.py: no such file"):
        _user_factory(r"C:\nets\mine.py:make")
    assert seen == [r"C:\nets\mine.py"]


class FoundNowhere:
    def is_file(self):
        return False


@pytest.mark.parametrize("told", [True, False])
def test_hooks_of_saved_tensors_are_found_where_torch_does_not_tell(monkeypatch, told):
    if not told:
        monkeypatch.delattr("torch._C._autograd._top_saved_tensors_default_hooks", raising=False)
    assert not saved_tensors_are_hooked()
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda packed: packed):
        assert saved_tensors_are_hooked()
    assert not saved_tensors_are_hooked()


def test_a_factory_of_a_traced_size_is_recorded_where_torch_does_not_ask_it(monkeypatch):
    class Places(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.conv(x) + torch.arange(x.shape[-1]) * torch.full((), x.shape[0])

    monkeypatch.setattr("brfx.graph.side_effects.factories_are_overridden", lambda: False)
    torch.manual_seed(0)
    model, arange = Places(), torch.arange
    qmodel = brfx.prepare_qat(model, example_inputs=torch.randn(2, 3, 5, 5))
    assert torch.arange is arange and isinstance(qmodel, torch.fx.GraphModule)
    assert {torch.arange, torch.full} <= {node.target for node in qmodel.graph.nodes}
    with brfx.quantization_disabled(qmodel):
        x = torch.randn(3, 3, 4, 7)
        assert torch.equal(qmodel(x), model(x))
