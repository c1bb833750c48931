import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "own_loop.py"


def test_it_runs_learns_and_stays_short():
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    assert len(SCRIPT.read_text().splitlines()) < 60
    assert runpy.run_path(str(SCRIPT))["main"](epochs=2) > 0.5  # chance is 0.1
