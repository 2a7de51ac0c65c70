"""Gradients in the situations in which other implementations went wrong."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from models import CheckpointedLM, D, Gelu, MlpLM, NanoGPT, SwiGLU, V, tokens
from numerics import assert_as_good_as_eager, gradients, looped, relative_error
from torch import nn

import mst_fx


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch._dynamo.reset()


@pytest.mark.parametrize("batch", [1, 3])
def test_handwritten_gpt(batch):
    ids, labels = tokens(batch)
    labels[labels == -100] = -1
    report = assert_as_good_as_eager(NanoGPT(), (ids, labels), regions=3)
    assert {region.pattern for region in report.regions} == {"mlp", "head"}
    assert [region.backward for region in report.regions] == ["recompute", "recompute", "in_forward"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mlp", [SwiGLU, Gelu])
def test_dtypes(dtype, mlp):
    report = assert_as_good_as_eager(MlpLM(mlp()), tokens(2, 80), dtype=dtype, regions=2)
    in_forward = dtype is not torch.float16  # fp16 gradients need the true upstream scale
    assert (report.regions[1].backward == "in_forward") == in_forward


@pytest.mark.parametrize("length", [2, 15, 16, 17, 31, 32, 53])
def test_lengths_around_a_chunk(length):
    assert_as_good_as_eager(MlpLM(), tokens(1, length, ignored=1), regions=2)


@pytest.mark.parametrize("length", [0, 1])
def test_lengths_that_cannot_be_split(length):
    model = MlpLM(reduction="sum")
    report = assert_as_good_as_eager(model, tokens(1, length, ignored=0), regions=0)
    assert {refusal.reason for refusal in report.refusals} == ({"SHAPE"} if length else set())


def test_chunk_with_all_labels_ignored():
    assert_as_good_as_eager(MlpLM(), tokens(1, 64, ignored=40), regions=2)


def test_all_labels_ignored_is_nan_as_in_eager():
    model = MlpLM().double()
    ids, labels = tokens(1, 40, ignored=40)
    assert looped(model)(ids, labels).isnan()
    assert model(ids, labels).isnan()


@pytest.mark.parametrize(
    "loss",
    [
        {"reduction": "sum"},
        {"ignore_index": 3},
        {"weight": torch.linspace(0.5, 2, V, dtype=torch.float64)},
    ],
    ids=str,
)
def test_cross_entropy_options(loss):
    ignored = 0 if "ignore_index" in loss else 5
    assert_as_good_as_eager(MlpLM(**loss), tokens(2, ignored=ignored), regions=2)


def test_cross_entropy_per_token():
    weights = torch.rand(2 * 37, dtype=torch.float64)
    report = assert_as_good_as_eager(
        MlpLM(reduction="none"), tokens(2), step=lambda m, *args: (m(*args) * weights).sum(), regions=2
    )
    assert report.regions[1].backward == "in_forward"  # the weighted sum is the one result


def test_several_results_per_token():
    weights = torch.rand(2 * 37, dtype=torch.float64)

    def step(m, *args):
        each = m(*args)
        return (each * weights).sum() + torch.sort(each).values[3]

    report = assert_as_good_as_eager(MlpLM(reduction="none"), tokens(2), step=step, regions=2)
    assert report.regions[1].backward == "recompute"


@pytest.mark.parametrize(
    "tail",
    [lambda x: torch.tanh(x / 30) * 30, lambda x: x * 0.125, lambda x: x.double() / 0.7],
    ids=["softcap", "scale", "upcast and temperature"],
)
def test_elementwise_tails(tail):
    assert_as_good_as_eager(MlpLM(tail=tail), tokens(3), regions=2)


def test_loss_times_a_factor():
    report = assert_as_good_as_eager(MlpLM(), tokens(2), step=lambda m, *args: m(*args) * 0.25, regions=2)
    assert report.regions[1].backward == "in_forward"


def test_gradient_accumulation():
    model = MlpLM().double()
    compiled = looped(model)
    batches = [tokens(1, length) for length in (37, 37, 37)]
    for step in (model, compiled):
        model.zero_grad()
        for batch in batches:
            (step(*batch) / len(batches)).backward()
        if step is model:
            truth = {name: p.grad.clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        assert relative_error(p.grad, truth[name]) < 1e-10


def test_non_contiguous_input():
    class Transposed(MlpLM):
        def forward(self, ids, labels):
            x = self.tokens(ids).transpose(0, 1)
            return F.cross_entropy(self.head(x + self.mlp(x)).flatten(0, 1), labels.t().flatten())

    assert_as_good_as_eager(Transposed(), tokens(3), regions=2)


def test_frozen_weights_get_no_gradient():
    model = MlpLM()
    model.head.weight.requires_grad_(False)
    model.mlp.up.weight.requires_grad_(False)
    report = assert_as_good_as_eager(model, tokens(2), regions=2)
    assert len(report.regions) == 2


def test_lora_on_every_projection():
    class Lora(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base.requires_grad_(False)
            self.a, self.b = nn.Linear(base.in_features, 4, bias=False), nn.Linear(4, base.out_features, bias=False)

        def forward(self, x):
            return self.base(x) + 2.0 * self.b(self.a(x))

    model = MlpLM()
    model.head = Lora(model.head)
    model.mlp.up = Lora(model.mlp.up)
    assert_as_good_as_eager(model, tokens(2), regions=2)


def test_two_heads():
    class TwoHeads(MlpLM):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.Linear(D, V)

        def forward(self, ids, labels):
            x = self.tokens(ids)
            x = x + self.mlp(x)
            one = F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())
            return one + 0.3 * F.cross_entropy(self.second(x).flatten(0, 1), labels.roll(1, 1).flatten())

    assert_as_good_as_eager(TwoHeads(), tokens(2), regions=3)


def test_same_module_called_twice():
    class Twice(MlpLM):
        def forward(self, ids, labels):
            x = self.tokens(ids)
            x = x + self.mlp(x)
            x = x + self.mlp(x)
            logits = self.head(x)
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    assert_as_good_as_eager(Twice(), tokens(2), regions=3)


def test_weight_used_as_up_and_gate():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(D, 64), nn.Linear(64, D)

        def forward(self, x):
            return self.down(F.silu(self.up(x)) * F.linear(x, self.up.weight))

    assert_as_good_as_eager(MlpLM(Shared()), tokens(2), regions=2)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_retain_graph_gives_the_same_gradients_twice(inner):
    model = MlpLM().double()
    loss = looped(model, inner=inner)(*tokens(2))
    loss.backward(retain_graph=True)
    first = {name: p.grad.clone() for name, p in model.named_parameters()}
    loss.backward()
    for name, p in model.named_parameters():
        assert relative_error(p.grad, 2 * first[name]) < 1e-12


def test_second_derivative_is_an_error_not_a_wrong_number():
    model = MlpLM().double()
    loss = looped(model, inner="eager")(*tokens(2))
    with pytest.raises(RuntimeError, match="differentiated once more"):
        torch.autograd.grad(loss, list(model.mlp.parameters()), create_graph=True)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_computes_no_gradient(context):
    model = MlpLM().double()
    batch = tokens(2)
    with context():
        loss = looped(model)(*batch)
    assert not loss.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert {region.backward for region in mst_fx.reports()[-1].regions} == {"none"}
    torch.testing.assert_close(loss, model(*batch))


@pytest.mark.parametrize("inside", [False, True], ids=["around the compiled call", "in the graph"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(inside, dtype):
    model = MlpLM()

    def step(m, *args):
        with torch.autocast("cpu", dtype):
            return m(*args)

    batch = tokens(2)
    truth = gradients(model.double(), model, batch)
    model.float()
    eager = gradients(model, lambda *args: step(model, *args), batch)
    if inside:
        ours = gradients(model, looped(lambda *args: step(model, *args)), batch)
    else:
        compiled = looped(model)
        ours = gradients(model, lambda *args: step(compiled, *args), batch)
    assert len(mst_fx.reports()[-1].regions) == 2
    for name, value in truth.items():
        assert relative_error(ours[name], value) <= relative_error(eager[name], value) + 4e-3, name


def test_fp16_with_a_gradient_scaler():
    model = MlpLM().half()
    batch = tokens(2, 80)
    grads = []
    for step in (model, looped(model)):
        model.zero_grad()
        (step(*batch) * 2.0**12).backward()
        grads.append([p.grad / 2.0**12 for p in model.parameters()])
    exact = model.double()
    exact.zero_grad()
    exact(*batch).backward()
    for eager, ours, p in zip(*grads, exact.parameters(), strict=True):
        assert relative_error(ours.double(), p.grad) <= relative_error(eager.double(), p.grad) + 1e-3


def test_gradient_checkpointing_by_hand():
    report = assert_as_good_as_eager(CheckpointedLM(), tokens(2), regions=2)
    assert {region.pattern for region in report.regions} == {"gated_mlp", "head"}
