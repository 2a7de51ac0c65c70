"""The backend as torch.compile sees it: options, failures, refusals, lengths."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from graphs import text
from models import D, MlpLM, tokens
from numerics import looped, relative_error
from through_inductor import of_the_backend_alone
from torch import nn

import mst_fx
from mst_fx import engine

QUICK = {"min_bytes": 0, "chunk_tokens": 16, "inner": "eager"}


@pytest.fixture(autouse=True)
def _reset():
    torch.manual_seed(0)
    torch._dynamo.reset()


def test_entry_point_needs_no_import():
    code = (
        "import torch, sys; assert 'mst_fx' not in sys.modules;"
        "f = torch.compile(lambda x: x + 1, backend='mst_fx', options={'inner': 'eager'});"
        "print(f(torch.ones(2)).tolist(), 'mst_fx' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path("/"), check=True)
    assert out.stdout.split("\n")[0] == "[2.0, 2.0] True"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"chunk_token": 4},
            "'chunk_token' .did you mean 'chunk_tokens'.*; ours are accumulate, chunk_tokens, debug_dir, disable",
        ),
        ({"triton.cudagraph": True}, "'triton.cudagraph' .did you mean 'triton.cudagraphs'"),
        ({"speed": 4}, "unknown option 'speed'; ours are"),
        ({1: 4}, "unknown option 1; ours are"),
        ("drop", "a dict, not 'drop'; did you mean {'returned_logits': 'drop'}.$"),
        (0.5, "a dict, not 0.5; did you mean {'memory_budget': 0.5}.$"),
        ("fast", "a dict, not 'fast'$"),
        ({"returned_logits": "Drop"}, "'returned_logits' takes one of .*'keep', 'detach', 'drop'.*did you mean 'drop'"),
        ({"modules": {"a": True, "mlp": {"chunk_token": 4}}}, "'modules' takes .*, not {'mlp': {'chunk_token': 4}}"),
        ({"mode": 3}, "'mode' takes a mode of torch.compile"),
        ({"mode": "fast"}, "mode=fast, should be one of: default"),
        ({"chunk_tokens": "4"}, "'chunk_tokens' takes a positive int or None, not '4'"),
        ({"num_chunks": 0}, "'num_chunks' takes a positive int"),
        ({"chunk_tokens": 4, "num_chunks": 2}, "exclude each other"),
        ({"min_bytes": True}, "'min_bytes' takes an int of bytes"),
        ({"accumulate": "bf16"}, "'accumulate' takes .*float32.*native"),
        ({"inner": "nothing"}, "'inner' takes a callable or one of"),
        ({"strict": 1}, "'strict' takes a bool"),
        ({"disable": ["mpl"]}, "no pattern is called .*mpl.*; there are .*gated_mlp.*head.*mlp"),
        ({"inner": "eager", "max_autotune": True}, "takes neither a mode nor .*max_autotune"),
        ({"inner": "eager", "mode": "max-autotune"}, "takes neither a mode nor .*max-autotune"),
    ],
    ids=str,
)
def test_wrong_options_are_errors(options, message):
    compiled = torch.compile(lambda x: x + 1, backend=mst_fx.backend, options=options)
    with pytest.raises(Exception, match=re.compile(message, re.MULTILINE)):  # torch gives a backend its options then
        compiled(torch.ones(2))


def broken(*args, **kwargs):
    raise KeyError("a bug")


def test_a_bug_in_the_pass_never_breaks_the_compile(monkeypatch, caplog):
    monkeypatch.setattr(engine, "make_plans", broken)
    model = MlpLM()
    with caplog.at_level(logging.WARNING, "mst_fx"):
        loss = torch.compile(model, backend=mst_fx.backend, options=QUICK)(*tokens())
    torch.testing.assert_close(loss, model(*tokens()))
    assert len([record for record in caplog.records if record.name == "mst_fx"]) == 1
    assert [refusal.reason for refusal in mst_fx.reports()[-1].refusals] == ["INTERNAL"]


def test_a_bug_in_the_pass_is_raised_when_strict(monkeypatch):
    monkeypatch.setattr(engine, "make_plans", broken)
    with pytest.raises(Exception, match="a bug"):
        torch.compile(MlpLM(), backend=mst_fx.backend, options={**QUICK, "strict": True})(*tokens())


@of_the_backend_alone
def test_a_looped_graph_that_does_not_compile_is_compiled_unlooped(caplog):
    def picky(gm, inputs):
        if any("mini_sequence" in node.name for node in gm.graph.nodes):
            raise RuntimeError("no loops here")
        return gm

    model = MlpLM()
    with caplog.at_level(logging.WARNING, "mst_fx"):
        loss = torch.compile(model, backend=mst_fx.backend, options={**QUICK, "inner": picky})(*tokens())
    torch.testing.assert_close(loss, model(*tokens()))
    assert "does not compile" in caplog.text


def test_what_is_left_alone_is_handed_on_as_it_is():
    """So it compiles to the same code as without mst_fx."""
    model, batch, seen = MlpLM(), tokens(2), []

    def compiler(gm, inputs):
        seen.append((text(gm), len(inputs)))
        return gm.forward

    for how in ({"backend": compiler}, {"backend": mst_fx.backend, "options": {"inner": compiler, "strict": True}}):
        torch._dynamo.reset()
        torch.compile(model, **how)(*batch)
    plain, ours = seen
    assert ours == plain


def test_disabled_pattern():
    report = mst_fx.explain(MlpLM(), *tokens(), options={"min_bytes": 0, "disable": ["gated_mlp", "mlp"]})
    assert [region.pattern for region in report.regions] == ["head"]


def test_num_chunks():
    report = mst_fx.explain(MlpLM(), *tokens(2, 40), options={"min_bytes": 0, "num_chunks": 4})
    assert [region.chunks for region in report.regions] == [4, 4]


def test_noise_inside_is_refused():
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(D, 128), nn.Linear(128, D)

        def forward(self, x):
            hidden = self.up(x)
            return self.down(hidden + torch.randn_like(hidden) if self.training else hidden)

    model = MlpLM(Noisy())
    report = mst_fx.explain(model, *tokens(), options={"min_bytes": 0})
    assert [(refusal.pattern, refusal.reason) for refusal in report.refusals] == [("mlp", "RANDOM")]
    assert "torch.randn_like(hidden)" in report.refusals[0].source
    assert len(mst_fx.explain(model.eval(), *tokens(), options={"min_bytes": 0}).regions) == 2


def test_one_compile_serves_every_length():
    model = MlpLM()
    compiled = looped(model)
    before = len(mst_fx.reports())
    for length in (37, 50, 2, 16, 17, 33, 64, 100, 5):
        batch = tokens(2, length, ignored=1)
        torch.testing.assert_close(compiled(*batch), model(*batch))
    made = mst_fx.reports()[before:]
    assert len(made) == 2  # the first length, then all of them
    assert len(made[1].regions) == 2


def test_ragged_lengths_through_inductor_with_one_compile():
    model = MlpLM()
    compiled = looped(model, inner="inductor")
    before = len(mst_fx.reports())
    for length in (37, 50, 3, 48, 41):
        batch = tokens(1, length, ignored=1)
        grads = []
        for step in (model, compiled):
            model.zero_grad()
            step(*batch).backward()
            grads.append([p.grad for p in model.parameters()])
        for ours, eager in zip(*grads, strict=True):
            assert relative_error(ours, eager) < 1e-5
    assert len(mst_fx.reports()) - before == 2
