"""What a program writes around a region: to its results, to what it reads, through `.data`, into buffers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from beside import leaf, report_beside_eager
from torch.utils.checkpoint import checkpoint

MLP = (3, 7, 4), (4, 16), (16, 4)
HEAD = (3, 7, 4), (33, 4)


def mlp(x, up, down):
    return (x @ up).tanh() @ down


def copied(y, x):
    return y.clone(), y.mul_(2)


def added_up(y, x):
    return y.sum(), y.add_(x)


def one_column(y, x):
    other = y[:, 0] * 1
    y[:, 0] = 0
    return other, y


def residual(y, x):
    return x + y, y.clamp_(-0.1, 0.1)


def measured(y, x):
    return y.detach().norm(dim=-1), F.relu(y, inplace=True)


def stored(y, x):
    kept = torch.zeros_like(x)
    kept.copy_(y)
    return kept, F.dropout(y, 0.0, True, True).mul_(3)


def viewed(y, x):
    view = y.view(-1)
    y.mul_(2)
    return view * 1


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "after", [copied, added_up, one_column, residual, measured, stored, viewed], ids=lambda after: after.__name__
)
def test_a_result_is_read_and_then_written(after, inner):
    report = report_beside_eager(lambda x, up, down: after(mlp(x, up, down), x), *MLP, inner=inner)
    assert [region.pattern for region in report.regions] == ["mlp"]


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_loss_is_logged_and_then_scaled(inner):
    def program(x, head, labels):
        loss = F.cross_entropy(F.linear(x, head).flatten(0, 1), labels.flatten())
        log = loss.detach().clone()
        loss /= 4
        return loss, log

    def inputs(_):
        return [*(leaf(*shape) for shape in HEAD), torch.randint(0, 33, (3, 7))]

    report = report_beside_eager(program, inputs=inputs, inner=inner)
    assert [region.backward for region in report.regions] == ["in_forward"]


def test_a_result_that_shares_memory_with_another_one():
    def program(x, up, down):
        y = mlp(x, up, down)
        view = y.view(-1, 4)
        total = (view * 2).sum(-1)
        y.mul_(2)
        return total, view * 1, y

    report_beside_eager(program, *MLP)


def weight_data(x, up, down):
    y = mlp(x, up, down)
    up.data.clamp_(-0.1, 0.1)
    return y


def stream_data(x, up, down):
    y = mlp(x, up, down)
    x.data.zero_()
    return y


def two_uses(x, up, down):
    y = mlp(x, up, down)
    up.data.mul_(0.5)
    return y, mlp(x, up, down)


@pytest.mark.parametrize("program", [weight_data, stream_data, two_uses], ids=lambda program: program.__name__)
def test_what_backward_reads_again_is_written_through_data(program):
    report = report_beside_eager(program, *MLP)
    assert {refusal.reason for refusal in report.refusals} == {"MUTATION"}
    assert "reads again" in report.refusals[0].text


def test_what_gradients_in_the_forward_were_made_of_is_written_through_data():
    def program(x, head):
        loss = F.linear(x, head).logsumexp(-1).sum()
        head.data.mul_(3)
        return loss

    (refusal,) = report_beside_eager(program, *HEAD).refusals
    assert refusal.reason == "MUTATION"


@pytest.mark.parametrize("scalar", [False, True])
def test_a_bias_of_which_nothing_is_saved_is_updated_behind_the_region(scalar):
    def program(x, head, bias):
        values = (F.linear(x, head) + bias).logsumexp(-1)
        values = values.sum() if scalar else values
        with torch.no_grad():
            bias.add_(0.01)
        return values

    def inputs(_):
        return [*(leaf(*shape) for shape in HEAD), torch.zeros(33, dtype=torch.float64)]

    for inner in ("eager", "aot_eager"):
        report = report_beside_eager(program, inputs=inputs, inner=inner)
        assert len(report.regions) == scalar  # the gradients are there already, or have to be made again
        assert [refusal.reason for refusal in report.refusals] == ([] if scalar else ["MUTATION"])


def test_a_metric_without_gradients_in_front_of_the_loss():
    """The first reader of the logits stands in another mode, and the labels are flattened behind it."""

    def program(x, head, labels):
        logits = F.linear(x, head)
        with torch.no_grad():
            accuracy = (logits.argmax(-1) == labels).double().mean()
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), accuracy

    def inputs(_):
        return [*(leaf(*shape) for shape in HEAD), torch.randint(0, 33, (3, 7))]

    assert len(report_beside_eager(program, inputs=inputs).regions) == 1


@pytest.mark.parametrize("outside", [torch.sum, lambda y: y.square().sum()], ids=["sum", "squares"])
@pytest.mark.parametrize("program", [lambda x, w: F.linear(x, w).logsumexp(-1).sum(), lambda x, w: mlp(x, w.t(), w)])
def test_second_derivatives_raise_an_error(program, outside):
    """At once: what reads the gradient need not lead back to the loop, as where its upstream gradient is a constant."""
    x, head = (leaf(*shape) for shape in HEAD)
    options = {"min_bytes": 0, "num_chunks": 3, "inner": "eager", "strict": True}
    loss = outside(torch.compile(program, backend="mst_fx", options=options)(x, head))
    with pytest.raises(RuntimeError, match="once more"):
        torch.autograd.grad(loss, x, create_graph=True)


def slots(x, up, down):
    out = torch.zeros_like(x)
    out[:, :4] = mlp(x[:, :4], up, down)
    out[:, 4:] = mlp(x[:, 4:], up, down)
    return out


def rows_in_a_loop(x, up, down):
    out = torch.empty_like(x)
    for i in range(3):
        out[i] = mlp(x[i], up, down)
    return out


def beside_a_gradient(x, up, down):
    out = x * 1
    out[:, 1:] = mlp(x, up, down)[:, 1:]
    return out


class Handed(torch.autograd.Function):
    """Is handed a weight, and reads the codes alone."""

    @staticmethod
    def forward(ctx, x, weight, codes):
        ctx.save_for_backward(codes)
        return x @ codes.double()

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.saved_tensors[0].double().t(), None, None


def handed_alone(x, codes, weight, down):
    h = Handed.apply(x, weight, codes)
    weight.data = codes
    return h.tanh() @ down


def read_before(x, codes, weight, down):
    h = Handed.apply(x, codes, weight)
    weight.data = codes
    return h.tanh() @ down


def read_after(x, codes, weight, down):
    h = Handed.apply(x, weight, codes)
    weight.data = codes + 1
    return h.tanh() @ down + Handed.apply(x, codes, weight)[..., :4]


@pytest.mark.parametrize(
    ("program", "regions"),
    [(handed_alone, 1), (read_before, 0), (read_after, 2)],
    ids=lambda given: getattr(given, "__name__", None),
)
def test_a_weight_gets_other_memory_beside_a_region(program, regions):
    def inputs(_):
        codes = [torch.randint(-4, 4, (4, 16), dtype=torch.int8) for _ in range(2)]
        return [leaf(3, 7, 4), *codes, leaf(16, 4)]

    report = report_beside_eager(program, inputs=inputs, inner="aot_eager")
    assert len(report.regions) == regions
    told = [refusal.text for refusal in report.refusals]
    assert all("gives other memory to a value that the region has read" in text for text in told)
    assert len(told) == (not regions)


def without_gradient(x, up, down):
    out, y = x * 1, mlp(x, up, down)
    with torch.no_grad():
        out[0] = y[0]
    return out


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("program", [slots, rows_in_a_loop, beside_a_gradient], ids=lambda program: program.__name__)
def test_a_result_that_is_written_into_a_buffer_has_its_gradient(program, inner):
    """The write is the only reader that can send one back, and has no value of its own."""
    assert len(report_beside_eager(program, *MLP, inner=inner).regions) >= 1


def test_a_result_that_is_written_into_a_buffer_without_gradient():
    report_beside_eager(without_gradient, *MLP)


def test_a_loss_that_is_written_into_a_buffer_beside_another_one():
    def program(x, head, labels):
        logits, penalty = F.linear(x, head), torch.zeros(3, 7, dtype=torch.float64)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        penalty[:] = logits.logsumexp(-1)
        return loss, penalty.sum()

    report_beside_eager(program, inputs=lambda _: [*(leaf(*shape) for shape in HEAD), torch.randint(0, 33, (3, 7))])


def test_a_teacher_is_updated_in_the_block_that_the_loop_is_put_in_front_of():
    def program(x, head, teacher):
        with torch.no_grad():
            teacher.lerp_(head, 0.5)
            target = F.linear(x, teacher)
            confidence = target.amax(-1).mean()
        student = F.linear(x, head).log_softmax(-1)
        return F.kl_div(student, target.softmax(-1), reduction="sum"), confidence

    shapes = [*HEAD, HEAD[1]]
    report_beside_eager(program, inputs=lambda _: [leaf(*shape) for shape in shapes[:2]] + [leaf(*shapes[2]).detach()])


def losses_of(x, head, labels):
    return F.cross_entropy(F.linear(x, head).transpose(1, 2), labels, reduction="none")


def added_then_clamped(x, head, labels, z):
    each = losses_of(x, head, labels)
    z.add_(each.detach())
    each = each.clamp_(max=2)
    return each.mean(), z


def copied_then_masked(x, head, labels, z):
    each = losses_of(x, head, labels)
    z.copy_(each.detach())
    return each.mul_(labels != 3).sum(), z


def zeroed_through_a_view(x, head, labels, z):
    each = F.cross_entropy(F.linear(x, head).flatten(0, 1), labels.flatten(), reduction="none")
    rows = each.view(3, 7)
    loss = rows.sum(1).mean()
    each.detach()[labels.flatten() == 3] = 0
    return loss, rows.detach().mean().exp() + z


@pytest.mark.parametrize(
    "program", [added_then_clamped, copied_then_masked, zeroed_through_a_view], ids=lambda program: program.__name__
)
def test_losses_that_are_read_by_a_write_and_then_written(program):
    def inputs(_):
        labels = torch.randint(0, 5, (3, 7))
        return [*(leaf(*shape) for shape in HEAD), labels, torch.zeros(3, 7, dtype=torch.float64)]

    report_beside_eager(program, inputs=inputs)


def test_tokens_that_are_written_into_memory_made_for_them():
    def program(x, up, down):
        tokens = torch.zeros(3, 9, 4, dtype=torch.float64)
        tokens[:, :7] = x
        return mlp(tokens, up, down)

    report_beside_eager(program, *MLP)


def recomputed(function, *args):
    return checkpoint(function, *args, use_reentrant=False)


def with_statistics(x, up, down, mean):
    y = mlp(x + mean, up, down)
    return recomputed(lambda y: F.batch_norm(y.flatten(0, 1), mean, mean.exp(), training=True), y)


def with_a_counter(x, up, down, count):
    y = mlp(x + count, up, down)

    def block(y):
        count.add_(1)
        return y.tanh()

    return y + recomputed(block, x)


@pytest.mark.parametrize("program", [with_statistics, with_a_counter], ids=lambda program: program.__name__)
def test_a_checkpointed_block_writes_to_what_a_region_in_front_of_it_reads(program):
    def inputs(_):
        return [*(leaf(*shape) for shape in MLP), torch.ones(4, dtype=torch.float64)]

    report_beside_eager(program, inputs=inputs, inner="aot_eager")


def in_a_block(x, up, down, bias):
    y = recomputed(lambda x: (x @ up + bias).tanh() @ down, x)
    with torch.no_grad():
        bias.add_(1)
    return y


def in_a_block_of_a_block(x, up, down, bias):
    y = recomputed(lambda x: recomputed(lambda x: (x @ up + bias).tanh() @ down, x) * 2, x)
    with torch.no_grad():
        bias.add_(1)
    return y


@pytest.mark.parametrize("program", [in_a_block, in_a_block_of_a_block], ids=lambda program: program.__name__)
def test_what_a_checkpointed_block_reads_is_written_behind_it(program):
    """Eager execution saves no bias; a loop in the block would read it again."""

    def inputs(_):
        return [*(leaf(*shape) for shape in MLP), leaf(16)]

    (refusal,) = report_beside_eager(program, inputs=inputs, inner="aot_eager").refusals
    assert refusal.reason == "MUTATION"
    assert "Tensor.add_" in refusal.text


def binary_gate(x, up, down):
    gate = torch.sigmoid(x @ up)
    gate.data.round_()
    return (gate * (x @ up)) @ down


def masked_column(x, up, down):
    h = F.relu(x @ up)
    h.data[..., 0] = 0
    return h @ down


def floored(x, head, _):
    scores = F.linear(x, head).log_softmax(-1)
    scores.data.clamp_(min=-2)
    return F.nll_loss(scores.flatten(0, 1), torch.arange(21))


def capped_behind(x, head, _):
    sums = F.linear(x, head).logsumexp(-1)
    sums.data.clamp_(max=2.0)
    return (sums * torch.arange(7)).sum()


def squared_inside(x, head, _):
    sums = F.linear(x, head).logsumexp(-1)
    loss = sums.square().sum()
    sums.data.mul_(2)
    return loss


@pytest.mark.parametrize(
    "program",
    [binary_gate, masked_column, floored, capped_behind, squared_inside],
    ids=lambda program: program.__name__,
)
def test_results_that_their_own_backward_reads_are_written_through_data(program):
    shapes = MLP if program in (binary_gate, masked_column) else (*HEAD, (1,))
    (refusal,) = report_beside_eager(program, *shapes).refusals
    assert refusal.reason == "MUTATION"


def norm_under_no_grad(x, up, down):
    h = F.layer_norm(x @ up, (16,))
    with torch.no_grad():
        h.mul_(2)
    return h.tanh() @ down


def norm_in_data(x, up, down):
    h = F.group_norm((x @ up).flatten(0, 1), 4)
    h.detach().clamp_(-1, 1)
    return h.tanh() @ down


def one_of_two_outs(x, up, down):
    h = x @ up
    with torch.no_grad():
        torch.sort(h * 2, -1, out=(h, torch.zeros(h.shape, dtype=torch.long)))
    return h.tanh() @ down


@pytest.mark.parametrize("program", [norm_under_no_grad, norm_in_data, one_of_two_outs], ids=lambda p: p.__name__)
def test_one_of_several_results_is_written_without_a_gradient(program):
    report = report_beside_eager(program, *MLP, inner="aot_eager")
    assert {refusal.reason for refusal in report.refusals} <= {"MUTATION"}


def wide_view(x, head):
    logits = F.linear(x, head)
    return logits.logsumexp(-1), logits, logits[:, :4]


def last_tokens(x, head):
    logits = F.linear(x, head)
    return logits, logits[:, -1]


def small_view(x, head):
    scores = F.linear(x, head).log_softmax(-1)
    return scores.exp().sum(), scores, scores[..., 7]


@pytest.mark.parametrize("program", [wide_view, last_tokens, small_view], ids=lambda program: program.__name__)
def test_results_that_share_memory_share_it_outside(program):
    """The caller writes to one of them, and finds it in the other."""
    torch._dynamo.reset()
    options = {"min_bytes": 0, "num_chunks": 3, "inner": "eager", "strict": True}
    x, head = (leaf(*shape).detach() for shape in HEAD)
    results = program(x, head), torch.compile(program, backend="mst_fx", options=options)(x, head)
    for *_, view in results:
        view.fill_(7.0)
    for eager, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager)
