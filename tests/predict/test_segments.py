"""What the nodes of a graph hold over a step. T tokens, D model, WIDE inside an MLP, V classes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from graphs import captured
from memory_probe import peak_bytes, saved_bytes
from predictions import offer
from torch import nn
from torch.utils.checkpoint import checkpoint

import mst_fx
from mst_fx.plan.lengths import Lengths
from mst_fx.plan.offer import held
from mst_fx.recognise.pattern import patterns
from mst_fx.survey.survey import Surveyor
from mst_fx.survey.surveyed import timeline_of

T, D, WIDE, V, FLOAT = 256, 32, 128, 1024, 4
BOTH = Lengths(32, 32)


def surveyed(program, *inputs):
    surveyor = Surveyor(mst_fx.Config(min_bytes=0, chunk_tokens=32), patterns())
    found = surveyor.survey(captured(program, *inputs))
    return timeline_of(found), [surveyor.offer(site) for site in found.all_sites()]


@pytest.fixture
def head():
    weight, labels = nn.Parameter(torch.randn(V, D)), torch.randint(0, V, (T,))
    return weight, lambda x, w: F.cross_entropy(F.linear(x, w), labels)


def test_a_block_makes_gradients_where_their_readers_are(head):
    """Its loop holds the sum; beside that there is no gradient yet."""
    weight, loss = head
    x = torch.randn(T, D, requires_grad=True)
    timeline, (of_head,) = surveyed(lambda x, w: checkpoint(loss, x.sin(), w, use_reentrant=False), x, weight)
    looped = held(of_head, BOTH)
    assert looped.backward >= V * D * FLOAT
    _, backward = timeline.moments([looped])
    running = max(backward, key=lambda moment: moment.running)
    assert running.running == looped.backward
    assert running.gradients == 0
    assert backward[-1].gradients == V * D * FLOAT


def test_each_reader_of_a_parameter_makes_a_gradient(head):
    """They are added up at the end, if there are not too many of them."""
    weight, loss = head
    x = torch.randn(T, D, requires_grad=True)
    for count, parts in ((1, 1), (3, 3), (12, 9)):
        timeline, _ = surveyed(lambda x, w, n=count: sum(loss(x * i, w) for i in range(n)), x, weight)
        assert sum(segment.gradients for segment in timeline.segments) == parts * V * D * FLOAT


class Packed(torch.autograd.Function):
    """A product with a gradient of its own, as that of packed weights."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(w)
        return x @ w.t()

    @staticmethod
    def backward(ctx, upstream):
        return upstream @ ctx.saved_tensors[0], None


@pytest.mark.parametrize("product", [F.linear, Packed.apply])
def test_of_a_product_and_its_adapter_the_sum_is_saved(product):
    """Three wide values of a gated MLP: two sums, and what the last adapter reads."""
    frozen = [torch.randn(*shape) for shape in ((WIDE, D), (WIDE, D), (D, WIDE))]
    down = [nn.Parameter(torch.randn(4, w.shape[1])) for w in frozen]
    up = [nn.Parameter(torch.randn(w.shape[0], 4)) for w in frozen]

    def adapted(x, *weights):
        gate, wide, narrow = (
            lambda x, i=i: product(x, weights[i]) + 2.0 * F.linear(F.linear(x, weights[3 + i]), weights[6 + i])
            for i in range(3)
        )
        return narrow(F.silu(gate(x)) * wide(x))

    memory = offer(adapted, [torch.randn(T, D, requires_grad=True), *frozen, *down, *up]).memory
    assert 3 <= memory.saved_whole / (T * WIDE * FLOAT) <= 3.5  # and values of rank four


def test_a_region_gets_the_gradients_that_nodes_behind_it_make():
    """What the graph returns has a gradient that the caller holds."""
    inputs = [torch.randn(*shape, requires_grad=True) for shape in ((T, D), (WIDE, D), (D, WIDE))]

    def upstream(program):
        timeline, offers = surveyed(program, *inputs)
        assert len(offers) == 1
        return sum(segment.upstream for segment in timeline.segments)

    def mlp(x, up, down):
        return F.linear(F.gelu(F.linear(x, up)), down)

    assert upstream(lambda *given: mlp(*given).sin().sum()) == T * D * FLOAT
    assert upstream(mlp) == 0


def test_values_without_a_gradient_are_saved_where_backward_reads_them():
    """What an adapter of frozen values reads, and a mask as attention takes it; each once, however often it is made."""
    tokens, norm = torch.randn(T, D, dtype=torch.bfloat16), torch.randn(D)
    matrices = [torch.randn(D, D, requires_grad=True) for _ in range(4)]

    def program(tokens, norm, *matrices):
        at = torch.arange(T)
        mask = (at <= at[:, None]) & (at % 7 != 3)
        q, k, v, again = (F.linear((tokens * norm).float(), w).view(1, T, 4, D // 4).transpose(1, 2) for w in matrices)
        return F.scaled_dot_product_attention(q, k, F.scaled_dot_product_attention(again, k, v, mask), mask)

    timeline, _ = surveyed(program, tokens, norm, *matrices)
    compiled = torch.compile(program, backend="aot_eager_decomp_partition")
    saved = saved_bytes(lambda: compiled(tokens, norm, *matrices), [tokens, norm, *matrices])
    assert sum(segment.saved for segment in timeline.segments) == pytest.approx(saved, rel=0.05)


@pytest.mark.parametrize("biased", [False, True])
def test_what_attention_needs_is_measured(biased):
    """In float32 its sums are the gradients. With a bias that is trained it is several ops, which save the scores."""
    q, k, v = (torch.randn(4, 8, 512, 16, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, 8, 512, 512, requires_grad=biased)

    def attention(q, k, v, bias):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    inputs = [q, k, v, bias]
    timeline, _ = surveyed(attention, *inputs)
    compiled = torch.compile(attention, backend="aot_eager_decomp_partition")
    saved = saved_bytes(lambda: compiled(*inputs), inputs)
    assert sum(segment.saved for segment in timeline.segments) == pytest.approx(saved, rel=0.1)
    if not biased:  # else the compiler's kernels matter
        y = attention(*inputs)

        def backward():
            upstream = torch.ones(4, 512, 8, 16).transpose(1, 2)  # as layers read the result: the heads of each token
            torch.autograd.grad(y, [q, k, v], upstream, retain_graph=True)

        passing = max(segment.passing for segment in timeline.segments)
        assert passing == pytest.approx(peak_bytes(backward), rel=0.1)


def test_nothing_is_saved_that_is_made_of_saved_values():
    """Both halves of a product are saved as one; SiLU of a half is not."""
    x, w, narrow = (torch.randn(*shape, requires_grad=True) for shape in ((T, 2 * D), (2 * D, 2 * D), (D, D)))

    def gated(x, w, narrow):
        gate, up = F.linear(x, w).chunk(2, -1)
        return F.linear(F.silu(gate) * up, narrow)

    timeline, offers = surveyed(gated, x, w, narrow)
    assert not offers
    compiled = torch.compile(gated, backend="aot_eager_decomp_partition")
    saved = saved_bytes(lambda: compiled(x, w, narrow), [x, w, narrow])
    assert sum(segment.saved for segment in timeline.segments) == saved
