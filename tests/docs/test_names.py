"""What a page names is there: files, and the functions and classes of the code."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FILE = re.compile(r"`((?:brfx|cli|tests|benchmarks|examples|docs)/[\w/.-]+\.\w+)`")
NAME = re.compile(r"`([A-Za-z_]+)(?:\([^`]*\))?`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_files_that_a_page_names_are_there(page: Path) -> None:
    assert not [name for name in FILE.findall(page.read_text()) if not (ROOT / name).is_file() and "NAME" not in name]


def test_the_functions_and_classes_that_how_it_works_names_are_in_the_code() -> None:
    text = (ROOT / "docs" / "how-it-works.md").read_text()
    source = "\n".join(path.read_text() for room in ("brfx", "cli") for path in (ROOT / room).rglob("*.py"))
    known = {*re.findall(r"\w+", source), *dir(nn), *dir(torch)}
    named = {name for name in NAME.findall(text) if re.search(r"_|[a-z][A-Z]", name)}
    assert len(named) > 30 and not named - known
