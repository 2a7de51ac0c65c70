"""Twelve architectures of transformers that differ as much as any, trained for one step.

What they bring: fused and split gates, parallel attention, low-rank attention, a custom autograd function, a scan,
experts with and without shared ones, experts for every token, biases on experts, tied heads, relative positions,
cross-attention, encoders, images, speech, two towers. All architectures: `examples/coverage.py`.
"""

from __future__ import annotations

import pytest

transformers = pytest.importorskip("transformers")

from coverage import examine  # noqa: E402 - needs transformers
from tiny_models import TASKS, cases  # noqa: E402

pytestmark = pytest.mark.slow

SAMPLE = [
    "FalconForCausalLM",
    "BloomForCausalLM",
    "Mamba2ForCausalLM",
    "ApertusForCausalLM",
    "GptOssForCausalLM",
    "DeepseekV3ForCausalLM",
    "Llama4ForCausalLM",
    "DebertaV2ForMaskedLM",
    "WhisperForConditionalGeneration",
    "ViTForImageClassification",
    "SiglipModel",
    "Wav2Vec2ForCTC",
]


@pytest.mark.parametrize("name", SAMPLE)
def test_trains_as_without(name):
    case = next(case for case in cases(tuple(TASKS)) if case.class_name == name)
    result = examine(case, "eager")
    assert result.status == "trains", f"{result.status}: {result.error}"
    assert result.graphs == result.plain_graphs
    assert result.heads_looped == result.heads
    assert result.mlps + result.experts > 0 or name == "Mamba2ForCausalLM"
    assert result.mlps_looped >= result.mlps + result.experts
    assert not result.grouped_error or result.grouped_looped >= result.mlps + result.experts
