"""Every notebook runs from its first cell to its last, as a reader would run it, and is kept without outputs."""

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)

#: What the last cell that prints must have said.
SAYS = {
    "first-network.ipynb": "decided differently: 0 of 360",
    "look-inside.ipynb": "a mean of 3.5 bits",
}


def test_there_are_notebooks():
    assert {path.name for path in NOTEBOOKS} == set(SAYS)


@by_name
def test_a_notebook_is_kept_without_outputs(path):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


@by_name
@pytest.mark.filterwarnings("ignore")  # of the notebooks' own packages, in this process
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient, of the extra dev")
    nbformat = pytest.importorskip("nbformat", reason="needs nbformat, of the extra dev")
    pytest.importorskip("ipykernel", reason="needs ipykernel, of the extra dev")
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    pytest.importorskip("onnxruntime", reason="runs the exported file")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    printed = [output["text"] for output in outputs if output["output_type"] == "stream"]
    assert SAYS[path.name] in printed[-1], printed
