"""A hash of the sources that compiled code depends on: what another version of them made must not be reused.

The compilers' caches know the graph, the bodies in it and the options. They do not know how a loop is lowered and run:
those sources are found by following imports.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
IMPORT = re.compile(r"^\s*(?:from|import) (mst_fx(?:\.\w+)*)(?: import (\w+))?", re.MULTILINE)


def sources(*modules: str, root: Path = ROOT) -> list[Path]:
    """The files of modules, and of all that they import of the package, in any function.

    Args:
        modules: by their full names.
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
    """The file of a module, or of a package; of a name in a module, none."""
    path = root.joinpath(*module.split("."))
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return [file for file in candidates if file.is_file() and file.parent != root / "mst_fx"]


def _version() -> str:
    paths = sources("mst_fx.runtime.inductor_lowering", "mst_fx.runtime.mini_sequence")
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]


VERSION = _version()
