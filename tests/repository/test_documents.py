"""The documents: their examples run, their links lead somewhere, and what they list is what there is."""

from __future__ import annotations

import ast
import dataclasses
import doctest
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import mst_fx
from mst_fx.placement.rules import registry
from mst_fx.recognise import pattern

ROOT = Path(__file__).parents[2]
FOLDERS = ("", ".github", "examples", "examples/benchmarks", "mst_fx", "passes", "tests")
DOCUMENTS = sorted(path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).glob("*.md"))
WITH_EXAMPLES = ("README.md", "mst_fx/README.md", "passes/README.md")
WITH_CHECKLISTS = (".github/CONTRIBUTING.md", "passes/README.md", "tests/README.md")
SEEN = "2.13."
"""The version of torch whose graphs the examples show; others may have other names for the same ops."""

OUTLIVE: list[dict[str, Any]] = []
"""Globals of what was compiled: Dynamo cleans up in them when its own things go, which may be later."""


class Example(NamedTuple):
    """A block of Python in a document; `reason` says why it cannot run, if it cannot."""

    language: str
    code: str
    line: int
    reason: str


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def examples(document: str) -> Iterator[Example]:
    """The blocks of Python; one that cannot run has a line `<!-- not run: the reason -->` in front of it."""
    text = text_of(document)
    for found in re.finditer(r"(?:^<!-- not run: (.+?) -->\n)?^```(python|pycon)\n(.*?)^```$", text, re.M | re.S):
        yield Example(found[2], found[3], text.count("\n", 0, found.start(2)) + 1, found[1] or "")


def prose(document: str) -> str:
    """The text without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text_of(document), flags=re.M | re.S)


def section(document: str, title: str) -> str:
    """What stands under a heading, up to the next one."""
    _, rest = text_of(document).split(f"\n## {title}\n")
    return rest.split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """The cells of a table, the head left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def of_the_reader() -> dict[str, Any]:
    """What the README leaves to its reader: a function that trains, and a batch."""
    table, head = (torch.randn(32, 8, requires_grad=True) for _ in range(2))
    ids, labels = torch.randint(32, (2, 1, 16))

    def train_step(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(table[ids], head).flatten(0, 1), labels.flatten())

    return {"mst_fx": mst_fx, "torch": torch, "train_step": train_step, "ids": ids, "labels": labels}


def run(blocks: list[Example], document: str, names: dict[str, Any]) -> None:
    OUTLIVE.append(names)
    for block in blocks:
        exec(compile("\n" * block.line + block.code, str(ROOT / document), "exec", dont_inherit=True), names)


def run_prompts(blocks: list[Example], document: str, names: dict[str, Any]) -> None:
    """Run blocks with prompts as one, as doctest finds lines of code by their numbers; compare what they print."""
    text = ""
    for block in blocks:
        text += "\n" * (block.line - text.count("\n")) + block.code
    test = doctest.DocTestParser().get_doctest(text, names, document, document, 0)
    OUTLIVE.append(test.globs)
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    failed, _ = runner.run(test, out=said.append, clear_globs=False)
    raised = [text for text in said if "Exception raised" in text]
    assert not (failed and torch.__version__.startswith(SEEN)), "".join(said)
    assert not raised, "".join(raised)


@pytest.mark.parametrize("document", WITH_EXAMPLES)
def test_examples_run(monkeypatch, document):
    """All of a document in one namespace. What they register is forgotten again."""
    pattern.patterns()
    monkeypatch.setattr(pattern, "_REGISTRY", dict(pattern._REGISTRY))
    for table in ("_RULES", "_BACKS"):
        monkeypatch.setattr(registry, table, dict(getattr(registry, table)))
    torch._dynamo.reset()
    names = of_the_reader() if document == "README.md" else {}
    blocks = [block for block in examples(document) if not block.reason]
    assert len({block.language for block in blocks}) == 1
    (run_prompts if blocks[0].language == "pycon" else run)(blocks, document, names)


def test_no_other_document_has_examples():
    assert [document for document in DOCUMENTS if any(examples(document))] == sorted(WITH_EXAMPLES)


def test_the_readme_is_short():
    assert len(text_of("README.md").splitlines()) <= 230


def test_every_reason_stands_in_troubleshooting():
    told = [reason for reason, *_ in rows(section("examples/troubleshooting.md", "By reason"))]
    assert told == [reason.name for reason in mst_fx.Reason]


def test_the_readme_has_the_command_that_runs_the_tests():
    """It is read by a script."""
    assert re.search(r"```sh\n.+ -m pytest\n```", section("README.md", "Run the tests"))


def test_every_option_stands_in_the_readme():
    told = [cells[0] for cells in rows(section("README.md", "Options"))]
    assert told == [f"`{field.name}`" for field in dataclasses.fields(mst_fx.Config)]


def anchors(document: str) -> set[str]:
    """The headings, as they are linked to."""
    headings = re.findall(r"^#+ (.+)$", prose(document), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        # not resolved: mst_fx/passes is a link to a folder beside it
        there = Path(os.path.normpath(ROOT / Path(document).parent / path)) if path else ROOT / document
        assert there.exists(), f"{document}: {link}"
        if anchor:
            assert anchor in anchors(there.relative_to(ROOT).as_posix()), f"{document}: {link}"


@pytest.mark.parametrize("document", WITH_CHECKLISTS)
def test_files_that_are_named_exist(document):
    """Paths stand in backticks, from the root of the repository; <name> is for the reader to fill in."""
    named = re.findall(
        r"`((?!\.venv/)(?:\.?\w+/)+[\w.]+|[A-Z]+\.(?:md|cff)|pyproject\.toml)(?:::\w+)?`", prose(document)
    )
    assert named
    for path in named:
        assert (ROOT / path).exists(), f"{document}: {path}"


def test_tests_that_are_named_exist():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text_of("tests/README.md"))
    assert named
    for path, name in named:
        tree = ast.parse((ROOT / path).read_text())
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, f"{path}::{name}"


def test_every_file_of_the_suite_is_told():
    told = text_of("tests/README.md")
    files = [path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")]
    assert [file for file in files if file not in told] == []


def glossary() -> dict[str, str]:
    pairs = [cells[i : i + 2] for cells in rows(section("mst_fx/README.md", "Glossary")) for i in (0, 2)]
    assert len({word for word, _ in pairs}) == len(pairs)
    return dict(pairs)


def test_the_glossary_is_short_and_its_words_are_used():
    words = glossary()
    assert len(words) <= 40
    code = "\n".join(path.read_text() for path in (ROOT / "mst_fx").rglob("*.py")).lower()
    assert [word for word in words if not re.search(rf"\b{word.replace(' ', '[ _]').lower()}", code)] == []


def test_private_api_of_torch_is_told():
    """Each file of it stands in the table, with the versions that its docstring says."""
    told = {}
    for _, _, file, versions, _ in rows(section("mst_fx/README.md", "Private torch API")):
        told[re.findall(r"\]\((.+?)\)", file)[0]] = versions
    found = {}
    for path in (ROOT / "mst_fx/core/torch_private").glob("*.py"):
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        if path.stem != "__init__":
            (versions,) = re.findall(r"^Private torch API: .+ Run on torch (.+)\.$", docstring, re.M)
            found[path.relative_to(ROOT / "mst_fx").as_posix()] = versions.replace(" and", ",")
    assert told == found


def test_every_package_is_told():
    told = {re.sub(r"\[(\w+)\].*", r"\1", cells[0]) for cells in rows(section("mst_fx/README.md", "The packages"))}
    packages = {path.parent.name for path in (ROOT / "mst_fx").glob("*/__init__.py")}
    assert told == packages | {"passes"}


def test_one_version():
    (package,) = re.findall(r'^version = "(.+)"$', text_of("pyproject.toml"), re.M)
    newest = re.findall(r"^## \[(\d.*?)\]", text_of("CHANGELOG.md"), re.M)[0]
    (cited,) = re.findall(r"^version: (.+)$", text_of("CITATION.cff"), re.M)
    (not_installed,) = re.findall(r'^    __version__ = "(.+)"$', text_of("mst_fx/__init__.py"), re.M)
    assert newest == cited == package == not_installed == mst_fx.__version__
