"""The policy: a pure function of numbers, so random numbers test it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mst_fx.core.config import Config, Wish
from mst_fx.core.readable import readable
from mst_fx.plan.by_default import CHEAP_MS, LENT_SHARE
from mst_fx.plan.chunk_length import several, terms_of
from mst_fx.plan.decisions import COUNTS, IN_VAIN, Plans
from mst_fx.plan.offer import Offer, held
from mst_fx.plan.over_tokens import LEAST_ROWS
from mst_fx.plan.planner import make_plans as make_plans_of
from mst_fx.predict.extent import Extent
from mst_fx.predict.footprint import Footprint
from mst_fx.predict.region_memory import RegionMemory
from mst_fx.predict.step_memory import Held, Segment, Timeline
from mst_fx.predict.time import Device, RegionCost

GIB = 2**30
DEVICE = Device("cuda", 80 * GIB, 7e11, 4e9)
WIDTH, FFN, VOCAB = 4096, 14336, 128256


@dataclass(frozen=True)
class InModule(Offer):
    """A region of a module."""

    module: str = ""


def offered(module: str, extent: Extent, *numbers: Any, **kinds: bool) -> InModule:
    """A region of which the user has said nothing."""
    terms = terms_of(extent, Wish(), "float32", recomputes=not kinds["recomputes_nothing"])
    return InModule(terms, *numbers, **kinds, module=module)


def make_plans(offers: list[InModule], timeline: Timeline, device: Device, config: Config) -> Plans:
    """The plans of regions, with what the user has said of their modules."""
    said = [
        terms_of(
            offer.extent, config.wish_for([offer.module]), config.accumulate, recomputes=not offer.recomputes_nothing
        )
        for offer in offers
    ]
    offers = [replace(offer, terms=terms) for offer, terms in zip(offers, said, strict=True)]
    return make_plans_of(offers, timeline, device, config)


def mlp(length: int, module: str = "mlp", *, repeated: bool = False) -> InModule:
    """SwiGLU of Llama-3-8B in bfloat16: six wide values in backward, two kept."""
    wide, stream, weights = length * FFN * 2, length * WIDTH * 2, 3 * WIDTH * FFN
    memory = RegionMemory(
        written=4 * wide,
        forward=Footprint(results=stream, each=2 * FFN * 2),
        backward=Footprint(stream, weights * 4, FFN * WIDTH * 2, weights * 2, weights * 2, 0, 6 * FFN * 2),
        saved_whole=2 * wide,
        whole_forward=2 * wide + stream,
        whole_backward=6 * wide + stream + weights * 2,
        whole_again=6 * wide + stream + weights * 2,
    )
    flops = 6.0 * length * WIDTH * FFN
    cost = RegionCost(flops, flops * 2 / 3, 1.0, weights * 8, half=True)
    return offered(module, Extent(length, False, 1, FFN * 2), memory, cost, recomputes_nothing=False, repeated=repeated)


def head(length: int, module: str = "lm_head") -> InModule:
    """Cross-entropy over Llama-3's vocabulary: gradients in the forward."""
    wide, stream, weights = length * VOCAB * 2, length * WIDTH * 2, VOCAB * WIDTH
    memory = RegionMemory(
        written=3 * wide,
        forward=Footprint(stream, weights * 4, 0, weights * 4, weights * 2, 0, 2 * VOCAB * 2),
        saved=stream + weights * 4,
        scaled=stream + weights * 2,
        rescaled=weights * 2,
        saved_whole=wide,
        whole_forward=wide,
        whole_backward=2 * wide + stream + weights * 2,
    )
    cost = RegionCost(2.0 * length * weights, 0.0, 1.0, weights * 8, half=True)
    return offered(module, Extent(length, False, 1, VOCAB * 2), memory, cost, recomputes_nothing=True)


def llama(length: int, layers: int, *, checkpointed: bool = False) -> tuple[list[InModule], Timeline]:
    """Layers of Llama-3-8B with a head: attention saves five streams a layer."""
    offers = [mlp(length, f"layers.{n}.mlp.down_proj", repeated=checkpointed) for n in range(layers)] + [head(length)]
    stream = length * WIDTH * 2
    segments = []
    for n in range(layers):
        block = n if checkpointed else None
        entry = stream if checkpointed else 0
        segments.append(Segment(saved=5 * stream, passing=2 * stream, block=block, entry=entry, away=entry))
        segments.append(Segment(region=n, gradients=218_000_000 * 2, block=block))
    segments.append(Segment(region=layers, gradients=VOCAB * WIDTH * 2))
    return offers, Timeline(layers * 218_000_000 * 2 + 2 * VOCAB * WIDTH * 2, tuple(segments))


def looped(plans) -> list[bool]:
    return [plan.lengths is not None for plan in plans.of]


@pytest.mark.parametrize(
    ("length", "reason"),
    [
        (512, "its temporaries are 56.0 MiB, min_bytes is 64.0 MiB"),
        (
            4096,
            "not worth it: looping the 9 regions that are left alone would take 997.4 MiB off a step's peak of 11.17",
        ),
    ],
)
def test_short_sequences_cost_nothing(length, reason):
    """Weights and their gradients make the peak."""
    offers, timeline = llama(length, 8)
    plans = make_plans(offers, timeline, DEVICE, Config())
    assert not any(looped(plans))
    assert plans.of[0].reason.startswith(reason)


def test_a_head_is_looped_as_soon_as_that_saves_memory():
    assert looped(make_plans(*llama(4096, 1), DEVICE, Config())) == [False, False]
    assert looped(make_plans(*llama(8192, 1), DEVICE, Config())) == [False, True]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("length", [32768, 131072])
def test_long_sequences_loop_all(length, checkpointed):
    offers, timeline = llama(length, 8, checkpointed=checkpointed)
    plans = make_plans(offers, timeline, DEVICE, Config())
    assert all(looped(plans))
    assert plans.peak < 0.9 * plans.peak_whole
    once_more = 4 * length * WIDTH * FFN / DEVICE.flops_per_ms
    assert (plans.of[0].added_ms < 0.3 * once_more) == checkpointed  # there nothing is computed that was not before


def test_evaluation_loops_the_head():
    """Nothing is saved, and no gradient is made: the logits alone make the peak."""
    wide = 8192 * VOCAB * 2
    memory = RegionMemory(written=3 * wide, forward=Footprint(each=VOCAB * 2), whole_forward=wide)
    offer = replace(head(8192), memory=memory)
    plans = make_plans([offer], Timeline(3 * GIB, (Segment(region=0),)), DEVICE, Config())
    assert looped(plans) == [True]
    assert plans.peak <= plans.peak_whole - wide / 2


def saving(count: int, *, free: bool = False) -> InModule:
    """A region that saves so many bytes for backward, and none in a loop."""
    return replace(mlp(32768), memory=RegionMemory(written=GIB, saved_whole=count), recomputes_nothing=free)


def decided(*offers: Offer) -> list[bool]:
    """What is looped of regions in a step that takes a million bytes."""
    rest = 1_000_000 - sum(offer.memory.saved_whole for offer in offers)
    segments = tuple(Segment(region=number) for number in range(len(offers)))
    return looped(make_plans(offers, Timeline(rest, segments), DEVICE, Config()))


@pytest.mark.parametrize(("free", "least"), [(False, 100_000), (True, 20_000)])
def test_what_is_looped_takes_a_real_part_off_the_peak(free, least):
    """A tenth where something is computed again, a fiftieth where nothing is."""
    assert decided(saving(least, free=free)) == [True]
    assert decided(saving(least - 1, free=free)) == [False]


def test_each_looped_region_has_a_part_of_its_own_in_the_peak():
    """Four thousandths."""
    assert decided(saving(200_000), saving(4_000)) == [True, True]
    assert decided(saving(200_000), saving(3_999)) == [True, False]


def over_heads(count: int, *, repeated: bool = False, widest: int = 2**26) -> InModule:
    """The same for attention of eight heads, which projects once more in backward, also in a checkpointed block."""
    region = saving(count)
    extent = Extent(8, False, 32768, widest, over="heads")
    terms = terms_of(extent, Wish(), "float32", recomputes=True)
    return replace(region, terms=terms, cost=replace(region.cost, once_more=True), repeated=repeated)


def test_attention_is_looped_where_it_takes_a_tenth_itself():
    assert decided(over_heads(100_000)) == [True]
    assert decided(over_heads(99_999)) == [False]
    assert decided(over_heads(99_999, repeated=True)) == [False]
    assert decided(saving(200_000), over_heads(80_000)) == [True, True]
    assert decided(saving(200_000), over_heads(79_999)) == [True, False]
    assert decided(saving(60_000), over_heads(60_000)) == [False, False]


def test_attention_that_would_be_one_group_is_left_alone():
    assert decided(over_heads(500_000, widest=2**19)) == [False]


def test_small_regions_are_left_alone():
    offers, timeline = llama(32768, 2)
    offers[0] = replace(offers[0], memory=replace(offers[0].memory, written=63 * 2**20))
    plans = make_plans(offers, timeline, DEVICE, Config())
    assert looped(plans) == [False, True, True]
    assert plans.of[0].reason == "its temporaries are 63.0 MiB, min_bytes is 64.0 MiB"


@pytest.mark.parametrize("config", [Config(), Config(memory_budget=2**50)])
def test_what_is_due_is_looped_however_small(config):
    """A longer batch may come; checkpointed MLPs and heads lose nothing."""
    offers, timeline = llama(64, 1, checkpointed=True)
    offers = [replace(offer, due=True) for offer in offers]
    assert looped(make_plans(offers, timeline, DEVICE, config)) == [True, True]
    assert looped(make_plans(offers, timeline, DEVICE, replace(config, modules={"lm_head": False}))) == [True, False]


def test_min_bytes_decides_alone():
    offers, timeline = llama(512, 2)
    assert all(looped(make_plans(offers, timeline, DEVICE, Config(min_bytes=0))))
    assert not any(looped(make_plans(offers, timeline, DEVICE, Config(min_bytes=2**40))))


def test_modules():
    offers, timeline = llama(2048, 3)
    wishes = {"layers.0.mlp": True, "layers.1.*": {"num_chunks": 4}, "lm_head": False, "layers.1": {"chunk_tokens": 64}}
    plans = make_plans(offers, timeline, DEVICE, Config(modules=wishes))
    assert looped(plans) == [True, True, False, False]
    assert plans.of[1].chunks == 4  # the longest path counts
    assert plans.of[3].reason == "the option `modules` says so"


def test_chunks_of_the_users_length():
    offers, timeline = llama(2048, 1)
    plans = make_plans(offers, timeline, DEVICE, Config(chunk_tokens=300))
    assert [plan.lengths.chunk for plan in plans.of] == [300, 300]
    tight = Config(chunk_tokens=300, memory_budget=1)
    assert [plan.lengths.chunk for plan in make_plans(offers, timeline, DEVICE, tight).of] == [300, 300]


def test_a_budget_that_nothing_needs_to_be_done_for():
    offers, timeline = llama(32768, 8)
    plans = make_plans(offers, timeline, Device("cuda", 2**50, 7e11, 4e9), Config(memory_budget=0.5))
    assert looped(plans) == [False] * 8 + [True]
    assert plans.peak <= plans.budget


def test_a_budget_takes_what_is_recomputed_anyway_first():
    offers, timeline = llama(32768, 4)
    little = replace(offers[2].memory, saved_whole=2**20)
    offers[2] = replace(offers[2], repeated=True, memory=little)  # though it frees little for its time
    generous = make_plans(offers, timeline, DEVICE, Config(memory_budget=2**50))
    plans = make_plans(offers, timeline, DEVICE, Config(memory_budget=generous.peak - 1))
    assert looped(plans)[2]


def test_a_budget_is_met_layer_by_layer():
    offers, timeline = llama(32768, 8)
    loose = make_plans(offers, timeline, DEVICE, Config(memory_budget=2**50))
    middle = make_plans(offers, timeline, DEVICE, Config(memory_budget=loose.peak - 5 * GIB))
    assert loose.peak - 8 * GIB < middle.peak <= loose.peak - 5 * GIB
    assert 0 < sum(looped(middle)[:8]) < 8


def test_a_budget_shortens_chunks_at_last():
    offers, timeline = llama(32768, 8, checkpointed=True)
    default = make_plans(offers, timeline, DEVICE, Config())
    plans = make_plans(offers, timeline, DEVICE, Config(memory_budget=default.peak - 2**20))
    assert all(looped(plans))
    assert plans.peak < default.peak
    assert min(plan.lengths.chunk for plan in plans.of) < min(plan.lengths.chunk for plan in default.of)


def test_a_budget_that_nothing_keeps_to():
    offers, timeline = llama(32768, 8)
    plans = make_plans(offers, timeline, DEVICE, Config(memory_budget="1GiB"))
    assert plans.advice.startswith(f"{readable(plans.peak - GIB)} more, accumulate='native' (float32 sums take ")
    assert "activation checkpointing" in plans.advice


sizes = st.integers(0, 4 * GIB)


@st.composite
def graphs(draw):
    """Regions of any size in a graph of any size, some of them checkpointed."""
    offers, segments = [], []
    for number in range(draw(st.integers(1, 6))):
        offer = draw(st.sampled_from([mlp, mlp, head]))(
            draw(st.sampled_from([12288, 256, 2048, 4096, 30000])), f"m.{number}"
        )
        block = number if not offer.recomputes_nothing and draw(st.booleans()) else None
        offers.append(replace(offer, repeated=block is not None))
        entry = draw(sizes) if block else 0
        away = draw(st.sampled_from([0, entry]))
        segments.append(Segment(saved=draw(sizes), passing=draw(sizes), block=block, entry=entry, away=away))
        segments.append(Segment(region=number, gradients=draw(sizes), block=block))
    return offers, Timeline(draw(sizes), tuple(segments), draw(sizes))


def recomputed(offers, plans) -> float:
    pairs = zip(offers, plans.of, strict=True)
    return sum(offer.cost.recomputed for offer, plan in pairs if plan.lengths is not None and not offer.repeated)


@given(graphs(), st.integers(1, 200 * GIB), st.integers(0, 100 * GIB), st.sampled_from([None, "auto", "checkpoints"]))
def test_more_budget_never_means_more_recompute(graph, budget, more, offload):
    configs = (Config(memory_budget=each, offload=offload) for each in (budget, budget + more))
    small, large = (make_plans(*graph, DEVICE, config) for config in configs)
    assert large.offloaded <= small.offloaded
    assert recomputed(graph[0], large) <= recomputed(graph[0], small)
    assert sum(plan.added_ms for plan in large.of) <= sum(plan.added_ms for plan in small.of) + 1e-9


@given(graphs(), st.integers(1, 200 * GIB))
def test_a_plan_keeps_to_its_budget_or_says_what_is_missing(graph, budget):
    plans = make_plans(*graph, DEVICE, Config(memory_budget=budget))
    if plans.peak > budget:
        assert plans.advice.startswith(f"{readable(plans.peak - budget)} more")
        least = make_plans(*graph, DEVICE, Config(memory_budget=1))
        assert plans.peak == least.peak
    else:
        assert plans.advice == ""


def test_a_budget_says_how_many_blocks_keep_nothing_on_the_device():
    """The first ones, after the loops that cost nothing; chunks get shorter only behind that."""
    offers, timeline = llama(65536, 8, checkpointed=True)
    timeline = replace(timeline, segments=tuple(replace(segment, gradients=0) for segment in timeline.segments))
    stream = 65536 * WIDTH * 2
    least = make_plans(offers, timeline, DEVICE, Config(memory_budget=1)).peak
    whole = make_plans(offers, timeline, DEVICE, Config(offload="checkpoints"))
    assert (whole.offloaded, whole.peak_whole) == (8, timeline.peak([held(offer, None) for offer in offers]))
    default = make_plans(offers, timeline, DEVICE, Config(min_bytes=0))
    for blocks in range(4):
        config = Config(memory_budget=default.peak - blocks * stream, offload="auto")
        plans = make_plans(offers, timeline, DEVICE, config)
        assert (plans.offloaded, plans.advice) == (blocks, "")  # the peak is in the head, where none of them is back
        assert plans.of == default.of
    plans = make_plans(offers, timeline, DEVICE, Config(memory_budget=1, offload="auto"))
    assert (plans.offloaded, plans.peak) == (
        8,
        least - 6 * stream,
    )  # in the last layer its own is back, and the next one


@given(graphs())
def test_a_loop_is_never_chosen_for_a_higher_peak(graph):
    plans = make_plans(*graph, DEVICE, Config())
    heads = make_plans(*graph, DEVICE, Config(modules={n.module: False for n in graph[0] if not n.recomputes_nothing}))
    assert peak_before_longer_chunks(graph, plans) <= peak_before_longer_chunks(graph, heads)
    assert plans.peak <= heads.peak + LENT_SHARE * (plans.peak_whole - heads.peak)


def peak_before_longer_chunks(graph, plans) -> int:
    """The peak with the same loops, in chunks of the length that they are judged by."""
    offers, timeline = graph
    defaults = [several(offer.terms, demanded=False) for offer in offers]
    chosen = [default if loop else None for default, loop in zip(defaults, looped(plans), strict=True)]
    return timeline.peak([held(offer, lengths) for offer, lengths in zip(offers, chosen, strict=True)])


@given(graphs())
def test_longer_chunks_take_back_a_small_part_of_what_loops_save(graph):
    plans = make_plans(*graph, DEVICE, Config())
    peak = peak_before_longer_chunks(graph, plans)
    assert plans.peak <= peak + LENT_SHARE * (plans.peak_whole - peak)


def test_layers_that_are_alike_keep_one_chunk_length():
    """The first two of these leave room, the last two do not: two bodies to compile in place of one."""
    offers, timeline = llama(16384, 4)
    plans = make_plans(offers[:4], Timeline(timeline.resident, timeline.segments[:-1]), DEVICE, Config())
    assert [plan.lengths.chunk for plan in plans.of] == [4096] * 4


@pytest.mark.parametrize("checkpointed", [False, True])
def test_chunks_are_longer_where_the_rest_of_a_step_leaves_room(checkpointed):
    """Alike regions have alike chunks, and added time is what longer ones are for."""
    graph = llama(32768, 8, checkpointed=checkpointed)
    plans, short = (make_plans(*graph, DEVICE, config) for config in (Config(), Config(chunk_tokens=4096)))
    assert [plan.lengths.chunk for plan in plans.of[:8]] == [8192] * 8
    assert sum(plan.added_ms for plan in plans.of[:8]) < 0.9 * sum(plan.added_ms for plan in short.of[:8])


def test_chunks_stay_where_they_make_the_peak():
    """Nothing else is in memory: two such chunks would take back a third of what the loop saves."""
    offer = mlp(12288)
    weights = 3 * WIDTH * FFN * 2
    plans = make_plans([offer], Timeline(weights, (Segment(region=0, gradients=weights),)), DEVICE, Config())
    assert plans.of[0].lengths.chunk == 4096


@pytest.mark.parametrize("options", [{"min_bytes": 0}, {"chunk_tokens": 4096}, {"num_chunks": 8}])
def test_chunks_stay_where_the_user_decides(options):
    plans = make_plans(*llama(32768, 8), DEVICE, Config(**options))
    assert [plan.lengths.chunk for plan in plans.of[:8]] == [4096] * 8


def small_head(length: int, hidden: int, classes: int) -> InModule:
    """A head in float32 that one chunk of the usual size covers."""
    logits, weights = length * classes * 4, classes * hidden * 4
    memory = RegionMemory(
        written=3 * logits,
        forward=Footprint(length * hidden * 4, weights, 0, weights, weights, 0, 2 * classes * 4),
        saved=length * hidden * 4 + weights,
        saved_whole=logits,
        whole_forward=logits,
        whole_backward=2 * logits + weights,
    )
    cost = RegionCost(2.0 * length * classes * hidden, 0.0, 1.0, weights * 2, half=False)
    return offered("lm_head", Extent(length, False, 1, classes * 4), memory, cost, recomputes_nothing=True)


def test_a_small_model_has_short_chunks():
    """By the usual size there would be one chunk; eight or more cost the host a millisecond at most."""
    offer, timeline = small_head(2048, 64, 20_000), Timeline(2**23, (Segment(region=0),))
    plans = make_plans([offer], timeline, DEVICE, Config())
    assert plans.of[0].chunks >= 8
    assert plans.peak < 0.35 * plans.peak_whole
    assert plans.of[0].added_ms <= CHEAP_MS


def test_a_small_model_whose_ranks_meet_keeps_to_its_own_shapes():
    """What else a step holds may differ by rank."""
    offer, timeline = replace(small_head(2048, 64, 20_000), communicates=True), Timeline(2**23, (Segment(region=0),))
    assert make_plans([offer], timeline, DEVICE, Config()).of[0].lengths == several(offer.terms, demanded=True)


def test_a_loop_that_is_demanded_has_two_chunks_at_least():
    """Although products get few rows."""
    offer, timeline = small_head(100, 64, 20_000), Timeline(2**23, (Segment(region=0),))
    assert offer.terms.lengths.chunk == 100
    assert make_plans([offer], timeline, DEVICE, Config(min_bytes=0)).of[0].lengths.chunk == 50


@pytest.mark.parametrize(("wish", "note"), [({"num_chunks": 1}, IN_VAIN), ({"chunk_tokens": 100}, IN_VAIN), ({}, "")])
def test_one_chunk_that_saves_nothing_is_told(wish, note):
    """The user asks for it."""
    offer, timeline = small_head(100, 64, 20_000), Timeline(2**23, (Segment(region=0),))
    (plan,) = make_plans([offer], timeline, DEVICE, Config(min_bytes=0, modules={"lm_head": wish or True})).of
    assert plan.lengths is not None
    assert plan.note == note


def test_one_chunk_may_save_something():
    """Its values are not saved, but made again for backward."""
    offer = replace(mlp(100), memory=RegionMemory(written=GIB, saved_whole=2**20))
    (plan,) = make_plans([offer], Timeline(0, (Segment(region=0),)), DEVICE, Config(num_chunks=1)).of
    assert (plan.chunks, plan.note) == (1, "")


@given(graphs(), st.sampled_from(COUNTS))
def test_what_shorter_chunks_would_save_is_told(graph, count):
    """A plan's peak is a tenth above that of so many chunks at most, or it says by how much and what it saves."""
    plans = make_plans(*graph, DEVICE, Config())
    fixed = make_plans(*graph, DEVICE, Config(num_chunks=count))
    if min(offer.extent.length // count for offer in graph[0]) >= LEAST_ROWS and fixed.peak < 0.9 * plans.peak:
        assert plans.leaner.startswith("num_chunks=")
        assert "ms a step (predicted)" in plans.leaner


@given(graphs(), st.one_of(st.none(), st.integers(1, 200 * GIB)))
def test_equal_ranks_come_to_equal_plans(graph, budget):
    config = Config(memory_budget=budget)
    assert make_plans(*graph, DEVICE, config) == make_plans(*graph, DEVICE, config)


def test_what_communicates_is_planned_by_its_own_shapes():
    """Ranks with other devices, or another rest of the graph, run the same chunks; a rank alone would choose others."""
    offers, rest = llama(8192, 2)
    meeting = [replace(offer, communicates=True) for offer in offers]
    tight, loose, bare = Config(memory_budget="1GiB"), Config(memory_budget=0.9), Timeline(0, ())
    cases = [(rest, DEVICE, tight), (bare, replace(DEVICE, flops_per_ms=1.0), loose), (bare, DEVICE, Config())]
    alone, found = ([[p.lengths for p in make_plans(each, *case).of] for case in cases] for each in (offers, meeting))
    assert found == [[offer.terms.lengths for offer in offers]] * len(cases)
    assert alone[0] != alone[1]


def test_what_a_checkpointed_block_keeps_is_held_from_the_forward_on():
    block = (Segment(region=0, block=0, entry=1), Segment(saved=10, block=0))
    behind, alone = Timeline(0, (*block, Segment(passing=100))), Timeline(0, block)
    assert [behind.peak([Held(saved_results=kept)]) for kept in (0, 10)] == [101, 111]
    again = [alone.peak([Held(saved_results=kept)]) for kept in (0, 10)]
    assert again == [11, 11]  # not computed again, not counted again
