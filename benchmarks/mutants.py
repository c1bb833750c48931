"""Do the tests notice a fault? Faults of one line each are put into brfx/, and the tests that run the line are run.

    python benchmarks/mutants.py run /tmp/mutants.jsonl --count 100      # goes on where it stopped
    python benchmarks/mutants.py run /tmp/mutants.jsonl --again          # those not noticed, after a test was written
    python benchmarks/mutants.py page /tmp/mutants.jsonl docs/reliability.md

``run`` draws lines of brfx/ uniformly, with a seed, and on each of them one fault of :func:`faults`; from other code it
draws others. What was judged on a line that has changed since counts no more. Each fault is put into a copy of what git
tracks, never into the checkout. One JSON line is written for each:

    {"file", "line", "kind", "before", "after", "outcome": "noticed" | "timeout" | "not noticed", "test", "seconds"}

Which tests run a line is measured first, by coverage.py, one test file at a time; it is kept in a folder beside the
results and measured anew for a test file that changed. Judges of a fault are the tests that pass within ``--slow``
seconds each without it and run its statement, those of the module's own test file first, then the quickest, up to
``--judging`` seconds. Tests that are slower, that run the line in another process or that need files outside the
repository judge nothing. So "not noticed" is an upper bound, and what the whole of ``make test`` notices is more.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parents[1]
#: Test files that judge nothing: they take minutes, or run the library in other processes.
SLOW_FILES = (
    *("tests/benchmarks/", "tests/examples/", "tests/faults/"),
    *("tests/test_distributed.py", "tests/test_sweep.py"),
)
#: What tests import that is slow to import, and has no part in what is judged.
PRELOADED = ("torch", "torchvision", "torch._dynamo", "torch._inductor.compile_fx", "sklearn.datasets", "onnxruntime")
HEADING = "## Whether the tests notice a fault"

_OPERATORS: dict[type, str] = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "*", ast.Pow: "*",
    ast.BitAnd: "|", ast.BitOr: "&", ast.LShift: ">>", ast.RShift: "<<", ast.And: "or", ast.Or: "and",
}  # fmt: skip
_NAMES = {"min": "max", "minimum": "maximum", "amin": "amax", "floor": "ceil", "any": "all"}
_NAMES |= {new: old for old, new in _NAMES.items()}
_LOGS = {"debug", "info", "warning", "warn", "error", "log", "cast", "getLogger", "TypeVar", "NamedTuple"}
_TEXTS = {"__repr__", "__str__", "extra_repr"}


class Fault(NamedTuple):
    """``source`` with ``after`` in the place of its columns ``start:end`` (of UTF-8 bytes) in ``line``."""

    line: int
    start: int
    end: int
    after: str
    kind: str
    runs: range  #: lines one of which runs when the fault has an effect; empty: whenever the module is used

    def apply(self, source: str) -> str:
        lines = source.splitlines(keepends=True)
        lines[self.line - 1] = self.on(lines[self.line - 1])
        return "".join(lines)

    def on(self, line: str) -> str:
        text = line.encode()
        return (text[: self.start] + self.after.encode() + text[self.end :]).decode()


def faults(source: str) -> list[Fault]:
    """Every fault of one line that the operators make; never in docstrings, annotations, logs and texts of errors.

    a < b -> a <= b    a + b -> a - b    3 -> 4    True -> False    a and b -> a or b    min(a) -> max(a)
    if a: -> if not (a):    not a -> a    f(a, key=b) -> f(a)    self.a = b -> pass    continue -> pass
    """
    found: list[Fault] = []
    _visit(ast.parse(source), range(0), False, source.splitlines(), found)
    return found


def _visit(node: ast.AST, runs: range, inside: bool, lines: list[str], found: list[Fault]) -> None:
    """Collect the faults in ``node``; ``inside``: in a function, so that statements run when it is called."""
    if isinstance(node, ast.stmt) and inside:
        body = getattr(node, "body", None)
        end = body[0].lineno if body else (node.end_lineno or node.lineno) + 1
        runs = range(node.lineno, max(end, node.lineno + 1))
    found += (
        Fault(*place, after, kind, runs)
        for place, after, kind in _changes(node, lines)
        if place[0] and lines[place[0] - 1].strip()
    )
    for name, child in _children(node):
        if isinstance(node, ast.FunctionDef):
            within = range(node.body[0].lineno, (node.end_lineno or 0) + 1)
            _visit(child, within if name == "args" else runs, name != "args", lines, found)
        else:
            _visit(child, runs, inside, lines, found)


def _children(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """The parts of a node that faults are put into."""
    if isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr)) or _told(node):
        return
    if isinstance(node, ast.FunctionDef) and node.name in _TEXTS:
        return
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield name, child


def _told(node: ast.AST) -> bool:
    """Whether a node only tells something: a docstring, a line of the log, the name of a type."""
    if isinstance(node, ast.Expr):
        return _told(node.value) or isinstance(node.value, ast.Constant)
    called = node.func if isinstance(node, ast.Call) else None
    name = getattr(called, "attr", getattr(called, "id", ""))
    return name in _LOGS or name.endswith(("Error", "Warning"))


Place = tuple[int, int, int]  # line, start, end


def _place(node: Any, until: Any = None) -> Place:
    """Where a node is, or from it to the start of another; line 0 where that is not within one line."""
    if until is not None:
        one, end = node.end_lineno == until.lineno, until.col_offset
        return (node.end_lineno, node.end_col_offset, end) if one else (0, 0, 0)
    return (node.lineno, node.col_offset, node.end_col_offset) if node.lineno == node.end_lineno else (0, 0, 0)


def _changes(node: ast.AST, lines: list[str]) -> Iterator[tuple[Place, str, str]]:
    if isinstance(node, (ast.Compare, ast.BinOp, ast.BoolOp)):
        yield from _operators(node, lines)
    elif isinstance(node, (ast.If, ast.While, ast.IfExp)) and not isinstance(node.test, ast.UnaryOp):
        yield _place(node.test), f"not ({ast.unparse(node.test)})", "not added"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield _place(node), f"({ast.unparse(node.operand)})", "not removed"
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        new = not node.value if isinstance(node.value, bool) else node.value + 1
        yield _place(node), repr(new), "constant"
    elif isinstance(node, (ast.Name, ast.Attribute)):
        name = node.id if isinstance(node, ast.Name) else node.attr
        line, _, end = _place(node)
        if name in _NAMES:
            yield (line, end - len(name), end), _NAMES[name], "min/max"
    elif isinstance(node, ast.Call) and not _told(node):
        yield from _dropped_keywords(node, lines)
    elif _droppable(node):
        yield _place(node), "pass", "statement dropped"


def _operators(node: ast.Compare | ast.BinOp | ast.BoolOp, lines: list[str]) -> Iterator[tuple[Place, str, str]]:
    if isinstance(node, ast.Compare):
        for left, op, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
            yield from _operator(left, op, right, lines, "comparison")
    elif isinstance(node, ast.BoolOp):
        for left, right in zip(node.values, node.values[1:], strict=False):
            yield from _operator(left, node.op, right, lines, "and/or")
    elif not _of_types_or_text(node):
        yield from _operator(node.left, node.op, node.right, lines, "arithmetic")


def _operator(left: ast.expr, op: ast.AST, right: ast.expr, lines: list[str], kind: str) -> Iterator[Any]:
    line, start, end = _place(left, right)
    if line and type(op) in _OPERATORS:
        between = lines[line - 1].encode()[start:end].decode()
        sign = re.search(r"not in|is not|[a-z]+|[^\s()\w]+", between)
        if sign:
            start, end = start + sign.start(), start + sign.end()
            yield (line, start, end), _OPERATORS[type(op)], kind


def _of_types_or_text(node: ast.BinOp) -> bool:
    """``A | None``, ``"a" + b``, ``"%s" % a``: no arithmetic."""
    for part in (node.left, node.right):
        if isinstance(part, ast.JoinedStr) or isinstance(getattr(part, "value", None), (str, bytes)):
            return True
        if isinstance(part, ast.Constant) and part.value is None:
            return True
    return isinstance(node.op, ast.BitOr) and ast.unparse(node.right).split(".")[-1][:1].isupper()


def _dropped_keywords(node: ast.Call, lines: list[str]) -> Iterator[tuple[Place, str, str]]:
    before: list[ast.expr] = [*node.args]
    for keyword in node.keywords:
        if keyword.arg and before and before[-1].end_lineno == keyword.end_lineno:
            line, start, end = _place(before[-1], keyword)
            start += lines[line - 1].encode()[start:end].rfind(b",") if line else 0
            yield (line, start, keyword.end_col_offset or 0), "", "keyword dropped"
        elif keyword.arg and not before and len(node.keywords) == 1:
            yield _place(keyword), "", "keyword dropped"
        before.append(keyword.value)


def _droppable(node: ast.AST) -> bool:
    if isinstance(node, (ast.Continue, ast.Break, ast.AugAssign)):
        return True
    if isinstance(node, ast.Assign):
        return isinstance(node.targets[0], (ast.Attribute, ast.Subscript))
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and not _told(node)


def drawn(seed: int) -> Iterator[tuple[str, Fault]]:
    """Lines of brfx/ in an order of the seed, each with one of its faults."""
    at: dict[tuple[str, int], list[Fault]] = {}
    for path in sorted((ROOT / "brfx").rglob("*.py")):
        for fault in faults(path.read_text()):
            at.setdefault((str(path.relative_to(ROOT)), fault.line), []).append(fault)
    generator = random.Random(seed)
    order = sorted(at)
    generator.shuffle(order)
    for place in order:
        yield place[0], generator.choice(at[place])


class Copy:
    """A copy of what git tracks, in which tests run."""

    def __init__(self, folder: Path) -> None:
        self.root = folder
        tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        for name in tracked.splitlines():
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name)
        (folder / ".path").mkdir()
        for link, target in (("brfx", "../brfx"), ("brfx_cli", "../cli")):
            (folder / ".path" / link).symlink_to(target)

    def pytest(self, *arguments: str, seconds: float, **environment: str) -> tuple[int | None, str]:
        """The exit status of pytest, ``None`` if it ran past ``seconds``, and what it printed.

        It runs in a fork of this process, which has imported torch already: that would take longer than the tests.
        """
        output, end = self.root / "output", time.monotonic() + seconds
        child = os.fork()
        if child == 0:
            self._pytest(output, arguments, environment)
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > end:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return None, output.read_text()
            time.sleep(0.05)
        return int((self.root / "status").read_text() or 70), output.read_text()

    def _pytest(self, output: Path, arguments: tuple[str, ...], environment: dict[str, str]) -> NoReturn:
        """Become pytest in the copy."""
        os.setsid()
        (self.root / "status").write_text("")
        stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        os.chdir(self.root)
        path = str(self.root / ".path")
        os.environ |= environment | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
        sys.path[:] = [str(self.root), path, *(p for p in sys.path if p not in ("", str(ROOT), str(ROOT / ".path")))]
        sys.dont_write_bytecode = True
        import pytest

        (self.root / "status").write_text(str(int(pytest.main(["-p", "no:cacheprovider", *arguments]))))
        os._exit(0)


def measure(copy: Copy, test_file: str, folder: Path, slow: float) -> dict[str, Any]:
    """``{test: {"seconds": s, "lines": {file of brfx: lines that it runs}}}`` of the tests that pass."""
    from coverage import CoverageData

    digest = hashlib.sha256((copy.root / test_file).read_bytes()).hexdigest()[:16]
    kept = folder / f"{test_file.replace('/', '-')}.{digest}.json"
    if kept.is_file():
        return dict(json.loads(kept.read_text()))
    data, report = folder / "coverage", folder / "junit.xml"
    data.unlink(missing_ok=True)
    options = ("--cov=brfx", "--cov-context=test", "--cov-report=", f"--timeout={slow}", f"--junitxml={report}")
    report.unlink(missing_ok=True)
    status, output = copy.pytest(test_file, *options, seconds=3600, COVERAGE_FILE=str(data))
    if not report.is_file():
        raise SystemExit(f"{test_file} does not run ({status}): {output[-2000:]}")
    tests: dict[str, Any] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        if not any(child.tag in ("failure", "error", "skipped") for child in case):
            tests[f"{test_file}::{case.get('name')}"] = {"seconds": float(case.get("time", 0)), "lines": {}}
    if data.is_file():
        seen = CoverageData(str(data))
        seen.read()
        for path in seen.measured_files():
            name = str(Path(path).relative_to(copy.root.resolve()))
            for line, contexts in seen.contexts_by_lineno(path).items():
                for test in {context.rpartition("|")[0] for context in contexts} & tests.keys():
                    tests[test]["lines"].setdefault(name, []).append(line)
    kept.write_text(json.dumps(tests))
    return tests


def judges(tests: dict[str, Any], file: str, fault: Fault, limit: float) -> list[str]:
    """The tests that run the fault, the module's own first, then the quickest, up to ``limit`` seconds."""
    own = f"test_{Path(file).stem}.py::"
    running = [
        (own not in test, about["seconds"], test)
        for test, about in tests.items()
        if file in about["lines"] and (not fault.runs or not set(fault.runs).isdisjoint(about["lines"][file]))
    ]
    chosen, total = [], 0.0
    for _, seconds, test in sorted(running):
        total += seconds
        if total > limit:
            break
        chosen.append(test)
    return chosen


def judge(copy: Copy, file: str, fault: Fault, tests: list[str], limit: float) -> tuple[str, str]:
    """The outcome, and the first test that failed."""
    if not tests:
        return "not noticed", ""
    path = copy.root / file
    source = path.read_text()
    path.write_text(fault.apply(source))
    try:
        status, output = copy.pytest(*tests, "-x", "--timeout=60", "--tb=no", "-rfE", seconds=5 * limit + 120)
    finally:
        path.write_text(source)
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    outcome = {None: "timeout", 0: "not noticed"}.get(status, "noticed")
    return outcome, failed.group(1) if failed else ""


def run(results: Path, *, count: int, seed: int, again: bool, slow: float, judging: float) -> None:
    """Judge those of the first ``count`` faults of ``seed`` that ``results`` lacks; or ``again`` those not noticed."""
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path[:] = [path for path in sys.path if Path(path) != ROOT / "benchmarks"]  # its coverage.py is another
    for name in PRELOADED:
        importlib.import_module(name)
    written = read(results)
    folder = results.with_suffix(".map")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        copy = Copy(Path(temporary))
        tests: dict[str, Any] = {}
        for path in sorted((copy.root / "tests").rglob("test_*.py"), key=lambda path: path.stat().st_size):
            name = str(path.relative_to(copy.root))
            if not name.startswith(SLOW_FILES):
                print(f"measuring {name}", flush=True)
                tests |= measure(copy, name, folder, slow)
        missed = [key for key, record in written.items() if record["outcome"] == "not noticed"]
        for file, fault in known(missed) if again else islice(drawn(seed), count):
            key = (file, *_texts(file, fault))
            if key in written and not again:
                continue
            begin = time.perf_counter()
            chosen = judges(tests, file, fault, judging)
            outcome, test = judge(copy, file, fault, chosen, judging)
            record = {"file": file, "line": fault.line, "kind": fault.kind, "before": key[1], "after": key[2]}
            record |= {"outcome": outcome, "test": test, "judges": len(chosen)}
            record |= {"seconds": round(time.perf_counter() - begin, 1)}
            with results.open("a") as stream:
                stream.write(json.dumps(record) + "\n")
            print(f"{outcome}: {file}:{fault.line}: {key[1]} -> {key[2]}", flush=True)


def read(results: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """The last record of each fault, by file, line before and line after; ``"first"`` is what came out at first."""
    lines = results.read_text().splitlines() if results.is_file() else []
    records = [json.loads(line) for line in lines]
    first: dict[tuple[str, str, str], str] = {}
    for record in records:
        key = (record["file"], record["before"], record["after"])
        record["first"] = first.setdefault(key, record["outcome"])
    return {(record["file"], record["before"], record["after"]): record for record in records}


def _texts(file: str, fault: Fault) -> tuple[str, str]:
    """The line before and after."""
    line = (ROOT / file).read_text().splitlines()[fault.line - 1]
    return line.strip(), fault.on(line).strip()


def known(keys: Iterable[tuple[str, str, str]]) -> Iterator[tuple[str, Fault]]:
    """The faults of records, wherever their lines are now; without those whose line is no more."""
    for file, before, after in keys:
        found = faults((ROOT / file).read_text())
        fault = next((fault for fault in found if _texts(file, fault) == (before, after)), None)
        if fault is not None:
            yield file, fault


def page(results: Path, path: Path) -> None:
    """Write the section of ``path`` anew, with the reasons that stand there."""
    records = read(results)
    there = {(file, *_texts(file, fault)) for file, fault in known(records)}
    records = {key: record for key, record in records.items() if key in there}
    text = path.read_text()
    head, _, old = text.partition(HEADING)
    reasons = {match[:3]: match[3] for match in re.findall(r"^- (\S+): `(.*)` → `(.*)`\n  (.*)$", old, re.MULTILINE)}
    missed = [record for record in records.values() if record["outcome"] == "not noticed"]
    items = []
    for record in sorted(missed, key=lambda record: (record["file"], record["line"])):
        before, after = (record[part].partition("  #")[0] for part in ("before", "after"))
        reason = reasons.get((record["file"], before, after), "not examined yet")
        items.append(f"- {record['file']}: `{before}` → `{after}`\n  {reason}")
    noticed, count = len(records) - len(missed), len(records)
    at_first = sum(record["first"] != "not noticed" for record in records.values())
    section = f"""{HEADING}

`benchmarks/mutants.py` puts faults of one line each into `brfx/`, drawn by a seed, and runs the quick tests that run
the line (which, its docstring says). Of {count} faults, {at_first} ({at_first / count:.0%}) were noticed at first, and
{noticed} ({noticed / count:.0%}) since tests were written for what was missed.

    python benchmarks/mutants.py run /tmp/mutants.jsonl --count 100
    python benchmarks/mutants.py run /tmp/mutants.jsonl --again
    python benchmarks/mutants.py page /tmp/mutants.jsonl docs/reliability.md

Not noticed, each with its reason:

"""
    path.write_text(head.rstrip() + "\n\n" + section + "\n".join(items) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="judge faults")
    runner.add_argument("results", type=Path, help="a JSON-lines file outside the repository")
    runner.add_argument("--count", type=int, default=100)
    runner.add_argument("--seed", type=int, default=0)
    runner.add_argument("--again", action="store_true", help="judge once more what was not noticed")
    runner.add_argument("--slow", type=float, default=6, help="seconds from which on a test judges nothing")
    runner.add_argument("--judging", type=float, default=60, help="seconds of tests for one fault")
    writer = commands.add_parser("page", help="write the section of a page")
    writer.add_argument("results", type=Path)
    writer.add_argument("page", type=Path)
    arguments = vars(parser.parse_args())
    (run if arguments.pop("command") == "run" else page)(*_positional(arguments), **arguments)


def _positional(arguments: dict[str, Any]) -> list[Path]:
    return [arguments.pop(name).resolve() for name in ("results", "page") if name in arguments]


if __name__ == "__main__":
    main()
