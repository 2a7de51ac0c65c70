"""The layout of the package: data flows one way, and each package says what it may import."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import mst_fx

ROOT = Path(mst_fx.__file__).parent
PACKAGES = sorted(path.parent.name for path in ROOT.glob("*/__init__.py") if path.parent.name != "passes")
FIELDS = re.compile(r"In: (.+?)\.\nOut: (.+?)\.\nImports: (.+?)\.\n?$", re.DOTALL)


def imported(path: Path) -> set[str]:
    """The modules of mst_fx that a file imports, in functions as well."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name for name in names if name and name.startswith("mst_fx.")}
    return found


def allowed(package: str) -> list[str]:
    """What the docstring of a package says that it imports."""
    text = FIELDS.search(ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text())))
    assert text, f"mst_fx/{package}/__init__.py does not say what comes in, what goes out and what it imports"
    return [] if text[3] == "nothing of mst_fx" else text[3].split(", ")


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_what_it_says(package):
    used = {name.split(".")[1] for path in (ROOT / package).rglob("*.py") for name in imported(path)}
    assert used - {package} == set(allowed(package))


def test_imports_point_one_way():
    """Each package can be put behind all that it imports."""
    waiting, placed = dict(zip(PACKAGES, map(allowed, PACKAGES), strict=True)), set()
    while waiting:
        ready = {package for package, needs in waiting.items() if placed.issuperset(needs)}
        assert ready, f"imports in a circle: {waiting}"
        placed |= ready
        waiting = {package: needs for package, needs in waiting.items() if package not in ready}


def test_few_rooms():
    straight = [path for path in ROOT.iterdir() if path.is_file() and path.suffix in (".py", ".md")]
    assert len(straight) <= 9
    assert 5 <= len(PACKAGES) <= 14


def test_patterns_import_one_module_of_the_engine():
    for path in (ROOT / "passes").glob("*.py"):
        assert {name for name in imported(path) if not name.startswith("mst_fx.passes")} <= {"mst_fx.recognise.pattern"}


def test_every_package_is_installed():
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    listed = set(re.findall(r'"(mst_fx[.\w]*)",', pyproject.split("packages = [")[1].split("]")[0]))
    folders = {path.parent.relative_to(ROOT.parent) for path in ROOT.rglob("__init__.py")}
    assert {".".join(folder.parts) for folder in folders} | {"mst_fx.passes"} == listed


def test_tests_stand_where_their_modules_do():
    """A folder for each package, one for the whole, one for the repository; shared modules hold no test."""
    tests = Path(__file__).parents[1]
    folders = {path.parent.relative_to(tests).as_posix() for path in tests.rglob("test_*.py")}
    assert folders == {*PACKAGES, "passes", "placement/rules", "end_to_end", "repository"}


def test_slow_tests_run_unless_they_are_left_out():
    """`slow` deselects nothing by itself, neither here nor in what every change must pass."""
    root = Path(__file__).parents[2]
    (options,) = re.findall(r"^addopts = (.+)$", (root / "pyproject.toml").read_text(), re.M)
    assert "slow" not in options + (root / ".ci/run").read_text() + (root / "README.md").read_text()


def private_names(path: Path) -> set[str]:
    """Names of torch that a file uses and that torch does not document for users, but for pytrees and op overloads."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute):
            found.add(ast.unparse(node))
    private = {
        name for name in found if re.match(r"torch\.(fx\.experimental|fx\.passes|(\w+\.)*_[a-z])", name, re.IGNORECASE)
    }
    return {name for name in private if not re.match(r"torch\.(_ops\b|utils\._pytree|_check$)", name)}


def test_private_api_stands_in_one_package():
    """Its files use some, and no other file does."""
    users = {path for path in [*ROOT.rglob("*.py"), *(ROOT / "passes").glob("*.py")] if private_names(path)}
    assert users == {path for path in (ROOT / "core/torch_private").glob("*.py") if path.stem != "__init__"}
