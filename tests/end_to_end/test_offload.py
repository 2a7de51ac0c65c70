"""What checkpoints keep is on the host from forward to backward: numbers, bytes, caches, and who says what."""

from __future__ import annotations

import pytest
import torch
from memory_probe import peak_bytes, saved_bytes
from models import D, SwiGLU, V, tokens
from numerics import gradients, looped, relative_error
from torch import nn
from torch.utils.checkpoint import checkpoint

import mst_fx
from mst_fx.runtime import coming_back, host_memory, transfers


class Layer(nn.Module):
    """Attention of one head, in few ops, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.mlp = nn.RMSNorm(D), nn.Linear(D, 3 * D), SwiGLU()

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)[:, 0]
        return x + self.mlp(x)


class LM(nn.Module):
    """Checkpointed layers; `compiled` compiles each of them with its checkpoint, one by one."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.tokens, self.head, self.layers = nn.Embedding(V, D), nn.Linear(D, V), nn.ModuleList()
        self.layers.extend(Layer() for _ in range(layers))
        self.run = checkpointed

    def forward(self, ids, labels):
        x = self.tokens(ids)
        for layer in self.layers:
            x = self.run(layer, x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def checkpointed(layer, x):
    return checkpoint(layer, x, use_reentrant=False)


def compiled(model: LM, how: str, dynamic: bool | None = None, **options):
    """The step of a model, as one graph or layer by layer."""
    torch._dynamo.reset()
    options = {"inner": "aot_eager", "verify": False, "offload": "checkpoints", **options}
    if how == "layers":
        model.run = looped(checkpointed, dynamic=dynamic, **options)
        return model
    return looped(model, dynamic=dynamic, **options)


@pytest.fixture
def moves(monkeypatch):
    """Sends (S, or s within a stop) and returns (B) in the order in which they run."""
    moves, send, come_back = [], transfers.send, transfers.come_back
    monkeypatch.setattr(transfers, "send", lambda x, **how: moves.append("S" if how["new"] else "s") or send(x, **how))
    monkeypatch.setattr(transfers, "come_back", lambda handle, **how: moves.append("B") or come_back(handle, **how))
    return moves


@pytest.mark.parametrize("how", ["step", "layers"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_gradients_and_saved_bytes(how, dynamic, moves):
    """One value a layer leaves, whatever the length, and nothing is on the host behind the step."""
    model = LM().double()
    batches = [tokens(2, 40), tokens(2, 56), tokens(2, 40)]
    truths = [gradients(model, model, batch) for batch in batches]
    step, before = compiled(model, how, dynamic), set(transfers._held)
    for batch, truth in zip(batches, truths, strict=True):
        ours = gradients(model, step, batch)
        assert all(relative_error(ours[name], value) < 1e-12 for name, value in truth.items())
        assert "".join(moves) == "SSSBBB"
        moves.clear()
        assert set(transfers._held) == before
    sent = {x.bytes for report in mst_fx.reports()[-1:] for x in report.offloaded}
    assert sent <= {2 * 40 * D * 8, 2 * 56 * D * 8}


@pytest.mark.parametrize(("enough", "expected"), [(0, "BABABA"), (10**9, "BBB")])
def test_a_block_asks_behind_its_last_loop_for_what_the_one_before_keeps(enough, expected, moves, monkeypatch):
    """If enough is left to compute while it comes; otherwise it comes beside the whole block."""
    monkeypatch.setattr(coming_back, "FLOPS_A_BYTE", enough)
    asked, ask_ahead, ask = [], transfers.ask_ahead, transfers.Sent.ask
    monkeypatch.setattr(transfers, "ask_ahead", lambda handle: moves.append("A") or ask_ahead(handle))
    monkeypatch.setattr(transfers.Sent, "ask", lambda sent: asked.append(moves[-1]) or ask(sent))
    model, batch = LM().double(), tokens(2, 40)
    truth, step = gradients(model, model, batch), compiled(model, "step")
    ours = gradients(model, step, batch)
    assert all(relative_error(ours[name], value) < 1e-12 for name, value in truth.items())
    assert "".join(moves).removeprefix("SSS") == expected
    assert asked.count("A") == max(0, expected.count("A") - 1)  # nothing is before the first block


@pytest.mark.parametrize("how", ["step", "layers"])
def test_what_is_saved_is_what_is_reported_less(how):
    model, batch = LM().double(), tokens(2, 40)
    saved = {}
    for offload in (None, "checkpoints"):
        model.run = checkpointed
        step = compiled(model, how, offload=offload)
        saved[offload] = saved_bytes(lambda step=step: step(*batch), model.parameters())
    one = 2 * 40 * D * 8
    assert saved[None] - saved["checkpoints"] == 3 * (one - 1)


def sent_bytes():
    """Bytes that the steps of a test have taken on the host."""
    return transfers.road(torch.device("cpu")).memory.taken


@pytest.fixture(autouse=True)
def road(monkeypatch):
    """The way of the CPU, fresh for each test."""
    monkeypatch.setattr(transfers, "_roads", {})


def test_peak():
    """The inputs of layers are not alive at the peak, but for the one in use and the one that comes next.

    Without, the peak is where backward has passed one layer of six, and with, where it has made five layers' gradients.
    """
    model, batch = LM(6), tokens(4, 256)
    peaks, predicted = {}, {}
    for offload in (None, "checkpoints"):
        step = compiled(model, "step", offload=offload)
        peaks[offload] = peak_bytes(lambda step=step: step(*batch).backward())
        predicted[offload] = mst_fx.reports()[-1].peak
    gradients = sum(p.numel() * 4 for p in model.layers[0].parameters())
    freed = 4 * (4 * 256 * D * 4 - gradients)
    assert peaks[None] - peaks["checkpoints"] >= freed - 1024
    assert predicted[None] - predicted["checkpoints"] == pytest.approx(peaks[None] - peaks["checkpoints"], rel=0.1)


def test_backward_twice_later_and_never():
    """A retained graph, two forwards in front of two backwards, an evaluation with gradients, a forward that fails."""
    model, first, second = LM().double(), tokens(2, 40), tokens(2, 56)
    truths = [gradients(model, model, batch) for batch in (first, second)]
    step, before = compiled(model, "step", dynamic=True), set(transfers._held)
    with torch._functorch.config.patch(donated_buffer=False):  # torch forbids to retain a graph that gives buffers away
        step(*first)
        model.zero_grad()
        losses = [step(*first), step(*second)]
        losses[0].backward(retain_graph=True)
        losses[0].backward()
        losses[1].backward()
    for name, p in model.named_parameters():
        assert relative_error(p.grad, 2 * truths[0][name] + truths[1][name]) < 1e-12
    del losses
    taken = sent_bytes()
    with pytest.raises(IndexError):
        step(first[0] + V, first[1])
    assert set(transfers._held) == before
    gradients(model, step, first)
    assert sent_bytes() == taken


def test_surroundings():
    """Eager checkpointing around the compiled code keeps handles; hooks that copy them are an error that says so."""
    model, batch = LM().double(), tokens(2, 40)
    truth = gradients(model, model, batch)
    step = compiled(model, "step")
    around = gradients(model, lambda *args: checkpoint(step, *args, use_reentrant=False), batch)
    assert all(relative_error(around[name], value) < 1e-12 for name, value in truth.items())
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        loss = step(*batch)
    with pytest.raises(RuntimeError, match="Hooks on saved tensors"):
        loss.backward()


def test_what_stays():
    """What is made of weights, what has no gradient, and what is returned: it is there in any case."""
    model, batch = LM().double(), tokens(2, 40)
    batch = (*batch, torch.randn(2, 40, D, dtype=torch.float64))

    def step(ids, labels, scale):
        weight = model.layers[0].mlp.down.weight.tanh()
        x = model.tokens(ids)
        y = checkpoint(
            lambda x: (nn.functional.linear(x, weight @ weight.T) * scale).sin(), x.sin(), use_reentrant=False
        )
        y = checkpoint(model.layers[1], y, use_reentrant=False)
        return nn.functional.cross_entropy(
            model.head(y + checkpoint(model.layers[2], x, use_reentrant=False)).flatten(0, 1), labels.flatten()
        ), x

    def loss(run):
        return lambda *batch: sum(value.sum() for value in run(*batch))

    truth = gradients(model, loss(step), batch)
    ours = gradients(model, loss(looped(step, inner="aot_eager", offload="checkpoints", verify=False)), batch)
    assert all(relative_error(ours[name], value) < 1e-12 for name, value in truth.items())
    assert sum(x.bytes for x in mst_fx.reports()[-1].offloaded) == sent_bytes() == 2 * 2 * 40 * D * 8


def test_a_budget_chooses_the_number(moves):
    """Of three blocks the first one leaves; the plan, the report and the compiled code say the same."""
    model, batch = LM().double(), tokens(2, 400)
    truth = gradients(model, model, batch)
    compiled(model, "step", offload=None)(*batch)
    budget = mst_fx.reports()[-1].peak - 1
    ours = gradients(model, compiled(model, "step", offload="auto", memory_budget=budget), batch)
    assert all(relative_error(ours[name], value) < 1e-12 for name, value in truth.items())
    report = mst_fx.reports()[-1]
    (value,) = report.offloaded
    assert ("".join(moves), value.module, value.bytes) == ("SB", "layers.0", sent_bytes())
    assert report.peak <= budget


@pytest.mark.parametrize(
    ("options", "reason", "text"),
    [
        ({"inner": "eager"}, "BACKEND", "no place for a partitioner"),
        ({"mode": "reduce-overhead"}, "BACKEND", "CUDA graphs"),
        ({"inner": "aot_eager", "min_bytes": None}, "SMALL", "smaller than 8.0 MiB"),
    ],
)
def test_why_nothing_is_sent(options, reason, text):
    model, batch = LM(1), tokens(2, 40)
    torch._dynamo.reset()
    step = torch.compile(model, backend="mst_fx", options={"offload": "checkpoints", "inner": "eager", **options})
    if "mode" in options:
        step = torch.compile(
            model, backend="mst_fx", options={"offload": "checkpoints", "inner": "inductor", **options, "disable": ()}
        )
    step(*batch).backward()
    (refusal,) = [each for each in mst_fx.reports()[-1].refusals if each.pattern == "offload"]
    assert refusal.reason == reason
    assert text in refusal.text
    assert not mst_fx.reports()[-1].offloaded


def test_loops_in_place_of_checkpoints(moves):
    """Checkpoints that a wide value crosses are opened; the loop keeps what they would, on the host as well."""
    model, batch = LM(2).double(), tokens(2, 40)

    def layer(layer, x):
        wide = checkpoint(lambda x: nn.functional.silu(layer.mlp.gate(x)) * layer.mlp.up(x), x, use_reentrant=False)
        return x + layer.mlp.down(wide)

    model.run = layer
    truth = gradients(model, model, batch)
    ours = gradients(model, compiled(model, "step"), batch)
    assert all(relative_error(ours[name], value) < 1e-12 for name, value in truth.items())
    report = mst_fx.reports()[-1]
    assert [region.pattern for region in report.regions] == ["gated_mlp", "gated_mlp", "head"]
    assert "".join(moves) == "SSBB"
    assert sum(value.bytes for value in report.offloaded) == sent_bytes() == 2 * 2 * 40 * D * 8


def test_too_little_memory_of_the_host(monkeypatch):
    """It is an error in front of the first step, where one graph holds all, and otherwise in front of what is too much.

    The backend does not go on without the loops, nor without offloading.
    """
    model, batch = LM().double(), tokens(2, 40)
    one = 2 * 40 * D * 8
    monkeypatch.setattr(host_memory, "available", lambda: 2 * one - sent_bytes())
    with pytest.raises(RuntimeError, match=r"needs 60\.0 KiB of host memory; 40\.0 KiB are free"):
        compiled(model, "step", strict=False)(*batch)
    assert sent_bytes() == 0
    with pytest.raises(RuntimeError, match=r"needs 20\.0 KiB of host memory, besides 20\.0 KiB that are there already"):
        compiled(model, "layers")(*batch)
    assert sent_bytes() == one
