"""What goes wrong while a step runs is told, or is the user's own; the next step runs, and is right."""

from __future__ import annotations

import re
from itertools import count

import pytest
import torch
from models import MlpLM, tokens
from numerics import gradients, relative_error
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader, TensorDataset

import mst_fx
from mst_fx.runtime import loop_operator, places
from mst_fx.survey import survey

OPTIONS = {"min_bytes": 0, "chunk_tokens": 8, "inner": "eager"}
LOOPS = {
    "forward of the MLP": (0, "gated_mlp at mlp"),
    "head": (1, "head at head"),
    "backward": (2, "gated_mlp at mlp"),
}


@pytest.fixture(autouse=True)
def _reset():
    torch.manual_seed(0)
    torch._dynamo.reset()


class Run:
    """A compiled step of a model, beside eager."""

    def __init__(self, **options):
        self.model, self.batch = MlpLM().double(), tokens()
        self.compiled = torch.compile(self.model, backend="mst_fx", options={**OPTIONS, **options}, dynamic=False)

    def is_right(self):
        eager, ours = (gradients(self.model, fn, self.batch) for fn in (self.model, self.compiled))
        return all(relative_error(ours[name], value) < 1e-9 for name, value in eager.items())

    def step(self):
        self.compiled(*self.batch).backward()


def raising(patch, error, position):
    """Let the loop at a position of the next step raise an error in its second chunk."""
    loops, original = count(), loop_operator._results

    def run(bodies, spec, *given):
        whole = iter([bodies[0]])

        def body(args):
            for first in whole:
                return first(args)
            raise error

        return original((body, body) if next(loops) == position else bodies, spec, *given)

    patch.setattr(loop_operator, "_results", run)


@pytest.mark.parametrize("name", LOOPS)
def test_running_out_of_memory_names_the_region_and_the_option(monkeypatch, name):
    position, region = LOOPS[name]
    run = Run()
    run.step()
    with monkeypatch.context() as patch:
        raising(patch, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), position)
        with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory. Tried to allocate 2 GiB") as raised:
            run.step()
    module = region.split()[-1]
    told = f"in the loop of {region}, in chunks of \\d+ positions.*{{'modules': {{'{module}': {{'chunk_tokens': "
    assert re.search(told, str(raised.value))
    assert run.is_right()


@pytest.mark.slow
def test_regions_are_named_where_a_cache_has_the_code(monkeypatch):
    run = Run(inner="inductor")
    run.step()
    torch._dynamo.reset()
    places._places.clear()  # as in another process
    counters.clear()
    run.step()
    assert counters["aot_autograd"]["autograd_cache_hit"] == 1
    raising(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"), 0)
    with pytest.raises(torch.OutOfMemoryError, match="in the loop of gated_mlp at mlp, in chunks"):
        run.step()


def test_regions_that_are_alike_are_told_apart_by_their_weights():
    spec, x = ("v", 8, (), ()), torch.ones(2, 3)
    for number in range(6):
        places.remember(places.Place("mlp", f"layers.{number}", frozenset([(2, 3 + number % 2)])), spec, ("other",))
    assert "of mlp at layers.0 or mlp at layers.2 or mlp at layers.4, in" in places.out_of_memory(spec, [x])
    assert "at layers.2 or 3 more, in" in places.out_of_memory(spec, [])
    assert "of a region, in chunks of 4" in places.out_of_memory(("unknown", 4), [])


@pytest.mark.parametrize("name", LOOPS)
def test_an_interrupted_step(monkeypatch, name):
    run = Run()
    run.step()
    with monkeypatch.context() as patch:
        raising(patch, KeyboardInterrupt(), LOOPS[name][0])
        with pytest.raises(KeyboardInterrupt):
            run.step()
    assert run.is_right()


def test_an_interrupted_compile(monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    run = Run()
    with monkeypatch.context() as patch:
        patch.setattr(survey, "analysed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.step()
    assert torch.is_grad_enabled()
    assert run.is_right()
    assert len(mst_fx.reports()[-1].regions) == 2


def test_an_error_in_a_hook_of_the_user():
    class HookError(Exception):
        pass

    def fails(_):
        raise HookError

    run = Run()
    for hooked in (run.model.head.weight, run.model.mlp.up.weight):
        handle = hooked.register_hook(fails)
        with pytest.raises(HookError):
            run.step()
        handle.remove()
        assert run.is_right()


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_of_a_data_loader(method):
    run = Run()
    run.step()
    batches = DataLoader(TensorDataset(*run.batch), batch_size=1, num_workers=2, multiprocessing_context=method)
    losses = [run.compiled(*batch).item() for batch in batches]
    assert losses == pytest.approx([run.model(*batch).item() for batch in batches])
    assert run.is_right()


def test_a_reset_of_dynamo():
    run = Run()
    run.step()
    before = len(mst_fx.reports())
    torch._dynamo.reset()
    assert run.is_right()
    assert len(mst_fx.reports()) == before + 1


def test_at_the_limit_of_recompiles_torch_goes_on_without_loops(caplog):
    run = Run()
    with torch._dynamo.config.patch(recompile_limit=1):
        run.step()
        run.batch = tokens(2, 24)
        before = len(mst_fx.reports())
        assert run.is_right()
        assert len(mst_fx.reports()) == before
        assert "recompile_limit (1)" in caplog.text
        torch._dynamo.reset()
        strict = torch.compile(run.model, backend="mst_fx", options=OPTIONS, dynamic=False, fullgraph=True)
        strict(*run.batch)
        with pytest.raises(Exception, match="fullgraph=True"):
            strict(*tokens(2, 16))
