"""Graphs that Dynamo has divided for DDP: what leaves a fragment is told; what stays whole is looped."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from models import FF, D, MlpLM, SwiGLU, V, tokens
from numerics import LoopAll, gradients, relative_error
from torch import nn
from torch._dynamo.backends.distributed import DDPOptimizer
from torch.utils.checkpoint import checkpoint

import mst_fx

WIDE = 5 * D  # wide enough for a head


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()


def divided(model, inputs, bucket=1, **options):
    """The joined report of a model that is divided as for DDP, at buckets of some bytes; its gradients are right."""
    model.double()
    truth = gradients(model, model, inputs)

    def compiled(gm, given):
        return mst_fx.backend(gm, given, options={**LoopAll, **options})

    before = len(mst_fx.reports())
    divide = DDPOptimizer(bucket, compiled, first_bucket_cap=1).compile_fn
    ours = gradients(model, torch.compile(model, backend=divide), inputs)
    for name, value in truth.items():
        assert relative_error(ours[name], value) < 1e-10
    reports = mst_fx.reports()[before:]
    assert not any(value.enters for report in reports for value in report.unlooped)  # told where it is made
    return sum(reports[1:], reports[0])


def refused(report):
    return [(each.pattern, each.reason, each.module) for each in report.refusals]


def test_projections_that_are_parted_from_their_mlp_are_told():
    """So are their values; tokens that leave a fragment are no larger than others. A loss beside its head is looped."""
    report = divided(MlpLM(SwiGLU(f=WIDE)), tokens(2))
    assert refused(report) == [("projection", "DDP", "mlp.gate"), ("projection", "DDP", "mlp.up")]
    assert [region.pattern for region in report.regions] == ["head"]
    wide = {value.reason for value in report.unlooped if value.shape[-1] == WIDE}
    assert wide == {"DDP"}
    assert {value.reason for value in report.unlooped if value.shape[-1] == D} <= {"NO_GAIN"}
    assert "torch._dynamo.config.optimize_ddp = False" in report.change_first


class Alone(SwiGLU):
    """An MLP and a loss of it."""

    def forward(self, x):
        return super().forward(x).square().mean()


def test_projections_of_one_fragment_are_told_once():
    report = divided(Alone(), [torch.randn(2, 24, D, dtype=torch.float64)], 2 * D * FF * 8)
    assert refused(report) == [("projection", "DDP", "gate")]


class Repeated(nn.Module):
    """A wide value that no projection makes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Parameter(torch.randn(8, 1)), nn.Parameter(torch.randn(8, 1))

    def forward(self, x):
        return ((x[:, :, None] * self.one).sin() * self.two).square().mean()


def test_a_wide_value_that_no_projection_makes():
    report = divided(Repeated(), [torch.randn(2, 24, D, dtype=torch.float64)])
    assert "DDP" in [value.reason for value in report.unlooped]
    assert not report.refusals


class Shared(nn.Module):
    """Two down-projections read the wide value."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.one, self.two = nn.Linear(D, FF), nn.Linear(FF, D), nn.Linear(FF, D)

    def forward(self, x):
        y = F.gelu(self.up(x))
        return (self.one(y) + self.two(y).sin()).square().mean()


def test_an_mlp_whose_wide_value_another_fragment_reads_as_well():
    bytes_of_both = 2 * (D * FF + D) * 8
    report = divided(Shared(), [torch.randn(2, 24, D, dtype=torch.float64)], bytes_of_both)
    assert [(reason, module) for _, reason, module in refused(report)] == [("DDP", "")]
    assert report.refusals[0].pattern == "mlp"


class Scaled(MlpLM):
    """A parameter between the logits and the loss."""

    def __init__(self) -> None:
        super().__init__(mlp=nn.Identity())
        self.scale = nn.Parameter(torch.ones(V))

    def forward(self, ids, labels):
        logits = self.head(self.tokens(ids)) * self.scale
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def test_a_head_that_is_parted_from_its_loss():
    report = divided(Scaled(), tokens(2))
    assert refused(report) == [("projection", "DDP", "head"), ("head", "DDP", "")]
    assert report.refusals[1].text.startswith("the logits of this loss come from another fragment")


def test_logits_of_a_fragment_are_not_dropped():
    """The fragment does not know who reads them."""

    class Returning(MlpLM):
        def forward(self, ids, labels):
            logits = self.head(self.mlp(self.tokens(ids)))
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits

    model = Returning().double()
    inputs = tokens(2)

    def compiled(gm, given):
        return mst_fx.backend(gm, given, options={**LoopAll, "returned_logits": "drop"})

    run = torch.compile(model, backend=DDPOptimizer(1, compiled, first_bucket_cap=1).compile_fn)
    loss, logits = run(*inputs)
    assert torch.allclose(F.cross_entropy(logits.flatten(0, 1), inputs[1].flatten()), loss)
    assert any("'drop' does not hold in a fragment" in note for note in mst_fx.reports()[-1].notes)


class Checkpointed(SwiGLU):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


def test_checkpointed_blocks_stay_whole():
    report = divided(MlpLM(Checkpointed()), tokens(2))
    assert sorted(region.pattern for region in report.regions) == ["gated_mlp", "head"]
    assert not report.refusals
