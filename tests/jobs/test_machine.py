import json
import os

from brfx.jobs.machine import machine


def test_a_machine_is_plain_data_and_its_cores_are_those_that_may_be_used():
    found = machine("cpu")
    assert json.loads(json.dumps(found)) == found
    assert found["system"] and found["processor"] and "gpu" not in found
    assert 1 <= found["cores"] <= (os.cpu_count() or 1)
