"""``compile()`` in one line: a loop of one's own then runs the form that trains fastest, and gets the same numbers."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import brfx
from brfx.kernels.training_form import HasTrainingForm
from brfx.regularizers import Regularizers
from brfx.regularizers.kurtosis import KurtosisTerm


@pytest.fixture(scope="module")
def qmodel() -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 36, 4),
    )  # fmt: skip
    images = torch.randn(4, 3, 8, 8)
    qmodel = brfx.prepare_qat(net, brfx.QATConfig(bits=2), images)
    brfx.calibrate(qmodel, [images])
    return qmodel.double().train()


def bare(qmodel: nn.Module) -> nn.Module:
    return qmodel


def penalized(qmodel: nn.Module) -> nn.Module:
    return brfx.BinPenalty(qmodel, weight=0.1, act=0.01).double().train()


def several(qmodel: nn.Module) -> nn.Module:
    return Regularizers(penalized(qmodel), KurtosisTerm(qmodel, 0.1)).double().train()


def gradients(module: nn.Module, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    result = module(images)
    output, terms = result if isinstance(result, tuple) else (result, ())
    loss = output.square().mean() + (terms.total if terms else 0.0)
    loss.backward()
    found = [parameter.grad for parameter in module.parameters()]
    assert all(grad is not None for grad in found)
    return [output, loss, *terms], found  # type: ignore[return-value]


@pytest.mark.parametrize("wrap", [bare, penalized, several])
def test_calls_compute_the_same_compiled(qmodel: nn.Module, wrap: Any) -> None:
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    plain, fast = wrap(copy.deepcopy(qmodel)), wrap(copy.deepcopy(qmodel))
    ran = fast._call_impl
    fast.compile()
    vars(fast)["_call_impl"] = lambda *_: pytest.fail("the plain form ran")
    numbers, grads = gradients(fast, images)
    torch.testing.assert_close((numbers, grads), gradients(plain, images))
    vars(fast)["_call_impl"] = ran
    for module in (plain, fast):
        module.eval()
    torch.testing.assert_close(fast(images), plain(images))
    assert copy.deepcopy(fast)._compiled_call_impl is None


def test_other_modes_run_as_before(qmodel: nn.Module) -> None:
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    model = copy.deepcopy(qmodel)
    model.compile()
    with torch.no_grad(), brfx.quantization_disabled(model):
        unquantized = model(images)
    with brfx.quantization_disabled(model):
        torch.testing.assert_close(model(images), unquantized)
    assert not torch.allclose(model(images), unquantized)
    seen: list[Tensor] = []
    model.register_forward_hook(lambda module, args, output: seen.append(output))
    model(images)
    assert len(seen) == 1


@pytest.mark.parametrize("wrap", [bare, penalized])
@pytest.mark.parametrize("since", [False, True])
def test_hooks_inside_run(qmodel: nn.Module, wrap: Any, since: bool) -> None:
    module = wrap(copy.deepcopy(qmodel))
    if since:
        module.compile()
    seen: list[str] = []
    for name, layer in module.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
            layer.register_forward_hook(lambda layer, args, output, name=name: seen.append(name))
    if not since:
        module.compile()
    module(torch.randn(4, 3, 8, 8, dtype=torch.float64))
    assert len(seen) == len(set(seen)) == 4


def test_arguments_are_torchs() -> None:
    with pytest.raises(TypeError, match=r"torch\.compile\(module"):
        HasTrainingForm().compile(dynamic=True)
