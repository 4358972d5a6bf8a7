"""The layers of ARCHITECTURE.md, read from the imports themselves."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import ratethrottle

PACKAGE = Path(ratethrottle.__file__).parent
# Cython's imports look like Python's, but ast can't read the rest of a .pyx.
CYTHON_IMPORT = re.compile(r"^\s*(?:from\s+(\S+)\s+c?import\s|c?import\s+(\S+))", re.MULTILINE)

# The compiled modules, and what is compiled into them: each imports only from those before it.
COMPILED = (
    *(
        f"_engine.{part}"
        for part in (
            "pieces",
            "window",
            "calendar",
            "arithmetic",
            "turns",
            "text",
            "dated",
            "table",
            "bound",
            "definitions",
            "decision",
            "joint",
            "held",
            "keys",
            "corrections",
            "bookings",
        )
    ),
    *("_coroutine", "_method", "_core", "_several"),
    *(
        f"storage._shared.{part}"
        for part in ("resp", "queue", "waiting", "keynames", "parts", "outage", "fleet", "request", "reply")
    ),
    *(
        f"storage._shared.{part}"
        for part in ("item", "joint", "call", "repair", "context", "known", "link", "heartbeat", "exchange", "late")
    ),
    *(f"storage._shared.{part}" for part in ("fallback", "settle", "session", "batch", "shared")),
)
# A layer may import itself and what stands above it in this list. The engine raises the errors, and an error carries a decision: those
# are one layer. The package's own __init__ only gathers the public names.
LAYERS = [
    ["ratethrottle.errors", "ratethrottle._engine"],
    ["ratethrottle._coroutine", "ratethrottle._method", "ratethrottle._core", "ratethrottle._interpreter"],
    ["ratethrottle.rule", "ratethrottle.events", "ratethrottle.options", "ratethrottle._patching", "ratethrottle._holding"],
    ["ratethrottle._several"],
    ["ratethrottle.storage._shared"],
    ["ratethrottle.storage"],
    ["ratethrottle.waiting"],
    ["ratethrottle.limiter"],
    ["ratethrottle.integrations", "ratethrottle.cli", "ratethrottle.testing"],
]


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def layer(module: str) -> int | None:
    return next((i for i, members in enumerate(LAYERS) if any(inside(module, member) for member in members)), None)


def imports(source: str, package: str) -> Iterator[str]:
    """Yield every module that Python source in `package` imports, lazily or for type checkers included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            origin = ".".join([*parents, *([node.module] if node.module else [])])
            # `from ratethrottle import limiter` names a module where `from ratethrottle import Decision` names none: take both.
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def problems(module: str, imported: str) -> Iterator[str]:
    if inside(imported, "redis") and not inside(module, "ratethrottle.storage.redis"):
        yield f"{module} imports {imported}: only ratethrottle.storage.redis knows redis-py"
    here, there = layer(module), layer(imported)
    if module == "ratethrottle" or not inside(imported, "ratethrottle"):
        return
    if here is None:
        yield f"{module} stands in no layer; name it in LAYERS"
    elif there is None:
        yield f"{module} imports {imported} from the package that gathers the public names; name the module it comes from"
    elif there > here:
        yield f"{module} imports {imported}, which stands on it"
    elif imported.startswith("ratethrottle.integrations") and not module.startswith("ratethrottle.integrations"):
        yield f"{module} imports {imported}: an integration is imported by its user alone"


def modules() -> list[Path]:
    return sorted(path for pattern in ("*.py", "*.pyi") for path in PACKAGE.rglob(pattern))


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_down(path: Path) -> None:
    module = name_of(path)
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    assert not [p for imported in imports(path.read_text(), package) for p in problems(module, imported)]


def compiled_sources() -> dict[str, Path]:
    """Find what is compiled: each .pyx and .pxd, by its path in the package."""
    directory = Path(__file__).parents[2] / "ratethrottle"
    sources = [path for pattern in ("*.pyx", "*.pxd") for path in directory.rglob(pattern)]
    if not sources:
        pytest.skip("testing an installed wheel, which holds no .pyx")
    return {path.relative_to(directory).as_posix(): path for path in sources}


def test_compiled_modules_import_down() -> None:
    found = []
    for name, path in compiled_sources().items():
        module = "ratethrottle." + name.rpartition(".")[0].replace("/", ".")
        imported = [a or b for a, b in CYTHON_IMPORT.findall(path.read_text())]
        found += [problem for other in imported for problem in problems(module, other)]
    assert not found


def test_compiled_modules_import_only_from_those_before_them() -> None:
    sources = {name: path.read_text() for name, path in compiled_sources().items()}
    stems = {name: name.rpartition(".")[0].replace("/", ".") for name in sources}
    assert set(stems.values()) == set(COMPILED)
    for name, source in sources.items():
        imported = [(a or b).removeprefix("ratethrottle.") for a, b in CYTHON_IMPORT.findall(source)]
        later = [part for part in imported if part in COMPILED and COMPILED.index(part) > COMPILED.index(stems[name])]
        assert not later, f"{name} imports {later}, which stand on it"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ratethrottle._engine.keys", "from ratethrottle._core import PendingDecision"),
        ("ratethrottle.rule", "from ratethrottle.storage.memory import InMemoryStorage"),
        ("ratethrottle.rule", "from ratethrottle import limiter"),
        ("ratethrottle.rule", "from . import limiter"),
        ("ratethrottle.storage.memory", "from ..limiter import RateThrottleCore"),
        ("ratethrottle.storage.redis.connection", "from ...cli import main"),
        ("ratethrottle.limiter", "def lazily():\n    import redis.asyncio"),
        ("ratethrottle.limiter", "from redis import Redis"),
        ("ratethrottle.limiter", "from ratethrottle import Decision"),
        ("ratethrottle.cli", "import ratethrottle.integrations.starlette"),
        ("ratethrottle.brand_new", "import ratethrottle.errors"),
    ],
)
def test_an_import_that_points_up_is_found(module: str, source: str) -> None:
    package = module.rpartition(".")[0]
    assert [p for imported in imports(source, package) for p in problems(module, imported)]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ratethrottle.storage.redis.storage", "import redis.asyncio"),
        ("ratethrottle.storage.redis.storage", "from ..memory import InMemoryStorage"),
        ("ratethrottle.limiter", "from ratethrottle.storage.redis import RedisStorage"),
        ("ratethrottle.limiter", "import redistribution"),
        ("ratethrottle.errors", "from ratethrottle._engine.decision import Decision"),
    ],
)
def test_an_import_that_points_down_passes(module: str, source: str) -> None:
    package = module.rpartition(".")[0]
    assert not [p for imported in imports(source, package) for p in problems(module, imported)]
