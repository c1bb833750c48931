import pytest
import torch
from torch import nn

import brfx
from brfx.errors import ConfigError
from brfx.regularizers.kurtosis import UNIFORM, KurtosisTerm, kurtosis


def published(values: torch.Tensor) -> torch.Tensor:
    """Shkolnik et al., 2020, eq. 12."""
    return (((values - values.mean()) / values.std(unbiased=False)) ** 4).mean()


def test_kurtosis_of_known_distributions() -> None:
    spread = torch.linspace(-3, 3, 100_001, dtype=torch.float64)
    assert float(kurtosis(spread)) == pytest.approx(UNIFORM, abs=1e-3)
    assert float(kurtosis(torch.tensor([-1.0, 1.0, 1.0, -1.0]))) == 1
    assert float(kurtosis(torch.randn(400_000, generator=torch.Generator().manual_seed(0)))) == pytest.approx(
        3, abs=0.05
    )
    assert float(kurtosis(torch.full((5,), 0.3))) == 0


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_loss_and_gradient_are_the_paper_s(tiny, scale: float) -> None:
    qmodel = brfx.prepare_qat(tiny).double()
    with torch.no_grad():
        qmodel.conv1.weight.mul_(scale)
    layers = [qmodel.conv1, qmodel.conv2, qmodel.fc]
    loss = KurtosisTerm(qmodel, 0.5)()
    loss.backward()
    copies = [layer.weight.detach().clone().requires_grad_() for layer in layers]
    wanted = sum((published(weight) - 1.8) ** 2 for weight in copies) / 3
    wanted.backward()
    torch.testing.assert_close(loss, wanted)
    for layer, weight in zip(layers, copies, strict=True):
        torch.testing.assert_close(layer.weight.grad, weight.grad)


def test_layers_in_fp32_and_models_without_any_have_no_part() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    qmodel = brfx.prepare_qat(model, brfx.QATConfig(skip=("0",)))
    weight = qmodel.get_submodule("2").weight
    torch.testing.assert_close(KurtosisTerm(qmodel, 1.0)(), (published(weight) - 1.8) ** 2)
    assert KurtosisTerm(brfx.prepare_qat(model, brfx.QATConfig(weight_bits=32)), 1.0)() == 0


def test_a_negative_lambda_is_refused(tiny) -> None:
    with pytest.raises(ConfigError, match=r"kurtosis=-1: a lambda takes 0 or more"):
        KurtosisTerm(brfx.prepare_qat(tiny), -1)
