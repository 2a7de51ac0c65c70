"""enable(): plain torch.compile goes through the pass, at Inductor's own place for passes on captured graphs.

Trainers check the name of a backend against a closed list that has "inductor". Inductor runs its option
`pre_grad_custom_pass` on the graph that Dynamo captured, before AOTAutograd: what `backend` gets, too.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, GraphModule

from mst_fx.core.config import Config
from mst_fx.core.graph_modules import take_over
from mst_fx.core.refusal import Reason, Refusal
from mst_fx.core.torch_private import inductor
from mst_fx.core.torch_private.captured import is_captured
from mst_fx.core.torch_private.inductor import PARTITIONER
from mst_fx.inner_compiler import cached_with_loops, is_of_our_backend, partitioned
from mst_fx.pipeline import looped_and_told
from mst_fx.report.items import refused
from mst_fx.report.report import Report, record

log = logging.getLogger("mst_fx")

PLACE = "pre_grad_custom_pass"
TIMING = "pre_grad_pass_timing"
CACHEABLE = "unsafe_marked_cacheable_functions"


class LoopPass:
    """The pass as Inductor calls it, together with the passes that the user had set before.

    Attributes:
        config: the user's options.
        others: the user's own passes; they run first, as they would without this one.
        before: Inductor's options as they were, which `disable` restores.
    """

    def __init__(self, config: Config, others: tuple[Callable[[Graph], None], ...], before: dict[str, Any]) -> None:
        self.config, self.others, self.before = config, others, before

    def __call__(self, graph: Graph) -> None:
        """Change a graph in place. Subgraphs, for which Inductor calls as well, change with the graph around them."""
        for other in self.others:
            other(graph)
        if is_of_our_backend():
            return
        gm = graph.owning_module
        if not isinstance(gm, GraphModule):
            text = "Inductor hands over a graph that belongs to no module, or to several"
            log.warning("mst_fx: %s; not looped", text)
            record(Report(refusals=(refused("all", Refusal(Reason.INTERNAL, None, text)),)))
            return
        if not is_captured(gm):
            return
        changed = looped_and_told(gm, self.config)
        if changed is not gm:
            take_over(gm, changed)

    def enter(self) -> None:
        """Take the place in Inductor."""
        inductor.set_option(PLACE, self)
        if TIMING in self.before:
            inductor.set_option(TIMING, "early")  # in front of the caches: their keys then hold the loops
        options = {**cached_with_loops(), **(partitioned(self.before) if PARTITIONER in self.before else {})}
        for name, value in options.items():
            inductor.set_option(name, value)

    def uuid(self) -> str | None:
        """Return a name for what the pass does, for caches that are asked before it runs; None if others have none."""
        theirs = [getattr(other, "uuid", lambda: None)() for other in self.others]
        if None in theirs:
            return None
        own = Path(__file__).parent
        files = sorted({*own.rglob("*.py"), *(own / "passes").glob("*.py")})  # it may be a link, which rglob passes by
        parts = [*(path.read_bytes() for path in files), repr(self.config).encode(), repr(theirs).encode()]
        return hashlib.sha256(b"\0".join(parts)).hexdigest()


def enable(**options: Any) -> None:
    """Let every later `torch.compile` of this process that uses Inductor, its default, go through the pass.

    Call it before the first step: what is compiled already stays as it is (`torch._dynamo.reset()` lets go of it).
    Options of mst_fx are given here; the caller's `mode=` and `options=` hold as without it. `backend="mst_fx"` keeps
    its own options, and loops once. Left alone are other backends than Inductor, and compiles whose own options switch
    this place off (`use_pre_grad_passes`, mode "lite") or take it (`pre_grad_custom_pass`). A pass that Inductor's
    configuration holds already is kept, and runs first.

    The pass runs in front of Inductor's caches, so each compile has its report (`mst_fx.reports`). An error inside the
    pass costs the loop that it hits; an error that Inductor raises on a loop ends the compile, unlike with
    `backend="mst_fx"`, which then compiles without this loop.

    Args:
        **options: of `Config`, but for `inner` and `mode`. Logits that are dropped are None, with a warning. A second
            call replaces the options of the first.

    Raises:
        ValueError: an unknown option or pattern name, options that exclude each other, `inner` or `mode`.
        TypeError: an option has a value that it does not take.
        RuntimeError: this torch version has no such place for a pass, or it is switched off.
    """
    config, _ = Config.split(options, frozenset())
    if "inner" in options:
        raise ValueError("mst_fx: enable() works inside Inductor; for another compiler, use backend='mst_fx'")
    if config.mode is not None:
        raise ValueError("mst_fx: with enable(), mode= is an argument of torch.compile alone")
    if not inductor.has_option(PLACE):
        raise RuntimeError(
            f"mst_fx: Inductor of torch {torch.__version__} has no option {PLACE!r}, so enable() cannot work; "
            "use torch.compile(..., backend='mst_fx')"
        )
    if inductor.has_option("use_pre_grad_passes") and not inductor.option("use_pre_grad_passes"):
        raise RuntimeError("mst_fx: Inductor's option use_pre_grad_passes is off, so enable() cannot work")
    if config.disable:
        from mst_fx.recognise.pattern import patterns  # late, as in `pipeline`

        patterns(config.disable)
    disable()
    names = (PLACE, TIMING, CACHEABLE, *([PARTITIONER] if config.offload else []))
    before = {name: inductor.option(name) for name in names if inductor.has_option(name)}
    inductor.register_pass(LoopPass)
    LoopPass(config, _passes(before[PLACE]), before).enter()


def disable() -> None:
    """Undo `enable`: later compiles are plain ones again. Without an `enable` before, it does nothing."""
    now = _installed()
    if now is not None:
        for name, value in now.before.items():
            inductor.set_option(name, value)


@contextmanager
def enabled(**options: Any) -> Iterator[None]:
    """Go through the pass inside a block only; an `enable` around it holds again behind it.

    Compiles happen at calls: at the first one of a compiled function, and at later ones with other shapes.

    Args:
        **options: as for `enable`.

    Raises:
        ValueError, TypeError, RuntimeError: as `enable`.
    """
    around = _installed()
    enable(**options)
    try:
        yield
    finally:
        disable()
        if around is not None:
            around.enter()


def _installed() -> LoopPass | None:
    """Return the pass that `enable` has put into its place, None where there is none."""
    now = inductor.option(PLACE) if inductor.has_option(PLACE) else None
    return now if isinstance(now, LoopPass) else None


def _passes(value: Any) -> tuple[Callable[[Graph], None], ...]:
    """Return the passes that Inductor's option holds: none, one or several."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)
