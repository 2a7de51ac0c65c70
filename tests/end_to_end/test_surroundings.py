"""What is switched on around the compiled call changes neither numbers nor what is looped.

T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache, partial

import pytest
import torch
import torch.distributed as dist
from surrounding_modes import Counts, Looks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy, silu
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import mst_fx
from mst_fx.pipeline import rewrite
from mst_fx.recognise.pattern import patterns

OPTIONS = {"min_bytes": 0, "chunk_tokens": 16, "inner": "aot_eager", "strict": True}
T, H, V = 40, 8, 64


class Small(nn.Module):
    """An MLP and a head with its loss, in float64."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(H, 32), nn.Linear(H, 32), nn.Linear(32, H)
        self.head = nn.Linear(H, V)

    def mlp(self, x_TH):
        return x_TH + self.down(silu(self.gate(x_TH)) * self.up(x_TH))

    def forward(self, x_TH):
        return cross_entropy(self.head(self.mlp(x_TH)), torch.arange(x_TH.shape[0]) % V)


def small():
    torch.manual_seed(0)
    return Small().double()


def tokens(length=T):
    return torch.randn(length, H, dtype=torch.float64, generator=torch.Generator().manual_seed(length))


def compiled(fn, **options):
    options = {**OPTIONS, **options}
    return torch.compile(fn, backend="mst_fx", dynamic=options.pop("dynamic", False), options=options)


def step(model, call, around=nullcontext):
    """Loss and gradients of one step."""
    with around():
        loss = call(model)
        loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def looped_since(before):
    return sorted((r.pattern, r.chunks) for report in mst_fx.reports()[before:] for r in report.regions)


@cache
def looped_alone():
    torch._dynamo.reset()
    before = len(mst_fx.reports())
    compiled(small())(tokens())
    return looped_since(before)


def check(ours, eager, around=nullcontext, looped=2):
    """Same numbers as eager, same loops as without what is around."""
    torch._dynamo.reset()
    before = len(mst_fx.reports())
    torch.testing.assert_close(step(small(), ours, around), step(small(), eager), rtol=1e-9, atol=1e-12)
    found = looped_since(before)
    assert len(found) == looped
    assert set(found) <= set(looped_alone())


def check_model(around, **options):
    check(lambda m: compiled(m, **options)(tokens()), lambda m: m(tokens()), around)


GUARDED = pytest.mark.skipif(torch.__version__ < "2.13", reason="2.11's Dynamo guards on what a mode counts")


def no_fakes(x):
    assert type(x) in (torch.Tensor, nn.Parameter), type(x)
    return x


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SURROUNDINGS = {
    "hooks": partial(torch.autograd.graph.saved_tensors_hooks, no_fakes, no_fakes),
    "save_on_cpu": torch.autograd.graph.save_on_cpu,
    "anomaly": partial(torch.autograd.set_detect_anomaly, True),
    "default_dtype": partial(default_dtype, torch.float64),
    "half_as_default": partial(default_dtype, torch.bfloat16),
    "default_device": partial(torch.device, "cpu"),
    "deterministic": deterministic,
    "function_mode": Counts,
    "dispatch_mode": Looks,
}


ALONE = ["hooks", "save_on_cpu", "anomaly", "half_as_default", "deterministic", "dispatch_mode"]


@pytest.mark.parametrize("name", ALONE)
def test_around_the_compile(name):
    check_model(SURROUNDINGS[name], inner="eager")


@GUARDED
def test_all_of_it_at_once_for_any_length():
    @contextmanager
    def everything():
        with ExitStack() as stack:
            for around in SURROUNDINGS.values():
                stack.enter_context(around())
            yield

    check_model(everything, dynamic=True)


@pytest.mark.parametrize("inner", ["aot_eager", "eager"])
def test_compiled_autograd(inner):
    def eagerly(graph):
        return torch.compile(graph, backend="eager", dynamic=True)

    check_model(lambda: torch._dynamo.compiled_autograd._enable(eagerly), inner=inner)


@GUARDED
def test_modes_and_hooks_see_no_fakes_of_ours_and_are_given_back():
    functions, dispatches = Counts(), Looks()
    with functions, dispatches:
        compiled(small(), inner="eager")(tokens())
        before = functions.calls
        torch.ones(1) + 1
        assert functions.calls > before
    assert not dispatches.fakes


def selective():
    return create_selective_checkpoint_contexts([torch.ops.aten.mm.default, torch.ops.aten.addmm.default])


HOWS = {"plain": {}, "reentrant": {"use_reentrant": True}, "selective": {"context_fn": selective}}


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
def test_first_call_inside_eager_checkpointing(how):
    x_TH = tokens().requires_grad_()

    def call(run, model):
        return checkpoint(run, x_TH, **{"use_reentrant": False, **how}).square().sum()

    check(lambda m: call(compiled(m.mlp), m), lambda m: call(m.mlp, m), looped=2 if how.get("use_reentrant") else 1)


def test_first_compile_while_a_checkpoint_recomputes():
    x_TH, calls = tokens().requires_grad_(), []

    def run(model, x_TH):
        calls.append(1)
        return (model.mlp if len(calls) == 1 else compiled(model.mlp, inner="eager"))(x_TH)

    def ours(model):
        return checkpoint(run, model, x_TH, use_reentrant=True).square().sum()

    check(ours, lambda m: m.mlp(x_TH).square().sum(), looped=1)


def test_every_backward_of_a_step_by_compiled_autograd():
    with torch._dynamo.config.patch(compiled_autograd=True):
        check_model(nullcontext)


@pytest.mark.parametrize("inner", [True, False])
def test_autocast_inside_autocast(inner):
    model, x_TH = small().float(), tokens().float()
    forward = torch.autocast("cpu", torch.bfloat16, enabled=inner)(model.forward)
    losses = []
    for run in (forward, compiled(lambda x_TH: forward(x_TH))):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(run(x_TH))
    assert len(mst_fx.reports()[-1].regions) == 2
    torch.testing.assert_close(*losses, rtol=1e-2 if inner else 1e-6, atol=0)


def test_two_threads_compile_at_once():
    torch._dynamo.reset()
    made, expected = [], step(small(), lambda m: m(tokens()))
    models = [(small(), tokens()) for _ in "ab"]  # made here: all threads draw from one generator

    def run(model, x_TH):
        made.append(step(model, lambda m: compiled(m)(x_TH)))

    threads = [threading.Thread(target=run, args=given) for given in models]
    with torch.autograd.set_detect_anomaly(True):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.is_anomaly_enabled()
    for values in made:
        torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-12)
    assert len(made) == 2


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_without_gradients(mode):
    with mode():
        torch.testing.assert_close(compiled(small())(tokens()), small()(tokens()))
    assert len(mst_fx.reports()[-1].regions) == 2


@pytest.mark.parametrize("transform", ["vmap", "grad", "functional_call"])
def test_transforms_are_what_they_are_without(transform):
    def outcome(run):
        model = small()
        try:
            if transform == "functional_call":
                return torch.func.functional_call(run(model), dict(model.named_parameters()), (tokens(),))
            return getattr(torch.func, transform)(lambda x_TH: run(model)(x_TH).sum())(tokens()[None][0])
        except Exception as error:
            return type(error)

    expected = outcome(lambda m: torch.compile(m, backend="aot_eager"))
    torch._dynamo.reset()
    found = outcome(compiled)
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected)
    else:
        assert found is expected


def guards(gm):
    values = [node.meta.get("example_value") for node in gm.graph.nodes]
    env = next(value.fake_mode.shape_env for value in values if isinstance(value, torch.Tensor))
    return [str(guard.expr) for guard in env.guards], dict(env.replacements), dict(env.deferred_runtime_asserts)


def last_position(model, x_BTH):
    return model.head(x_BTH)[:, -1].sum()


def next_token(model, x_BTH):
    return cross_entropy(model.head(x_BTH)[:, :-1].flatten(0, 1), torch.arange(x_BTH[:, 1:, 0].numel()) % V)


def both_directions(model, x_BTH):
    return (model.head(x_BTH).flatten(0, 1).log_softmax(0) * model.head(x_BTH).flatten(0, 1).log_softmax(1)).sum()


def of_a_number(model, x_BTH):
    return nn.functional.leaky_relu(model.head(x_BTH), x_BTH.shape[0] / 10).logsumexp(-1).sum()


def whole_model(model, x_BTH):
    return model(x_BTH.flatten(0, 1)) + model.mlp(x_BTH).square().mean()


PROGRAMS = [last_position, next_token, both_directions, of_a_number, whole_model]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_what_is_left_alone_is_not_guarded(program):
    seen = []

    def backend(gm, inputs):
        before = guards(gm)
        seen.append((before, guards(gm) if rewrite(gm, mst_fx.Config(), patterns())[1] else None))
        return gm

    torch._dynamo.reset()
    torch.compile(program, backend=backend, dynamic=True)(small(), tokens().view(5, -1, H).repeat(1, 2, 1))
    ((before, after),) = seen
    assert after == before


def test_what_is_looped_is_fixed_where_it_must_be():
    torch._dynamo.reset()
    before = len(mst_fx.reports())
    model = small()
    run = compiled(model.mlp, dynamic=True, inner="eager")
    for batch, length in ((2, 24), (2, 40), (3, 40)):
        x_BTH = tokens(batch * length).view(batch, length, H)
        torch.testing.assert_close(run(x_BTH), model.mlp(x_BTH))
    assert len(mst_fx.reports()[before:]) == 2  # one for each batch, none for a length


def test_what_one_region_fixes_another_may_be_split_along():
    def program(model, x_BTH):
        pooled_BH = x_BTH.mean(1)
        return model.mlp(pooled_BH).sum() + model.head(x_BTH).logsumexp(-1).sum()

    torch._dynamo.reset()
    x_BTH = tokens(4 * 24).view(4, 24, H)
    options = {"chunk_tokens": 3, "inner": "aot_eager"}
    ours = step(small(), lambda m: compiled(partial(program, m), dynamic=True, **options)(x_BTH))
    torch.testing.assert_close(ours, step(small(), lambda m: program(m, x_BTH)))
    assert len(mst_fx.reports()[-1].regions) == 2


@pytest.fixture
def mesh():
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


class Sharded(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.sharded, self.plain = nn.Embedding(V, H), *(nn.Linear(H, 32) for _ in range(2))
        self.back, self.down = nn.Linear(32, H), nn.Linear(32, H)

    def forward(self, ids_T):
        x_TH = self.tokens(ids_T)
        x_TH = x_TH + self.back(silu(self.sharded(x_TH)))
        return (x_TH + self.down(silu(self.plain(x_TH)))).sum()


def test_a_table_on_several_ranks_is_not_opened_and_the_rest_is_looped(mesh):
    torch._dynamo.reset()
    plan = {
        "tokens": RowwiseParallel(input_layouts=Replicate()),
        "sharded": ColwiseParallel(),
        "back": RowwiseParallel(),
    }
    model, ids_T = parallelize_module(Sharded().double(), mesh, plan), torch.arange(T) % V
    loss = compiled(model)(ids_T)
    loss.backward()
    torch.testing.assert_close(
        loss, model(ids_T), equal_nan=True
    )  # no group, no sums; what the ops on shards remember is none of ours
    report = mst_fx.reports()[-1]
    assert [region.module for region in report.regions] == ["back", "down"]
    assert [refusal.reason for refusal in report.refusals] == ["SHARDED"]
