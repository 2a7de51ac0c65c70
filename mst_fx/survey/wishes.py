"""Notes for the report on the options `modules` and `disable`."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import replace
from difflib import SequenceMatcher
from itertools import takewhile

from torch.fx import GraphModule

from mst_fx.core.config import Config
from mst_fx.core.module_paths import matches, module_names
from mst_fx.core.torch_private.captured import graph_break, is_fragment
from mst_fx.survey.surveyed import Surveyed

log = logging.getLogger("mst_fx")

_warned: set[str] = set()

ALIKE = 0.6
"""Share of two paths that is the same text, from which on one may be meant for the other."""


def within_breaks(config: Config, gm: GraphModule) -> tuple[Config, tuple[str, ...]]:
    """Return the options that hold for a graph, and a sentence where they are not the user's; it is a warning.

    A graph that ends in a graph break gives its results to the rest of the function, which may read logits of any kind.
    """
    reason = graph_break(gm)
    if config.returned_logits == "keep" or not reason:
        return config, ()
    where = "in a fragment of a graph that Dynamo has divided for DDP" if is_fragment(gm) else "before a graph break"
    note = f"returned_logits: {config.returned_logits!r} does not hold {where} ({reason})"
    return replace(config, returned_logits="keep"), (note,)


def left_out(config: Config) -> tuple[str, ...]:
    """Return a note that names the patterns of the option `disable`, if there are any."""
    return (f"disable: without {', '.join(sorted(config.disable))}",) if config.disable else ()


def unmatched(config: Config, surveyed: Surveyed) -> tuple[str, ...]:
    """Return, and log once as a warning, a note for each path that matches no module, or no region that can be looped.

    The check sees one graph: where a model is captured in several graphs, a path may match a module of another one.
    """
    modules = _modules(surveyed)
    nodes = (node for site in surveyed.all_sites() for node in site.region.nodes)
    regions = set[str]().union(*map(module_names, nodes))
    notes = []
    for path, wish in config.modules.items():
        if not any(matches(module, path) for module in modules):
            notes.append(f"modules: {path!r} matches no module of this graph{_nearest(path, regions or modules)}")
        elif wish is not False and not any(matches(module, path) for module in regions):
            notes.append(f"modules: {path!r} matches no region that can be looped in this graph")
    for note in notes:
        if note not in _warned:  # layers that are compiled one by one would all say so
            _warned.add(note)
            log.warning("mst_fx: %s", note)
    return tuple(notes)


def _modules(surveyed: Surveyed) -> set[str]:
    """Return the names of the modules whose calls made the graph and its subgraphs."""
    own = set[str]().union(*map(module_names, surveyed.reader.owner.graph.nodes))
    return own.union(*(_modules(child) for child, _ in surveyed.children.values()))


def _nearest(path: str, modules: Collection[str]) -> str:
    """Return a hint at the module that a path may mean: one that ends alike, or reads much like it."""

    def likeness(module: str) -> tuple[int, float]:
        same = takewhile(
            lambda pair: pair[0] == pair[1], zip(path.split(".")[::-1], module.split(".")[::-1], strict=False)
        )
        return len(list(same)), SequenceMatcher(None, path, module).ratio()

    nearest = max(sorted(filter(None, modules)), key=likeness, default="")
    return f"; there is {nearest!r}" if likeness(nearest) > (0, ALIKE) else ""
