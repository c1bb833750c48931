"""The callbacks for other people's dashboards: the examples run as they stand, and leave their figures on disk."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.filterwarnings("ignore")
def test_figures_reach_mlflow(tmp_path, monkeypatch, digits):
    mlflow = pytest.importorskip("mlflow", reason="the example logs to it: pip install mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(tmp_path.as_uri())
    result = runpy.run_path(str(EXAMPLES / "mlflow_callback.py"))["main"](epochs=1)
    client = mlflow.MlflowClient()
    run = client.search_runs([client.get_experiment_by_name("brfx").experiment_id])[0]
    assert run.data.metrics["val/accuracy"] == result.val_accuracy
    assert run.data.metrics["train/loss"] == pytest.approx(result.history[0].train.loss)
    assert [point.step for point in client.get_metric_history(run.info.run_id, "lr")] == [10, 20, 30, 40]
    assert run.data.params["epochs"] == "1"


@pytest.mark.filterwarnings("ignore")
def test_figures_reach_weights_and_biases(tmp_path, monkeypatch, digits):
    pytest.importorskip("wandb", reason="the example logs to it: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    example = runpy.run_path(str(EXAMPLES / "wandb_callback.py"))
    logged = []
    monkeypatch.setattr(
        example["WandbCallback"], "__init__", lambda self, run: setattr(self, "run", _Watched(run, logged))
    )
    result = example["main"](epochs=1)
    assert {"val/accuracy": result.val_accuracy, "val/loss": result.history[0].val_loss} in logged
    assert [figures["lr"] for figures in logged if "lr" in figures][-1] == result.history[0].lr
    assert list(tmp_path.rglob("*.wandb"))


class _Watched:
    """A run of Weights & Biases whose calls of ``log`` are kept too."""

    def __init__(self, run, logged):
        self.run, self.logged, self.summary = run, logged, run.summary

    def log(self, figures, **settings):
        self.logged.append(figures)
        self.run.log(figures, **settings)
