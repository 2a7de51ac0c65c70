"""Attention by groups of heads, however its projections are written.

Axes: B batch, T tokens, D model, H heads, G heads of the keys, E features of a head.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from memory_probe import saved_bytes
from numerics import assert_as_good_as_eager
from torch import nn
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

import mst_fx

B, T, D, H, G, E = 2, 6, 16, 4, 2, 4
OPTIONS = {"strict": True, "min_bytes": 0, "head_groups": H, "disable": ("mlp", "gated_mlp", "head", "experts")}
attend = F.scaled_dot_product_attention


def heads(x, count):
    return x.view(*x.shape[:2], count, -1).transpose(1, 2)


def joined(y):
    return y.transpose(1, 2).reshape(y.shape[0], y.shape[2], -1)


def rotated(x, cos, sin):
    return x * cos + torch.cat([-x[..., E // 2 :], x[..., : E // 2]], -1) * sin


class Attention(nn.Module):
    """A program is a method; not each reads all weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, rows in (("q", H), ("k", H), ("v", H), ("kg", G), ("vg", G), ("k1", 1), ("v1", 1)):
            setattr(self, name, nn.Parameter(torch.randn(rows * E, D) / 3))
        self.qkv, self.qkv_bias = nn.Parameter(torch.randn(3 * H * E, D) / 3), nn.Parameter(torch.randn(3 * H * E))
        self.multi_query = nn.Parameter(torch.randn((H + 2) * E, D) / 3)
        self.grouped = nn.Parameter(torch.randn((H + 2 * G) * E, D) / 3)
        self.o, self.o_bias = nn.Parameter(torch.randn(D, H * E) / 3), nn.Parameter(torch.randn(D))
        self.scale, self.wide_scale = nn.Parameter(torch.randn(E)), nn.Parameter(torch.randn(H * E))
        self.down, self.up = nn.Parameter(torch.randn(2, D)), nn.Parameter(torch.randn(H * E, 2))
        self.bias = nn.Parameter(torch.randn(1, H, T, T))
        self.cubes = nn.Parameter(torch.randn(3, H, D, E))
        self.register_buffer("slopes", torch.randn(1, H, T, T))
        self.register_buffer("seen", (torch.rand(B, 1, T, T) > 0.3) | torch.eye(T, dtype=torch.bool))
        self.register_buffer("tables", torch.randn(2, 1, 1, 2 * T, E))

    def of(self, x, *weights):
        return (heads(F.linear(x, w), w.shape[0] // E) for w in weights)

    def out(self, y):
        return F.linear(joined(y), self.o)

    def rotary(self, x):
        q, k, v = self.of(x, self.q, self.kg, self.vg)
        q, k = (rotated(t, *self.tables[..., : x.shape[1], :]) for t in (q, k))
        return self.out(attend(q, k, v, is_causal=True, enable_gqa=True))

    def turned(self, x):
        q, k, v = self.of(x, self.q, self.kg, self.vg)
        angles = torch.view_as_complex(self.tables[0, 0, 0, : x.shape[1]].unflatten(-1, (-1, 2)))
        q, k = (torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2))) * angles).flatten(3) for t in (q, k))
        return self.out(attend(q, k, v, is_causal=True, enable_gqa=True))

    def repeated_keys(self, x):
        q, k, v = self.of(x, self.q, self.kg, self.vg)
        k, v = (t[:, :, None].expand(B, G, H // G, T, E).reshape(B, H, T, E) for t in (k, v))
        return self.out(attend(q, k, v, is_causal=True))

    def normed_heads(self, x):
        q, k, v = self.of(x, self.q, self.kg, self.vg)
        q, k = (F.rms_norm(t, (E,), self.scale) for t in (q, k))
        return self.out(attend(q, k, v, enable_gqa=True))

    def shared_key(self, x):
        return self.out(attend(*self.of(x, self.q, self.k1, self.v1), is_causal=True, enable_gqa=True))

    def split(self, x):
        q, k, v = F.linear(x, self.qkv, self.qkv_bias).split(H * E, 2)
        return self.out(attend(heads(q, H), heads(k, H), heads(v, H), is_causal=True)) + self.o_bias

    def sliced(self, x):
        z = F.linear(x, self.grouped)
        q, k, v = z[..., : H * E], z[..., H * E : (H + G) * E], z[..., (H + G) * E :]
        return self.out(attend(heads(q, H), heads(k, G), heads(v, G), is_causal=True, enable_gqa=True))

    def unbound(self, x):
        z = F.linear(x, self.qkv, self.qkv_bias).reshape(B, T, 3, H, E).permute(2, 0, 3, 1, 4)
        return F.linear(joined(attend(*z.unbind(0))), self.o, self.o_bias)

    def interleaved(self, x):
        z = F.linear(x, self.qkv, self.qkv_bias).view(B, T, H, 3 * E)
        return self.out(attend(*(t.transpose(1, 2) for t in z.split(E, -1)), is_causal=True))

    def products(self, x):
        rows = x.view(-1, D)
        q, k, v = (heads((rows @ w.t()).view(B, T, -1), H) for w in (self.q, self.k, self.v))
        return torch.addmm(self.o_bias, joined(attend(q, k, v)).view(-1, H * E), self.o.t()).view(B, T, D)

    def einsums(self, x):
        q, k, v = (torch.einsum("btd,hde->bhte", x, w) for w in self.cubes.unbind(0))
        return torch.einsum("bhte,hde->btd", attend(q, k, v), self.cubes[0])

    def across(self, x):
        (q, _, _), (_, k, v) = self.of(x, self.q, self.k, self.v), self.of(x.flip(1), self.q, self.k, self.v)
        return self.out(attend(q, k, v))

    def masked(self, x):
        return self.out(attend(*self.of(x, self.q, self.k, self.v), attn_mask=self.seen))

    def with_slopes(self, x):
        return self.out(attend(*self.of(x, self.q, self.k, self.v), attn_mask=self.slopes))

    def with_learnt_bias(self, x):
        return self.out(attend(*self.of(x, self.q, self.k, self.v), attn_mask=self.bias))

    def with_products_as_bias(self, x):
        q, k, v = self.of(x, self.q, self.k, self.v)
        return self.out(attend(q, k, v, attn_mask=q @ k.transpose(-1, -2)))

    def adapted(self, x):
        q, k, v = self.of(x, self.q, self.k, self.v)
        q = q + heads(F.linear(F.linear(x, self.down), self.up), H)
        return self.out(attend(q, k, v, is_causal=True))

    def gated(self, x):
        y = joined(attend(*self.of(x, self.q, self.k, self.v), is_causal=True))
        return F.linear(y * torch.sigmoid(F.linear(x, self.k)), self.o)

    def by_hand(self, x):
        q, k, v = self.of(x, self.q, self.k, self.v)
        scores = torch.tanh(q @ k.transpose(-1, -2) / 5) * 5
        scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
        return self.out(scores.softmax(-1) @ v)

    def by_hand_with_a_sink(self, x):
        q, k, v = self.of(x, self.q, self.k, self.v)
        scores = torch.cat([q @ k.transpose(-1, -2), self.bias[..., :1].expand(B, H, T, 1)], -1)
        return self.out((scores - scores.amax(-1, keepdim=True)).softmax(-1)[..., :-1] @ v)

    def latent_keys(self, x):
        latent = F.linear(x, self.down)
        q, v = self.of(x, self.q, self.v)
        k = x.new_empty(B, H, T, E)
        k[..., :2].copy_(heads(F.linear(latent, self.up), H)[..., 1:3])
        k[..., 2:].copy_(latent[:, None].expand(B, H, T, 2))
        return self.out(attend(q, k, v))

    def listed(self, x):
        z = F.linear(x, self.qkv, self.qkv_bias).view(B, T, H, 3, E)
        return self.out(attend(*(z[..., index, :].squeeze(3).transpose(1, 2) for index in ([0], [1], [-1]))))

    def one_view(self, x):
        z = F.linear(x, self.multi_query).view(B, T, H + 2, E)
        q, k, v = (t.transpose(1, 2) for t in (z[..., :-2, :], z[..., [-2], :], z[..., [-1], :]))
        return self.out(attend(q, k.expand(B, H, T, E), v.expand(B, H, T, E), is_causal=True))

    def repeated_key(self, x):
        q, k, v = self.of(x, self.q, self.k1, self.v1)
        return self.out(attend(q, k.expand(B, H, T, E).contiguous(), v.expand(B, H, T, E).contiguous()))

    def left_over(self, x):
        z = F.linear(x, self.qkv)
        q, k, v = z[..., : G * E], z[..., G * E : 2 * G * E], z[..., 2 * G * E : 3 * G * E]
        return joined(attend(heads(q, G), heads(k, G), heads(v, G), is_causal=True))

    def in_one_module(self, x):
        weights = self.qkv, self.qkv_bias, None, None, False, 0.0, self.o, self.o_bias
        tokens = x.transpose(0, 1)
        y, _ = F.multi_head_attention_forward(*[tokens] * 3, D, H, *weights, need_weights=False)
        return y.transpose(0, 1)

    def normed_across_heads(self, x):
        q, k = (F.rms_norm(F.linear(x, w), (H * E,), self.wide_scale) for w in (self.q, self.k))
        return self.out(attend(heads(q, H), heads(k, H), heads(F.linear(x, self.v), H)))


GROUPS = {
    **dict.fromkeys(("rotary", "turned", "repeated_keys", "normed_heads", "sliced"), G),
    **dict.fromkeys(("shared_key", "split", "unbound", "interleaved", "products", "einsums", "across", "masked"), H),
    **dict.fromkeys(("with_slopes", "with_learnt_bias", "adapted", "gated", "by_hand", "in_one_module"), H),
    **dict.fromkeys(
        ("by_hand_with_a_sink", "one_view", "latent_keys", "listed", "repeated_key", "with_products_as_bias"), H
    ),
}


def compiled(model, program, **options):
    torch._dynamo.reset()
    how = {"inner": "eager", **OPTIONS, **options}
    dynamic = how.pop("dynamic", None)
    return torch.compile(getattr(model, program), backend="mst_fx", options=how, dynamic=dynamic)


def gradients(run, model, x, upstream):
    return torch.autograd.grad((run(x) * upstream).sum(), [x, *model.parameters()], allow_unused=True)


@pytest.mark.parametrize("program", GROUPS)
def test_gradients_are_those_of_the_program(program):
    model = Attention().double()
    x, upstream = (torch.randn(B, T, D, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ours = gradients(compiled(model, program), model, x, upstream)
    truth = gradients(getattr(model, program), model, x, upstream)
    for a, b in zip(ours, truth, strict=True):
        assert (a is None) == (b is None)
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    (region,) = mst_fx.reports()[-1].regions
    assert (region.pattern, region.chunks) == ("attention", GROUPS[program])
    assert region.axis == f"heads ({GROUPS[program]} of the keys)"


@pytest.mark.parametrize("program", ["rotary", "unbound"])
def test_the_product_behind_attention_belongs_to_the_region(program):
    """With a bias or without: its source line is that of the region."""
    model = Attention()
    compiled(model, program)(torch.randn(B, T, D, requires_grad=True))
    (region,) = mst_fx.reports()[-1].regions
    assert "F.linear(joined(" in region.source


@pytest.mark.parametrize("program", ["normed_across_heads", "left_over"])
def test_heads_that_are_not_apart_are_refused(program):
    """A norm over all heads; a projection that makes more than is read, and so cannot be parted."""
    model = Attention()
    compiled(model, program)(torch.randn(B, T, D))
    report = mst_fx.reports()[-1]
    assert not report.regions
    (refusal,) = report.refusals
    assert (refusal.pattern, refusal.reason) == ("attention", "AXIS_MIXED")
    assert "test_attention.py" in refusal.source


def test_small_attention_leaves_no_trace():
    model = Attention()
    compiled(model, "rotary", head_groups=None)(torch.randn(B, T, D, requires_grad=True))
    report = mst_fx.reports()[-1]
    assert not report.regions
    assert not report.refusals


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_eager(dtype):
    def step(model, x):
        return model.rotary(x).square().mean()

    x = torch.randn(B, T, D, requires_grad=True)
    assert_as_good_as_eager(Attention(), [x], step=step, dtype=dtype, regions=1, inner="aot_eager", **OPTIONS)


def test_autocast_that_casts_some_of_the_operands():
    """Rotary tables in float32 make queries and keys float32, and values stay in bfloat16."""
    model = Attention()
    model.run = lambda x: torch.autocast("cpu", torch.bfloat16)(model.rotary)(x)
    x, upstream = torch.randn(B, T, D, requires_grad=True), torch.randn(B, T, D)
    ours = gradients(compiled(model, "run"), model, x, upstream)
    (region,) = mst_fx.reports()[-1].regions
    assert (region.pattern, region.chunks) == ("attention", G)
    for a, b in zip(ours, gradients(model.run, model, x, upstream), strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).norm() <= 0.02 * b.norm()


class Graphs:
    """Compiles by AOTAutograd, and keeps the graphs of forward and backward."""

    def __init__(self) -> None:
        self.kept: list[GraphModule] = []

    def __call__(self, gm, inputs):
        from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
        from torch._dynamo.backends.common import aot_autograd

        def keep(graph, _):
            self.kept.append(graph)
            return make_boxed_func(graph.forward)

        compile_graph = aot_autograd(
            fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition
        )
        return compile_graph(gm, inputs)

    def counted(self) -> list[Counter[str]]:
        """How often each op stands in forward and backward, bodies of loops included."""
        return [
            Counter(
                str(node.target).split(".")[1] if "." in str(node.target) else str(node.target)
                for module in graph.modules()
                if isinstance(module, GraphModule)
                for node in module.graph.nodes
                if node.op == "call_function"
            )
            for graph in self.kept
        ]


FORWARD, BACKWARD = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_attention_runs_as_often_as_without_groups(checkpointed):
    """Once forward, and, under checkpointing, once more in the backward; its gradients once."""
    model, graphs = Attention(), Graphs()
    program = model.rotary

    def run(x):
        return checkpoint(program, x, use_reentrant=False) if checkpointed else program(x)

    model.run = run
    x = torch.randn(B, T, D, requires_grad=True)
    compiled(model, "run", inner=graphs)(x).sum().backward()
    forward, backward = graphs.counted()
    assert (forward[FORWARD], forward[BACKWARD]) == (1, 0)
    assert (backward[FORWARD], backward[BACKWARD]) == (int(checkpointed), 1)
    assert forward["mm"] == 4  # those of the body, and the one behind; the projections that nobody reads are gone
    assert backward["sum_of_products"] == 1  # for the tokens
    assert backward["mm"] == 3 + 1 + 4 + 3 * checkpointed  # q, k, v and the gradient of y in the body; four weights


def test_nothing_adds_up_over_the_groups():
    """Gradients of projections and of the weight behind attention are written to their places, as attention's result is."""
    model, kinds = Attention(), []

    def keep(gm, inputs):
        calls = [node for node in gm.graph.nodes if "with_gradients" in str(node.target)]
        kinds.extend(kind[0] for call in calls for spec in call.args[2][1:3] for kind in spec[3])
        return gm

    compiled(model, "rotary", inner=keep)(torch.randn(B, T, D, requires_grad=True))
    assert kinds == ["cat"] * 6


def test_queries_keys_and_values_are_not_saved():
    model = Attention()
    x = torch.randn(B, T, D, requires_grad=True)
    known = [x, *model.parameters(), *model.buffers()]
    run = compiled(model, "rotary", inner="aot_eager")
    rows = B * T * 4  # bytes of one feature of all tokens
    assert saved_bytes(lambda: run(x).sum(), known) <= rows * (H * E + H) + 64  # the result and its logsumexp
    plain = compiled(model, "rotary", inner="aot_eager", head_groups=1)
    assert saved_bytes(lambda: plain(x).sum(), known) >= rows * (2 * H * E + 2 * G * E)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_one_compile_for_all_lengths(checkpointed):
    """In a checkpointed block, values are asked for their sizes."""
    model = Attention().double()
    model.run = (lambda x: checkpoint(model.rotary, x, use_reentrant=False)) if checkpointed else model.rotary
    run, before = compiled(model, "run", inner="aot_eager", dynamic=True), len(mst_fx.reports())
    for length in (6, 5, 3):
        x, upstream = (torch.randn(B, length, D, dtype=torch.float64, requires_grad=True) for _ in range(2))
        torch._dynamo.mark_dynamic(x, 1, min=2, max=2 * T - 1)
        for a, b in zip(gradients(run, model, x, upstream), gradients(model.rotary, model, x, upstream), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    (report,) = mst_fx.reports()[before:]
    (region,) = report.regions
    assert region.backward == "recompute"
    assert "o)" in region.source  # up to the product behind attention


def test_lengths_that_vary_where_a_kernel_rounds_them_up():
    """The logsumexp of memory-efficient attention, which shapes alone take in float32, has multiples of 32 tokens."""
    model, x = Attention().to("meta"), torch.randn(B, T, D, device="meta", requires_grad=True)
    torch._dynamo.mark_dynamic(x, 1)
    compiled(model, "gated", dynamic=True)(x)
    (region,) = mst_fx.reports()[-1].regions
    assert (region.pattern, region.chunks) == ("attention", H)
