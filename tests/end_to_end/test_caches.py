"""The caches of the compilers behind the backend, across processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

CACHE_PROBE = """
import sys, torch, mst_fx
from torch._inductor import config
from torch._dynamo.utils import counters
sys.path.insert(0, {tests!r})
config.cpp.vec_isa_ok, config.cpp.simdlen = True, 1  # plain loops are compiled sooner, and are cached alike
from numerics import LoopAll, gradients, looped, relative_error
def compiled(step):
    if {entry!r} == "backend":
        return looped(step, inner="inductor")
    mst_fx.enable(**{{name: value for name, value in LoopAll.items() if name != "inner"}})
    return torch.compile(step)
for activation in {activations}:
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 48), getattr(torch.nn, activation)(), torch.nn.Linear(48, 16))
    step = lambda x: model(x).square().mean()
    x = [torch.randn(1, 48, 16)]
    eager = gradients(model, step, x)
    ours = gradients(model, compiled(step), x)
    assert mst_fx.reports()[-1].regions
    assert all(relative_error(ours[name], value) < 1e-5 for name, value in eager.items())
    print(counters["inductor"]["fxgraph_cache_hit"], counters["aot_autograd"]["autograd_cache_hit"])
"""


@pytest.mark.parametrize("entry", ["backend", "enable"])
def test_a_second_process_hits_both_caches(entry, tmp_path, monkeypatch):
    """And a program that differs inside the loop alone does not. Each compile has its report."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    hits = []
    for activations in (["SiLU"], ["SiLU", "GELU"]):
        code = CACHE_PROBE.format(tests=str(Path(__file__).parents[1]), activations=activations, entry=entry)
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        hits += run.stdout.splitlines()
    assert hits == ["0 0", "2 1", "0 0"]
