"""What a file in passes/ defines (one pattern, which recognises regions of one kind), and what it may use for that."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from typing import ClassVar, TypeVar

from torch.fx import Node

from mst_fx.core.graph_walk import ancestors as ancestors
from mst_fx.core.provenance import Borders as Borders
from mst_fx.core.provenance import op_name as op_name
from mst_fx.core.refusal import Reason as Reason
from mst_fx.core.refusal import Refusal as Refusal
from mst_fx.recognise.contractions import Contraction as Contraction
from mst_fx.recognise.fragments import DIVIDED as DIVIDED
from mst_fx.recognise.fragments import comes_from_another as comes_from_another
from mst_fx.recognise.grown_regions import best_region as best_region
from mst_fx.recognise.grown_regions import whole_region as whole_region
from mst_fx.recognise.growth import Growth as Growth
from mst_fx.recognise.growth import grow as grow
from mst_fx.recognise.growth import within as within
from mst_fx.recognise.heads import heads_region as heads_region
from mst_fx.recognise.reader import Reader as Reader
from mst_fx.recognise.region import Region as Region


class Pattern(ABC):
    """Recognises regions of one kind. The engine grows, plans, loops and splices them.

    Attributes:
        name: the name in reports and in the option `disable`.
        priority: the engine asks patterns with a lower number first.
    """

    name: ClassVar[str]
    priority: ClassVar[int] = 100

    @abstractmethod
    def match(self, reader: Reader, node: Node) -> Region | None:
        """Return the region that `node` begins, None where the node begins no such region.

        Raises:
            Refusal: the node begins such a region, but something in it must not be looped.
        """


PatternClass = TypeVar("PatternClass", bound=type[Pattern])
_REGISTRY: dict[str, Pattern] = {}


def register(pattern: PatternClass) -> PatternClass:
    """Make a pattern known to every later compile: a class decorator.

    Raises:
        ValueError: another pattern has the name.
    """
    if pattern.name in _REGISTRY:
        raise ValueError(f"mst_fx: two patterns are called {pattern.name!r}")
    _REGISTRY[pattern.name] = pattern()
    return pattern


def patterns(disable: tuple[str, ...] = ()) -> list[Pattern]:
    """Return all registered patterns but the disabled ones, by priority and name.

    Raises:
        ValueError: `disable` holds a name that no pattern has; the message lists the names.
    """
    package = importlib.import_module("mst_fx.passes")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"mst_fx.passes.{module.name}")
    unknown = set(disable) - set(_REGISTRY)
    if unknown:
        raise ValueError(f"mst_fx: no pattern is called {sorted(unknown)}; there are {sorted(_REGISTRY)}")
    known = sorted(_REGISTRY.values(), key=lambda pattern: (pattern.priority, pattern.name))
    return [pattern for pattern in known if pattern.name not in disable]
