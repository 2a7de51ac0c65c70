"""Models as a whole, with the habits that they have: breaks, tuples, caches, layers of torch.nn."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from models import MlpLM, NanoGPT, tokens
from numerics import assert_as_good_as_eager, looped
from torch import nn
from transformer_models import V, make

import mst_fx


@pytest.fixture(autouse=True)
def _reset():
    torch._dynamo.reset()


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_encoder_of_torch(activation, norm_first):
    layer = nn.TransformerEncoderLayer(32, 4, 96, 0.0, activation, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    report = assert_as_good_as_eager(
        model, (torch.randn(2, 24, 32),), step=lambda m, x: m(x).pow(4).mean(), dtype=torch.float32
    )
    assert [region.pattern for region in report.regions] == ["mlp", "mlp"]


def test_encoder_and_decoder_of_torch():
    model = nn.Transformer(32, 4, 1, 1, 96, 0.0, batch_first=True)
    inputs = torch.randn(2, 24, 32), torch.randn(2, 20, 32)
    step = lambda m, source, target: m(source, target).pow(4).mean()  # noqa: E731
    report = assert_as_good_as_eager(model, inputs, step=step, dtype=torch.float32)
    assert [region.pattern for region in report.regions] == ["mlp", "mlp"]


class Mapped(MlpLM):
    """Weighs its tokens sample by sample, as masks and scans are often written."""

    def forward(self, ids, labels):
        x = self.tokens(ids)
        x = torch.vmap(lambda row: row * row.norm(dim=-1, keepdim=True).sigmoid())(x)
        x = x + self.mlp(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def test_vmap_around_the_regions():
    report = assert_as_good_as_eager(Mapped(), tokens(2), regions=2)
    assert {region.pattern for region in report.regions} == {"gated_mlp", "head"}


def test_vmap_inside_a_region_is_refused():
    model = MlpLM(tail=torch.vmap(lambda logits: 30 * torch.tanh(logits / 30)))
    report = assert_as_good_as_eager(model, tokens(2), regions=1)
    (refusal,) = report.refusals
    assert (refusal.pattern, refusal.reason) == ("head", "TRANSFORM")


class Talkative(NanoGPT):
    """Breaks the graph in front of its head, and gives more than its loss."""

    def forward(self, ids, labels):
        x = self.tokens(ids)
        for norm1, attention, norm2, mlp in self.blocks:
            x = x + attention(norm1(x))
            x = x + mlp(norm2(x))
        torch._dynamo.graph_break()
        x = self.norm(x)
        logits = self.head(x)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "others": (x, [logits.argmax(-1)])}


@pytest.mark.slow
def test_breaks_and_nested_results():
    model = Talkative()
    ids, _ = tokens(2)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    expected = torch.compile(model, backend=counter)(ids, ids)
    torch._dynamo.reset()
    before = len(mst_fx.reports())
    actual = looped(model)(ids, ids)
    made = mst_fx.reports()[before:]
    assert len(made) == counter.frame_count == 2
    assert [[region.pattern for region in report.regions] for report in made] == [["mlp", "mlp"], ["head"]]
    torch.testing.assert_close(actual, expected)
    assert_as_good_as_eager(model, (ids, ids), step=lambda m, *args: m(*args)["loss"])


@pytest.mark.slow
def test_prefill_fills_the_cache_and_projects_one_token():
    model = make("llama").eval()
    model.config.use_cache = True
    ids = torch.randint(0, V, (2, 37))

    def prefill(ids):
        return model(ids, logits_to_keep=1, use_cache=True)

    with torch.no_grad():
        expected, actual = prefill(ids), looped(prefill)(ids)
        report = mst_fx.reports()[-1]
        last = ids[:, -1:]
        after = [model(last, past_key_values=out.past_key_values).logits for out in (expected, actual)]
    torch.testing.assert_close(actual.logits, expected.logits)
    torch.testing.assert_close(*after)
    assert [(region.pattern, region.backward) for region in report.regions] == [("gated_mlp", "none")] * 2


@pytest.mark.slow
def test_prefill_that_cuts_the_logits():
    model = make("llama").eval()
    ids = torch.randint(0, V, (2, 37))
    with torch.no_grad():
        actual = looped(lambda ids: model(ids).logits[:, -1])(ids)
        torch.testing.assert_close(actual, model(ids).logits[:, -1])
    (cut,) = mst_fx.reports()[-1].cuts
    assert cut.bytes_after * 37 == cut.bytes_before
