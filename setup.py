"""setup.cfg has the settings. Here README becomes the page of an index, which has no docs/ for links to go to."""

import re
from pathlib import Path

from setuptools import setup

readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
setup(
    long_description=re.sub(r"\[([^]]*)\]\((?!https?://)([^)]*)\)", r"\1 (\2)", readme),
    long_description_content_type="text/markdown",
)
