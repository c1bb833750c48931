import pytest
import torch
from torch import nn

import brfx
from brfx.modes import eval_mode, modes_kept
from brfx.train import reestimate_batch_norm


def test_every_module_comes_back_in_its_own_mode_also_after_an_error():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(), nn.Sequential(nn.ReLU()))
    model[0].eval()
    before = [module.training for module in model.modules()]
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before == [True, False, True, True, True]
    with pytest.raises(KeyError), modes_kept(model):
        model.train()
        raise KeyError
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize(
    "use",
    [
        lambda qmodel, images, path: brfx.audit(qmodel, images),
        lambda qmodel, images, path: brfx.calibrate(qmodel, [images]),
        lambda qmodel, images, path: brfx.sensitivity(qmodel, [images], widths=(4,)),
        lambda qmodel, images, path: brfx.reconstruct(qmodel, [images]),
        lambda qmodel, images, path: brfx.observe(qmodel, images),
        lambda qmodel, images, path: brfx.export_packed(qmodel, path / "a.safetensors"),
        lambda qmodel, images, path: brfx.export_torch(qmodel, path / "a.pt2", images),
        lambda qmodel, images, path: brfx.evaluate(qmodel, [(images, torch.zeros(8, dtype=torch.long))]),
        lambda qmodel, images, path: brfx.export_onnx(qmodel, path / "a.onnx", images),
        lambda qmodel, images, path: brfx.WeightStatistics(qmodel)(1, 1),
        lambda qmodel, images, path: reestimate_batch_norm(qmodel, [images]),
        lambda qmodel, images, path: brfx.save(qmodel, path / "a.pt"),
    ],
)
def test_frozen_batch_norms_stay_frozen(tiny, images, tmp_path, use):
    qmodel = brfx.prepare_qat(tiny.train())
    brfx.calibrate(qmodel, [images])
    brfx.snap_biases(qmodel)
    qmodel.train()
    qmodel.bn1.eval()
    use(qmodel, images, tmp_path)
    assert qmodel.training and not qmodel.bn1.training and qmodel.conv1.training


def test_estimating_batch_norms_anew_leaves_no_trace_where_it_fails():
    model = nn.Sequential(nn.BatchNorm1d(2, momentum=0.3))
    with pytest.raises(RuntimeError):
        reestimate_batch_norm(model, [torch.zeros(4, 2), torch.zeros(4, 3)])
    assert model[0].momentum == 0.3 and model[0].training
