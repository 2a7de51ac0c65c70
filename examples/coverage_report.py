"""The results of coverage.py for one architecture, the table of all, and what is not looped, by its reason."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

import torch
import transformers


@dataclass
class Result:
    """The results for one architecture. An error is the largest over all parameters, relative to each one's size.

    `left` has the largest values that no loop covers, and why, as the reports tell it.
    """

    name: str
    status: str = ""
    error: str = ""
    plain: str = ""
    plain_error: float = 0.0
    eager_error: float = 0.0
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
    left: list[str] = field(default_factory=list)
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
    for what in dict.fromkeys(r.status for r in results if r.plain != "ok"):
        names = [f"{r.name} ({cell(r.error)[:80]})" for r in results if r.plain != "ok" and r.status == what]
        lines += [f"Without mst_fx, {what}: {len(names)}", *(f"    {name}" for name in names)]
    return "\n".join(lines)


def shortfall(
    what: str, results: list[Result], found: Callable[[Result], int], looped: Callable[[Result], int]
) -> Iterator[str]:
    """Return how many architectures have all of something looped, and the names of the others."""
    having = [result for result in results if found(result)]
    short = [result for result in having if looped(result) < found(result)]
    of_all, all_of = sum(min(looped(r), found(r)) for r in having), sum(map(found, having))
    share = f"{of_all} of {all_of} ({100 * of_all / max(all_of, 1):.1f} %)"
    yield f"{what} looped: in {len(having) - len(short)} of {len(having)} architectures, {share}"
    for r in short:
        yield f"    not {r.name}: {looped(r)} of {found(r)}, {r.graphs} graphs; {cell('; '.join(why_not(r)))}"


def why_not(result: Result) -> list[str]:
    """Return what the reports say of the parts that are not looped."""
    return [*result.refusals, *(text for text in result.left if not text.startswith("NO_GAIN"))]


def table(results: list[Result], missing: list[str]) -> str:
    """Return a Markdown table with one row for each architecture, and one of the reasons.

    Args:
        results: of all architectures.
        missing: names of packages that are not installed.
    """
    packages = f"torch {torch.__version__}, transformers {transformers.__version__}"
    others = sorted({r.name.partition(".")[0] for r in results} & {*PACKAGES})
    packages += "".join(f", {PACKAGES[name]} {_version(PACKAGES[name])}" for name in others)
    packages += f"\n\nNot installed, so left out: {', '.join(missing)}." if missing else ""
    lines = [f"# Coverage\n\n{packages}\n\n```text\n{summary(results)}\n```\n"]
    lines.append(
        "| architecture | torch.compile | mst_fx | eager's error | ours | graphs | MLPs | heads | not looped |"
    )
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for r in results:
        short = r.mlps_looped < r.mlps + r.experts or r.heads_looped < r.heads
        why = "<br>".join(cell(text) for text in [*(why_not(r)[:4] if short else r.refusals), r.error] if text)
        counts = f"{r.graphs} | {r.mlps_looped} / {r.mlps + r.experts} | {r.heads_looped} / {r.heads}"
        error = f"{r.eager_error:.0e} | {r.mst_error:.0e}" if r.plain == "ok" else " | "
        lines.append(f"| {r.name} | {r.plain or r.status} | {r.status} | {error} | {counts} | {why} |")
    return "\n".join([*lines, "", *reasons(results)]) + "\n"


def reasons(results: list[Result]) -> Iterator[str]:
    """Return a Markdown table of what no loop covers: each reason, in how many architectures, and one place."""
    found: dict[str, list[tuple[str, str]]] = {}
    for result in results:
        for text in result.left:
            words = re.match(r"(.*?)( \([\w.<>-]+:\d+.*)?$", text, re.DOTALL)
            assert words is not None
            found.setdefault(words[1], []).append((result.name, (words[2] or "").strip()))
    yield "## What no loop covers, and why, in the words of the reports\n"
    yield "| reason | architectures | one of them |"
    yield "|---|---|---|"
    for reason, places in sorted(found.items(), key=lambda item: (-len({*item[1]}), item[0])):
        name, place = places[0]
        yield f"| {cell(reason)} | {len({name for name, _ in places})} | {name} {cell(place)} |"


PACKAGES = {
    "diffusers": "diffusers",
    "esm": "fair-esm",
    "litgpt": "litgpt",
    "mambapy": "mambapy",
    "olmo": "ai2-olmo",
    "open_clip": "open_clip_torch",
    "timm": "timm",
    "torchtitan": "torchtitan",
    "torchtune": "torchtune",
    "vit_pytorch": "vit-pytorch",
    "x_transformers": "x-transformers",
    "xlstm": "xlstm",
}
"""The names under which packages are imported, and those under which they are installed."""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "?"


def cell(text: str) -> str:
    """Return the text so that it does not break a table, and without the folders of files."""
    return re.sub(r"(?<= )/\S+/", "", " ".join(text.split())).replace("|", "/")[:300]
