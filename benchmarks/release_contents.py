"""What the built sdist and wheel must hold: every tracked file, and every module, recipe and marker.

python benchmarks/release_contents.py CHECKOUT DIST
"""

from __future__ import annotations

import re
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

#: Of the checkout, what a build leaves out.
NOT_SHIPPED = {".gitignore"}


def main() -> None:
    checkout, dist = map(Path, sys.argv[1:])
    sdist, wheel = next(dist.glob("*.tar.gz")), next(dist.glob("*.whl"))
    tracked = {str(path.relative_to(checkout)) for path in checkout.rglob("*") if path.is_file()}
    tracked = {path for path in tracked if not re.search(r"(^|/)(build|dist|[^/]+\.egg-info)/", path)}
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    absent = [f"{sdist.name} lacks {path}" for path in sorted(tracked - NOT_SHIPPED - held)]

    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        said = Parser().parsestr(archive.read(metadata).decode())
    wanted = {path for path in tracked if path.startswith("brfx/")}
    wanted |= {f"brfx_{path}" for path in tracked if path.startswith("cli/")}
    absent += [f"{wheel.name} lacks {path}" for path in sorted(wanted - names)]
    strangers = {name for name in names - wanted if ".dist-info/" not in name}
    absent += [f"{wheel.name} has {name}, which is no part of the package" for name in sorted(strangers)]
    absent += [f"the metadata lack {field}" for field in ("Author", "Keywords", "Classifier") if not said.get(field)]
    links = re.findall(r"\]\((?!https?://|#)([^)]*)\)", str(said.get_payload()))
    absent += [f"the page of an index cannot follow README's link to {link}" for link in links]
    print(f"{sdist.name}: {len(held)} entries; {wheel.name}: {len(names)}")
    if absent:
        sys.exit("\n".join(absent))


if __name__ == "__main__":
    main()
