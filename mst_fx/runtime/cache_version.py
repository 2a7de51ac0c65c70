"""A hash of the source files that compiled code depends on: caches must not reuse what another version made.

The compilers' caches know the graph, the bodies in it and the options. They do not know how a loop is lowered and run:
this module finds those source files by their imports.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
IMPORT = re.compile(r"^\s*(?:from|import) (mst_fx(?:\.\w+)*)(?: import (\w+))?", re.MULTILINE)


def sources(*modules: str, root: Path = ROOT) -> list[Path]:
    """Return the source files of modules, and of all that they import from the package, in functions too; sorted.

    Args:
        modules: full names of the modules.
        root: the folder that holds the package.
    """
    found: set[Path] = set()
    pending = [path for module in modules for path in _files(module, root)]
    while pending:
        path = pending.pop()
        if path not in found:
            found.add(path)
            for package, name in IMPORT.findall(path.read_text(encoding="utf-8")):
                pending += [*_files(package, root), *_files(f"{package}.{name}", root)]
    return sorted(found)


def _files(module: str, root: Path) -> list[Path]:
    """Return the file of a module or of a package; none for a name inside a module."""
    path = root.joinpath(*module.split("."))
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return [file for file in candidates if file.is_file() and file.parent != root / "mst_fx"]


def _version() -> str:
    names = ("runtime.inductor_lowering", "runtime.mini_sequence", "runtime.offload_partition", "ops.shards")
    paths = sources(*(f"mst_fx.{name}" for name in names))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]


VERSION = _version()
