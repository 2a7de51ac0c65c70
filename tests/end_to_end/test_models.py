"""Hugging Face models, unmodified, trained through the backend: one through Inductor, the rest through AOTAutograd.

In float32: transformers' norms and losses cast to float32 whatever the model's dtype is.
"""

from __future__ import annotations

import pytest
import torch
from numerics import assert_as_good_as_eager
from transformer_models import V, loss_of, make

pytestmark = pytest.mark.slow

PATTERNS = {"gpt2": "mlp"}


@pytest.mark.parametrize(
    ("name", "batch", "checkpointing", "inner"),
    [
        *[(name, 1, True, "aot_eager") for name in ("llama", "gpt2", "gemma2")],
        *[(name, 3, False, "aot_eager") for name in ("llama", "qwen2", "phi3")],
        ("llama", 3, True, "inductor"),
    ],
)
def test_trains_with_eagers_gradients(name, batch, checkpointing, inner):
    model = make(name, checkpointing)
    ids = torch.randint(0, V, (batch, 37))
    labels = ids.clone()
    labels[:, :5] = -100
    report = assert_as_good_as_eager(
        model, (ids, labels), step=loss_of, dtype=torch.float32, chunk_tokens=16 * batch, inner=inner
    )
    patterns = [region.pattern for region in report.regions]
    assert patterns.count(PATTERNS.get(name, "gated_mlp")) == 2, str(report)
    assert patterns.count("head") == 1, str(report)
    assert {region.chunks for region in report.regions} == {3}


def test_bfloat16():
    ids = torch.randint(0, V, (3, 37))
    assert_as_good_as_eager(make("llama"), (ids, ids), step=loss_of, dtype=torch.bfloat16, regions=3)


def test_generation_prefill_computes_no_gradient():
    import mst_fx

    torch._dynamo.reset()
    model = make("llama").eval()
    ids = torch.randint(0, V, (2, 37))
    compiled = torch.compile(
        model, backend=mst_fx.backend, options={"min_bytes": 0, "chunk_tokens": 32, "inner": "eager"}
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits)
    report = mst_fx.reports()[-1]
    assert {region.backward for region in report.regions} == {"none"}
    assert [refusal.reason for refusal in report.refusals] == ["NO_LOSS"]
