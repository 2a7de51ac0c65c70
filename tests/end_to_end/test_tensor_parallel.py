"""Tensor parallel training: loops over the shards of each rank, and the collectives of the program outside of them.

Attention runs by groups of the rank's own heads.
"""

from __future__ import annotations

import pytest
import torch
from ranks import on_ranks
from sharded import HIDDEN, PROGRAMS, TOKENS, on_two_dims, outcomes, planned_llama

PATTERNS = {"plain": ["mlp"], "attention": ["attention"], "attention, dtensors": ["attention"]}


@pytest.fixture(scope="module")
def results():
    return on_ranks(2, outcomes, list(PROGRAMS))


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_parallel_block_is_looped_right(name, results):
    """Loss and gradients are those of one process, and no rank waits for another one more often."""
    found = results[name]
    assert max(found.errors.values()) < 1e-13, found.errors
    assert found.regions == PATTERNS.get(name, ["gated_mlp"])
    assert not found.refusals
    assert not found.collectives - found.without
    if name not in ("whole", "batch"):
        assert found.collectives


def test_sizes_are_those_of_the_shard(results):
    """Three values of 32 features of 64, and what the ranks add up."""
    assert results["gated"].sizes == [2 * TOKENS * (4 * 32 + HIDDEN) * 8]
    assert results["whole"].sizes == [2 * TOKENS * (4 * 64 + HIDDEN) * 8]
    assert results["batch"].sizes == [TOKENS * (4 * 64 + HIDDEN) * 8]


@pytest.mark.slow
def test_inductor_compiles_what_enters_and_leaves():
    for name, found in on_ranks(2, outcomes, ["gated", "dtensors"], "inductor").items():
        assert max(found.errors.values()) < 1e-13, (name, found.errors)
        assert found.regions == ["gated_mlp"]


@pytest.mark.slow
def test_blocks_that_are_fully_sharded_as_well():
    errors, regions = on_ranks(4, on_two_dims)
    assert max(errors.values()) < 1e-13, errors
    assert regions == ["gated_mlp", "mlp"]


@pytest.mark.slow
def test_a_plan_of_transformers(tmp_path):
    """Its MLPs, and its head, which gathers logits. The loss of transformers rounds them to float32."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        use_cache=False,
    )
    transformers.LlamaForCausalLM(config).to(torch.float64).save_pretrained(tmp_path)
    errors, (report,) = on_ranks(2, planned_llama, str(tmp_path))
    assert max(errors.values()) < 1e-6, errors
    assert [region.pattern for region in report.regions] == [*["attention", "gated_mlp"] * 2, "head"]
    assert all(region.verified for region in report.regions)
