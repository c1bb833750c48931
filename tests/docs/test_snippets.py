"""Every block marked ``python`` on a page runs as it stands, in the order of the page; every command in a block marked
``bash`` runs too, with its training shortened."""

import re
import shlex
import sys
import types
from pathlib import Path

import pytest
from brfx_cli.main import cli
from click.testing import CliRunner

DOCS = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMANDS = re.compile(r"^```bash\n(.*?)^```", re.DOTALL | re.MULTILINE)
ALL = [DOCS / "README.md", *sorted((DOCS / "docs").glob("*.md"))]
PAGES = [page for page in ALL if BLOCK.search(page.read_text())]
COMMAND_PAGES = [page for page in ALL if COMMANDS.search(page.read_text())]
SHORT = {
    "train": ["--epochs", "1", "--limit-batches", "1"],
    "quantize": ["--qat-epochs", "1", "--warmup-epochs", "0", "--limit-batches", "1", "--compile", "off"],
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType(f"page_{page.stem.replace('-', '_')}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    text = page.read_text()
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], str(page), "exec"), vars(module))  # a traceback names the page's line


@pytest.mark.parametrize("page", COMMAND_PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in COMMANDS.finditer(page.read_text()):
        for line in block[1].strip().splitlines():
            program, command, *arguments = shlex.split(line, comments=True)
            assert program == "brfx"
            run = CliRunner().invoke(cli, [command, *arguments, *SHORT.get(command, [])])
            assert run.exit_code == 0, f"{line}\n{run.output}"


def test_there_are_pages_with_code() -> None:
    assert {"extend.md", "index.md", "microcontroller.md"} <= {page.name for page in PAGES}
    assert "first-network.md" in {page.name for page in COMMAND_PAGES}
