"""The results of coverage.py for one architecture, and the table of all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import transformers


@dataclass
class Result:
    """The results for one architecture. An error is the largest over all parameters, relative to each one's size."""

    name: str
    status: str = ""
    error: str = ""
    plain: str = ""
    plain_error: float = 0.0
    mst_error: float = 0.0
    mlps: int = 0
    mlps_looped: int = 0
    experts: int = 0
    grouped_looped: int = 0
    grouped_error: float = 0.0
    heads: int = 0
    heads_looped: int = 0
    graphs: int = 0
    plain_graphs: int = 0
    refusals: list[str] = field(default_factory=list)
    seconds: float = 0.0


def summary(results: list[Result]) -> str:
    """Return the totals, and the architectures that fall short of them."""
    trained = [result for result in results if result.plain == "ok"]
    right = [result for result in trained if result.status == "trains"]
    lines = [f"{len(results)} architectures; plain torch.compile trains {len(trained)}."]
    lines += [f"Same loss and gradients with mst_fx: {len(right)} of {len(trained)}."]
    lines += [f"    {r.name} {r.status}: {r.mst_error:.0e} {cell(r.error)}" for r in trained if r not in right]
    lines += shortfall("every MLP", right, lambda r: r.mlps + r.experts, lambda r: r.mlps_looped)
    grouped = [result for result in right if result.grouped_error]
    lines += shortfall("every MLP, experts grouped", grouped, lambda r: r.mlps + r.experts, lambda r: r.grouped_looped)
    lines += shortfall("every head", right, lambda r: r.heads, lambda r: r.heads_looped)
    lines += [f"Not ours: {n} {status}" for status, n in Counter(r.status for r in results if r.plain != "ok").items()]
    return "\n".join(lines)


def shortfall(
    what: str, results: list[Result], found: Callable[[Result], int], looped: Callable[[Result], int]
) -> Iterator[str]:
    """Return how many architectures have all of something looped, and the names of the others."""
    having = [result for result in results if found(result)]
    short = [result for result in having if looped(result) < found(result)]
    yield f"{what} looped: {len(having) - len(short)} of {len(having)}"
    for r in short:
        yield f"    not {r.name}: {looped(r)} of {found(r)}, {r.graphs} graphs; {cell('; '.join(r.refusals))}"


def table(results: list[Result]) -> str:
    """Return a Markdown table with one row for each architecture."""
    packages = f"torch {torch.__version__}, transformers {transformers.__version__}"
    lines = [f"# Coverage\n\n{packages}\n\n```text\n{summary(results)}\n```\n"]
    lines.append("| architecture | torch.compile | mst_fx | error | graphs | MLPs | heads | refusals, or what failed |")
    lines.append("|---|---|---|---|---|---|---|---|")
    for r in results:
        why = "<br>".join(cell(text) for text in [*r.refusals, r.error] if text)
        counts = f"{r.graphs} | {r.mlps_looped} / {r.mlps + r.experts} | {r.heads_looped} / {r.heads}"
        error = f"{r.mst_error:.0e}" if r.plain == "ok" else ""
        lines.append(f"| {r.name} | {r.plain or r.status} | {r.status} | {error} | {counts} | {why} |")
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    """Return the text so that it does not break a table."""
    return " ".join(text.split()).replace("|", "/")[:300]
