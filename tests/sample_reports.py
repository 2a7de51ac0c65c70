"""Reports made by hand: one has an entry of each kind."""

from __future__ import annotations

from dataclasses import replace

from mst_fx.report.items import Dropped, EarlyCut, LoopedRegion, RefusedRegion
from mst_fx.report.report import Report
from mst_fx.report.timeline import Alive, Course, GraphTimeline, Span
from mst_fx.report.unknown_ops import UnknownOp
from mst_fx.report.unlooped import Unlooped

MIB = 2**20
LINE = "/a/long/path/to/the/package/model/modeling.py:164: return self.down(self.act(self.gate(x)) * self.up(x))"


def mlp(layer: int, **changed) -> LoopedRegion:
    module = f"model.layers.{layer}.mlp.down"
    return replace(
        LoopedRegion("gated_mlp", module, LINE, "dim 1 (64 positions)", 8, 36 * MIB, 4 * MIB, "recompute"), **changed
    )


def refusal(layer: int, reason: str = "ESCAPES", **changed) -> RefusedRegion:
    text, module = "the value of the gate is returned", f"model.layers.{layer}.mlp"
    return replace(RefusedRegion("mlp", reason, "torch.relu", LINE, "Keep it inside.", text, module), **changed)


def value(size: int, reason: str = "NO_PATTERN", *, saved: bool = True, advice: str = "Add a pattern.") -> Unlooped:
    return Unlooped("torch.tanh", "model.norm", LINE, (4, 4), "float32", size, 1, saved, reason, "why", advice)


def course(*, loops: bool) -> Course:
    alive = (Alive("parameters", "", "", 5 * MIB), Alive("saved", "mlp", "model.layers.*.mlp", 9 * MIB, 4))
    running = Alive("running", "torch.nn.functional.scaled_dot_product_attention", "model.layers.3.self_attn", 2 * MIB)
    if loops:
        return Course((0,) * 4, (0, 0, 1, 1), (0, 0, 0, 0), (2 * MIB,) * 4, "forward of attention", (alive[0], running))
    return Course((0,) * 4, (0, 0, 1, 1), (0, 9 * MIB, 0, 0), (0,) * 4, "backward of mlp at model", alive)


TIMELINE = GraphTimeline(
    parameters=5 * MIB,
    inputs=0,
    forward=2,
    looped=course(loops=True),
    whole=course(loops=False),
    spans=(Span("mlp", "model.layers.0.mlp", True, 1, 2),),
)
FULL = Report(
    regions=(
        *map(mlp, range(4)),
        mlp(4, chunks=2, verified=True, verification="its own sizes", returned_bytes=3 * MIB),
    ),
    refusals=(refusal(7), refusal(9), refusal(3, text="another")),
    cuts=(EarlyCut("lm_head", LINE, 4 * MIB, MIB),),
    dropped=(Dropped("lm_head", LINE, MIB),),
    graphs=2,
    peak=7 * MIB,
    peak_whole=14 * MIB,
    unlooped=(value(2 * MIB), value(MIB, "NO_GAIN")),
    notes=("a note",),
    budget=8 * MIB,
    timelines=(TIMELINE,),
    unknown_ops=(UnknownOp("aten.convolution.default", "model.patches", LINE, 4096, 2),),
)
