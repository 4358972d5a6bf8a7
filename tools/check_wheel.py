"""Check that a wheel holds every module, stub, script and marker of the working tree, the compiled core, and no source of it."""

from __future__ import annotations

import re
import sys
import zipfile
from pathlib import Path

PACKAGE = "ratethrottle"
PLUGIN = "pytest_ratethrottle.py"  # which pytest loads without the package
SHIPPED = {".py", ".pyi", ".lua", ".typed"}
# Built, or built from: of these the wheel takes only the extension module.
SOURCES = {".pyx", ".pxd", ".c"}


def problems(wheel: Path, tree: Path) -> list[str]:
    """Compare the names in `wheel` with the package directory below `tree`."""
    package = tree / PACKAGE
    expected = {
        path.relative_to(tree).as_posix()
        for path in package.rglob("*")
        if path.name == "py.typed" or (path.suffix in SHIPPED and "__pycache__" not in path.parts)
    }
    compiled = [path.relative_to(tree).with_suffix("").as_posix() for path in sorted(package.rglob("*.pyx"))]
    must = {PLUGIN, f"{PACKAGE}/__init__.py", f"{PACKAGE}/_core.pyi", f"{PACKAGE}/py.typed"}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        licenced = any(name.endswith("/LICENSE") for name in archive.namelist())
        points = "".join(archive.read(name).decode() for name in archive.namelist() if name.endswith("/entry_points.txt"))
    extensions = {name for name in held if name.endswith(".so")}
    found = [f"missing: {name}" for name in sorted((expected | must) - held)]
    found += [f"a source: {name}" for name in sorted(held) if Path(name).suffix in SOURCES]
    found += [f"unexpected: {name}" for name in sorted(held - expected - must - extensions) if Path(name).suffix not in SOURCES]
    for module in compiled:
        if not any(name.startswith(f"{module}.") for name in extensions):
            found.append(f"missing: the compiled {module}")
    if not any(name.endswith(".lua") for name in held):
        found.append("missing: any Lua script")
    if not re.search(r"^\[pytest11\]\n(?:\w.*\n)*?pytest_ratethrottle ?=", points, re.MULTILINE):
        found.append("missing: the entry point of the pytest plugin")
    if not licenced:
        found.append("missing: LICENSE")
    return found


def main() -> int:
    """Print what is wrong with the wheel named on the command line; exit 1 if anything is."""
    wheel = Path(sys.argv[1])
    found = problems(wheel, Path(__file__).parent.parent)
    print(*(f"{wheel.name}: {problem}" for problem in found), sep="\n", end="\n" if found else "")
    if not found:
        print(f"{wheel.name}: complete, {wheel.stat().st_size // 1024} KiB")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
