import math
import runpy
from pathlib import Path

import pytest

import brfx

pytest.importorskip("lightning", reason="the example trains inside it: pip install 'brfx[examples]'")
pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

SCRIPT = Path(__file__).parents[2] / "examples" / "lightning_module.py"


def steps(qmodel):
    return {name: step.detach().clone() for name, step in qmodel.named_parameters() if name.endswith(".step")}


@pytest.mark.filterwarnings("ignore")  # Lightning warns of what a short run does not need
def test_a_few_batches_lower_the_loss_move_every_step_and_leave_a_model_to_save(monkeypatch, tmp_path, images):
    calibrate, start = brfx.calibrate, {}

    def watched(qmodel, *args, **settings):
        calibrate(qmodel, *args, **settings)
        start.update(steps(qmodel))

    monkeypatch.setattr(brfx, "calibrate", watched)
    qmodel, history = runpy.run_path(str(SCRIPT))["main"](epochs=3, float_epochs=1, batches=6)
    assert len(history) == 3
    assert all(math.isfinite(value) and value > 0 for epoch in history for value in epoch.values())
    assert set(history[0]) == {"loss", "BR_W", "BR_A"}
    assert history[-1]["loss"] < history[0]["loss"]
    assert start and all((step != start[name]).any() for name, step in steps(qmodel).items())
    brfx.save(qmodel, tmp_path / "model.pt")
    again = brfx.load(tmp_path / "model.pt").eval()
    assert (again(images) == qmodel.cpu().eval()(images)).all()
