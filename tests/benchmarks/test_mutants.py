"""The faults that benchmarks/mutants.py puts into the code."""

import json

import pytest

from benchmarks import mutants
from benchmarks.mutants import HEADING, faults, judges, page


@pytest.mark.parametrize(
    ("line", "changed"),
    [
        ("z = a < b", {"z = a <= b"}),
        ("z = a not in b", {"z = a in b"}),
        ("z = (a) is not b", {"z = (a) is b"}),
        ("z = a + b * c", {"z = a - b * c", "z = a + b / c"}),
        ("z = a and b and c", {"z = a or b and c", "z = a and b or c"}),
        ("z = f(a, 0.5, True)", {"z = f(a, 1.5, True)", "z = f(a, 0.5, False)"}),
        ("z = not a", {"z = (a)"}),
        ("z = a if b else c", {"z = a if not (b) else c"}),
        ("z = min(a, b.amax())", {"z = max(a, b.amax())", "z = min(a, b.amin())"}),
        ("z = f((a), b=c, **d)", {"z = f((a), **d)"}),
        ("z = f(b=c)", {"z = f()"}),
        ("a.z = b", {"pass"}),
        ("f(a)", {"pass"}),
        ("a -= b", {"pass"}),
        ('log.info("%d", 1 + 2)', set()),
        ('raise ValueError("no" + str(a + 1))', set()),
        ("z: Literal[1, 2] = a", set()),
        ("assert a < b, c", set()),
        ("z = 'ä' * a", set()),
        ("z = f'{a + 1}'", set()),
    ],
)
def test_faults_of_a_line(line, changed):
    source = f'def f(a: Literal[3]) -> Literal[4]:\n    """Text."""\n    {line}\n'
    assert {fault.apply(source).splitlines()[2].strip() for fault in faults(source)} == changed
    for fault in faults(source):
        compile(fault.apply(source), "mutant", "exec")
        assert fault.runs == range(3, 4)


def test_a_fault_runs_where_its_statement_does():
    source = "A = 1\n\ndef f(a=2):\n    if a < (\n        b\n    ):\n        return g(\n            a + 1,\n        )\n"
    assert {(fault.line, fault.runs) for fault in faults(source)} == {
        (1, range(0)),
        (3, range(4, 10)),  # a default acts where the body runs
        (8, range(7, 10)),
    }


def test_judges_are_the_tests_that_run_the_statement_the_modules_own_first():
    (fault,) = faults("def f(a):\n    return a + b\n")
    lines = {"brfx/x.py": [2]}
    tests = {
        "tests/test_y.py::slow": {"seconds": 5, "lines": lines},
        "tests/test_y.py::quick": {"seconds": 1, "lines": lines},
        "tests/test_x.py::own": {"seconds": 2, "lines": lines},
        "tests/test_x.py::elsewhere": {"seconds": 0, "lines": {"brfx/x.py": [1], "brfx/y.py": [2]}},
    }
    assert judges(tests, "brfx/x.py", fault, 5) == ["tests/test_x.py::own", "tests/test_y.py::quick"]


def test_the_page_keeps_the_reasons_and_leaves_out_lines_that_are_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    (tmp_path / "brfx").mkdir()
    (tmp_path / "brfx" / "x.py").write_text("c = 1\n\n\nif a < b:\n    c\n")
    results, path = tmp_path / "results.jsonl", tmp_path / "page.md"
    record = {"file": "brfx/x.py", "line": 2, "before": "if a < b:", "after": "if a <= b:", "outcome": "not noticed"}
    noticed = record | {"line": 1, "before": "c = 1", "after": "c = 2", "outcome": "noticed"}
    gone = record | {"before": "if a > b:", "after": "if a >= b:"}
    lines = (noticed | {"outcome": "not noticed"}, gone, record, noticed)  # the last of a fault counts
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    path.write_text("# Page\n")
    page(results, path)
    text = path.read_text()
    assert text.startswith(f"# Page\n\n{HEADING}\n")
    assert "Of 2 faults, 0 (0%) were noticed at first, and\n1 (50%) since" in text
    path.write_text(text.replace("not examined yet", "The same for integers."))
    page(results, path)
    assert path.read_text().endswith("- brfx/x.py: `if a < b:` → `if a <= b:`\n  The same for integers.\n")


def test_the_files_that_are_no_judges_are_there():
    assert all((mutants.ROOT / path).exists() for path in mutants.SLOW_FILES)
