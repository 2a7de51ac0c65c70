"""The option `debug_dir`: the graph before and after, and the report, as files that people read.

NNN_captured.py  the graph as Dynamo captured it
NNN_looped.py    the graph that is compiled, with the bodies of its loops; none where nothing is changed
NNN_report.txt   the report, as text
NNN_report.json  the same, as `Report.to_json`

NNN is the first number that is free in the folder, so compiles of several processes and runs stand side by side.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.fx import GraphModule

if TYPE_CHECKING:
    from mst_fx.report.report import Report

log = logging.getLogger("mst_fx")


class DebugFiles:
    """Writes the files of one compile.

    An error is a warning and costs the files, not the compile.

    Args:
        folder: where they go; it is made where it is missing. None for no files.
        strict: raise errors.
    """

    def __init__(self, folder: str | PathLike[str] | None, *, strict: bool = False) -> None:
        self._folder = Path(folder) if folder is not None else None
        self._strict = strict
        self._number = ""
        self._captured = self._given = ""

    def captured(self, gm: GraphModule) -> None:
        """Write the captured graph."""
        self._try(lambda: self._write_captured(gm))

    def watching(self, compile_graph: Callable[..., Any]) -> Callable[..., Any]:
        """Return a compiler that writes the graph that it has compiled: the last one, if it compiles several."""
        if self._folder is None:
            return compile_graph

        def watched(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            self._try(lambda: self._keep(gm))  # before it compiles: compilers change the graph that they get
            compiled: Callable[..., Any] = compile_graph(gm, inputs)
            self._try(self._write_looped)
            return compiled

        return watched

    def looped(self, gm: GraphModule) -> None:
        """Write the graph with loops."""
        self._try(lambda: self._keep(gm))
        self._try(self._write_looped)

    def report(self, report: Report) -> None:
        """Write the report."""
        self._try(lambda: self._write("report.txt", f"{report}\n"))
        self._try(lambda: self._write("report.json", report.to_json(indent=1)))

    def _try(self, write: Callable[[], object]) -> None:
        if self._folder is None:
            return
        try:
            write()
        except Exception as error:
            if self._strict:
                raise
            log.warning("mst_fx: debug_dir: %s: nothing more is written", error)
            self._folder = None

    def _write_captured(self, gm: GraphModule) -> None:
        assert self._folder is not None
        self._captured = _text(gm)
        self._folder.mkdir(parents=True, exist_ok=True)
        taken = (re.match(r"(\d+)_", path.name) for path in self._folder.iterdir())
        number = max((int(found[1]) + 1 for found in taken if found), default=0)
        while True:
            self._number = f"{number:03d}"
            try:
                with (self._folder / f"{self._number}_captured.py").open("x", encoding="utf-8") as file:
                    file.write(self._captured)
                return
            except FileExistsError:  # another process has just taken it
                number += 1

    def _keep(self, gm: GraphModule) -> None:
        self._given = _text(gm)

    def _write_looped(self) -> None:
        if self._given != self._captured:
            self._write("looped.py", self._given)
        elif self._folder is not None:
            (self._folder / f"{self._number}_looped.py").unlink(missing_ok=True)

    def _write(self, name: str, text: str) -> None:
        assert self._folder is not None
        (self._folder / f"{self._number}_{name}").write_text(text, encoding="utf-8")


def _text(gm: GraphModule) -> str:
    """Return a graph and its subgraphs as code, with shapes, strides and devices."""
    return gm.print_readable(print_output=False, include_stride=True, include_device=True) + "\n"
