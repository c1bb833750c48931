"""Every torchvision model is rewritten, whole or island by island; `make sweep`."""

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

import brfx
from brfx.models import build_model, model_names
from brfx.nn import QuantizedLayer

#: These 14 loop over their inputs or branch on shapes: 12 detection models and RAFT.
UNTRACED = ("rcnn", "retinanet", "fcos", "ssd", "raft")


def build_without_weights(name: str) -> nn.Module:
    """The values do not matter here, and drawing them takes longer than all else."""
    with pytest.MonkeyPatch.context() as patch:
        for initializer in (
            "kaiming_normal_",
            "kaiming_uniform_",
            "trunc_normal_",
            "normal_",
            "uniform_",
            "xavier_uniform_",
        ):
            patch.setattr(torch.nn.init, initializer, lambda tensor, *args, **kwargs: tensor)
        return build_model(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", model_names())
def test_rewrites(name):
    model = build_without_weights(name)
    qmodel = brfx.prepare_qat(model)
    assert isinstance(qmodel, GraphModule) != any(part in name for part in UNTRACED)
    assert any(isinstance(module, QuantizedLayer) for module in qmodel.modules())
    assert set(model.state_dict()) <= set(qmodel.state_dict()) or name in ("googlenet", "inception_v3")
