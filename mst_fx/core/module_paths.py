"""Where a captured node stands among the user's modules, whatever wraps them or calls them.

Terms
  source   torch's text for a module: `L['self'].model.layers.0` begins with the variable that it was found by
  root     the compiled module, or one that the compiled function found in a local, a global, an attribute or an item
           of what is no module; paths begin below it
  chain    the modules that hand everything to one module inside of them, from the root on: wrappers
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import takewhile

from torch.fx import GraphModule, Node

from mst_fx.core.provenance import source_line
from mst_fx.core.torch_private.captured import WRAPPED, WRAPPED_MODEL, source_of

_HOLDER = r"(?:\.__dict__\['_(?:modules|parameters|buffers)'\]|\._(?:modules|parameters|buffers)(?=\[))"


@dataclass(frozen=True)
class Landmarks:
    """What paths of a captured graph are told by.

    Attributes:
        roots: sources of the roots whose parameters the graph reads.
        chain: names on the way from the root to the innermost module that all others of the graph lie in.
        modules: paths of the innermost modules around the nodes.
    """

    roots: tuple[str, ...] = ()
    chain: tuple[str, ...] = ()
    modules: frozenset[str] = frozenset()


NONE = Landmarks()
_known: ContextVar[Landmarks] = ContextVar("_known", default=NONE)


@contextmanager
def knowing(landmarks: Landmarks) -> Iterator[None]:
    """Let the functions below go by the landmarks of a graph."""
    token = _known.set(landmarks)
    try:
        yield
    finally:
        _known.reset(token)


def landmarks_of(gm: GraphModule) -> Landmarks:
    """Return the landmarks of a captured graph; those of its subgraphs are the same."""
    sources = (re.split(_HOLDER, source_of(node), maxsplit=1) for node in gm.graph.find_nodes(op="placeholder"))
    roots = tuple(dict.fromkeys(parts[0] for parts in sources if len(parts) > 1))
    with knowing(Landmarks(roots)):
        owners = [owner for owner in gm.modules() if isinstance(owner, GraphModule)]
        stacks = [_paths(node) for owner in owners for node in owner.graph.nodes]
    innermost = frozenset(stack[-1] for stack in stacks if stack and stack[-1])
    return Landmarks(roots, _chain(stacks, innermost), innermost)


def _chain(stacks: Sequence[Sequence[str]], innermost: Collection[str]) -> tuple[str, ...]:
    """Return the chain of a graph. An item of a list is no wrapper, and a list of modules is none: nobody calls it."""
    names = list(takewhile(lambda name: not name.isdecimal(), common_path(innermost).split(".")))
    called = {path for stack in stacks for path in stack}
    while names and ".".join(names) not in called:
        names.pop()
    return tuple(filter(None, names))


def module_path(node: Node) -> str:
    """Return the dotted path of the innermost module around the node ("model.layers.0.mlp"), "" at the top."""
    paths = _paths(node)
    return paths[-1] if paths else ""


class At:
    """Where a region or an op is, in words, for messages: its text is made when one is written.

    Args:
        node: of a captured graph; None for the whole graph.
        region: the region that it is in; what has no attribute `module` is none.
    """

    def __init__(self, node: Node | None, region: object = None) -> None:
        self.node, self.region = node, region

    def __str__(self) -> str:
        if self.node is None:
            return "the whole graph"
        source = re.match(r".*?([^/\\]+:\d+): ", source_line(self.node))
        module = getattr(self.region, "module", None)
        told = module_path(self.node) if module is None else module
        return (told or "the top") + (f" ({source[1]})" if source else "")


def module_names(node: Node) -> set[str]:
    """Return the path of the innermost module around the node, with and without the wrappers that it begins with."""
    path, chain = module_path(node).split("."), _known.get().chain
    shared = chain if tuple(path[: len(chain)]) == chain else ()
    return {".".join(path[skipped:]) for skipped in range(len(shared) + 1)}


def common_path(paths: Collection[str]) -> str:
    """Return the path of the innermost module that all modules with these paths are or lie in, "" at the top."""
    levels = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, levels))


def _paths(node: Node) -> Sequence[str]:
    """Return the paths of the modules around a node, from the outermost to the innermost.

    A module that is called by the program itself is a root, too. It begins a path only where its parameters do not tell
    that it lies in another module, so it does not where no root is known.
    """
    stack = [str(entry[0]) for entry in (node.meta.get("nn_module_stack") or {}).values()]
    return _paths_of(tuple(stack), _known.get().roots)


@lru_cache(maxsize=10_000)
def _paths_of(sources: tuple[str, ...], roots: tuple[str, ...]) -> Sequence[str]:
    candidates = sorted(map(_plain, (*roots, *sources[:1])), key=len) if roots else []
    return [_below(candidates, _plain(source)) for source in sources]


def _below(roots: Sequence[tuple[str, ...]], source: tuple[str, ...]) -> str:
    """Return a source without the first of these roots that it begins with, or else without its variable."""
    begin = next((len(root) for root in roots if source[: len(root)] == root), 2)
    return ".".join(name for name in source[begin:] if name not in WRAPPED)


def _plain(source: str) -> tuple[str, ...]:
    """Return the names in a source: L['self']._modules['layers'][0] -> L, self, layers, 0."""
    dotted = re.sub(r"\['?([^'\]]*)'?\]", r".\1", re.sub(_HOLDER, "", source))
    return tuple(dotted.split("."))


def matches(path: str, written: str) -> bool:
    """Return whether a module's path matches what the option `modules` says, or lies inside a module that does.

    Wrappers of torch may be written. `*.` in front stands for nothing, too. A graph may begin at a part of the model,
    behind a graph break: names in front of that part may be written where no module of the graph matches with them.
    """
    if _is_plain_match(path, written):
        return True
    parts = _parts(written)
    if not any(fnmatchcase(path, part) or fnmatchcase(path, f"{part}.*") for part in parts):
        return False
    return not _is_there(_known.get(), written)


def _is_plain_match(path: str, written: str) -> bool:
    return any(fnmatchcase(path, form) or fnmatchcase(path, f"{form}.*") for form in _forms(written))


@lru_cache(maxsize=1000)
def _is_there(landmarks: Landmarks, written: str) -> bool:
    return any(_is_plain_match(path, written) for path in landmarks.modules)


@lru_cache(maxsize=1000)
def _parts(written: str) -> Sequence[str]:
    """Return what is written without names in front, of two names or more: an item of a list is none to leave out."""
    names = [name for name in written.split(".") if name not in WRAPPED]
    front = list(takewhile(str.isidentifier, names))
    return [".".join(names[skipped:]) for skipped in range(1, min(len(front), len(names) - 2) + 1)]


@lru_cache(maxsize=1000)
def _forms(written: str) -> Collection[str]:
    own = ".".join(name for name in written.split(".") if name not in WRAPPED)
    return {own, own.removeprefix(f"{WRAPPED_MODEL}."), own.removeprefix("*.")}
