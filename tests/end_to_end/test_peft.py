"""Adapters as PEFT makes them."""

from __future__ import annotations

import pytest
import torch
from memory_probe import saved_bytes
from numerics import assert_as_good_as_eager, looped
from transformer_models import SIZES, V, loss_of, transformers

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.slow

TOKENS = 48
ONE_LAYER = {**SIZES, "num_hidden_layers": 1}
ADAPTERS = {
    "lora": {"target_modules": ["lm_head", "q_proj"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.fixture(params=list(ADAPTERS))
def model(request):
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**ONE_LAYER))
    return peft.get_peft_model(base, peft.LoraConfig(r=4, init_lora_weights=False, **ADAPTERS[request.param]))


def test_head_with_an_adapter(model):
    ids = torch.randint(0, V, (2, TOKENS))
    report = assert_as_good_as_eager(model, (ids, ids), step=loss_of, dtype=torch.float32, chunk_tokens=16)
    assert [(region.pattern, region.backward) for region in report.regions][-1] == ("head", "in_forward")
    assert not report.refusals


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"target_modules": ["down_proj"]}], ids=repr)
def test_adapters_on_every_projection(options):
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**ONE_LAYER))
    config = peft.LoraConfig(r=4, init_lora_weights=False, **{"target_modules": "all-linear", **options})
    model, ids = peft.get_peft_model(base, config), torch.randint(0, V, (2, TOKENS))
    report = assert_as_good_as_eager(model, (ids, ids), step=loss_of, dtype=torch.float32, chunk_tokens=16)
    assert [region.pattern for region in report.regions] == ["gated_mlp", "head"]
    assert not report.refusals


def test_logits_are_not_saved(model):
    ids = torch.randint(0, V, (2, TOKENS))
    step = looped(lambda ids: loss_of(model, ids, ids), disable=("gated_mlp",))
    plain = looped(lambda ids: loss_of(model, ids, ids), disable=("gated_mlp", "head"))
    known = [*model.parameters(), *model.buffers()]
    logits = 2 * TOKENS * V * 4
    assert saved_bytes(lambda: step(ids), known) + 0.5 * logits < saved_bytes(lambda: plain(ids), known)
