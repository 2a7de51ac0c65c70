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
from mst_fx.runtime import transfers
config.cpp.vec_isa_ok, config.cpp.simdlen = True, 1  # plain loops are compiled sooner, and are cached alike
from numerics import LoopAll, gradients, looped, relative_error
from torch.utils.checkpoint import checkpoint
def compiled(step, offload):
    if {entry!r} == "backend":
        return looped(step, inner="inductor", offload=offload)
    mst_fx.enable(**{{name: value for name, value in LoopAll.items() if name != "inner"}}, offload=offload)
    return torch.compile(step)
for activation, offload in {programs}:
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    mlp = torch.nn.Sequential(torch.nn.Linear(16, 48), getattr(torch.nn, activation)(), torch.nn.Linear(48, 16))
    model = torch.nn.ModuleList([torch.nn.Linear(16, 16), mlp])
    step = lambda x: checkpoint(mlp, model[0](x), use_reentrant=False).square().mean()
    x = [torch.randn(1, 48, 16)]
    eager = gradients(model, step, x)
    ours = gradients(model, compiled(step, offload), x)
    assert mst_fx.reports()[-1].regions
    sent = sum(way.memory.taken for way in transfers._roads.values())
    transfers._roads.clear()
    assert sent == sum(value.bytes for value in mst_fx.reports()[-1].offloaded) == (48 * 16 * 4 if offload else 0)
    assert all(relative_error(ours[name], value) < 1e-5 for name, value in eager.items())
    print(counters["inductor"]["fxgraph_cache_hit"], counters["aot_autograd"]["autograd_cache_hit"])
"""


@pytest.mark.parametrize("entry", ["backend", "enable"])
def test_a_second_process_hits_both_caches(entry, tmp_path, monkeypatch):
    """And a program that differs in the loop, or in what goes to the host, does not. Each compile has its report."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    hits = []
    first = ("SiLU", "checkpoints")
    for programs in ([first], [first, ("GELU", "checkpoints"), ("SiLU", None)]):
        code = CACHE_PROBE.format(tests=str(Path(__file__).parents[1]), programs=programs, entry=entry)
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        hits += run.stdout.splitlines()
    assert hits == ["0 0", "2 1", "0 0", "0 0"]
