"""What only a GPU shows: Triton bodies, float32 accumulation by the matrix units, alignment, CUDA graphs, peaks."""

from __future__ import annotations

import re

import experts
import losses
import predictions
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from memory_probe import peak_bytes
from models import Gelu, MlpLM, NanoGPT, SwiGLU, tokens
from numerics import TOLERANCE, gradients, looped, relative_error
from torch._inductor.utils import run_and_get_code

import mst_fx

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def _reset():
    torch.manual_seed(0)
    torch._dynamo.reset()


def on_gpu(batch):
    return [x.cuda() for x in batch]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mlp", [SwiGLU, Gelu])
def test_gradients_through_triton(dtype, mlp):
    model = MlpLM(mlp()).cuda()
    batch = on_gpu(tokens(2, 100))
    truth = gradients(model.double(), model, batch)
    model.to(dtype)
    eager = gradients(model, model, batch)
    ours = gradients(model, looped(model, chunk_tokens=64, inner="inductor"), batch)
    assert len(mst_fx.reports()[-1].regions) == 2
    for name, value in truth.items():
        assert relative_error(ours[name], value) <= relative_error(eager[name], value) + TOLERANCE[dtype], name


@pytest.mark.parametrize("form", experts.FORMS.values(), ids=experts.FORMS)
def test_experts_through_triton(form):
    n, d = 512, 64
    model = experts.Experts(form, d=d, f=128).cuda()
    batch = [torch.randn(n, d, device="cuda"), experts.routed(n).cuda()]

    def step(x, chosen):
        return model(x.to(model.up.dtype), chosen).square().mean()

    truth = gradients(model.double(), step, batch)
    model.bfloat16()
    eager = gradients(model, step, batch)
    ours = gradients(model, looped(step, chunk_tokens=128, inner="inductor"), batch)
    assert [region.chunks for region in mst_fx.reports()[-1].regions] == [4]
    for name, value in truth.items():
        assert relative_error(ours[name], value) <= relative_error(eager[name], value) + TOLERANCE[torch.bfloat16], name


def test_experts_peak():
    n, d, f, e = 16384, 256, 512, 16
    model = experts.Experts(experts.sorted_and_brought_back, d=d, f=f, e=e).cuda().bfloat16()
    x = torch.randn(n, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    chosen = experts.routed(n, e).cuda()
    compiled = looped(model, chunk_tokens=1024, inner="inductor")
    unlooped = torch.compile(model)
    wide = n * experts.K * f * 2
    peak = peak_bytes(lambda: compiled(x, chosen).square().mean().backward(), "cuda")
    matrices = sum(p.numel() for p in model.parameters()) * (2 + 4)  # gradients and their sums, and none of a chunk
    assert peak <= matrices + 5 * n * d * 4 + 8 * wide // 16
    assert peak_bytes(lambda: unlooped(x, chosen).square().mean().backward(), "cuda") >= 3 * wide + peak


def test_a_kernel_adds_gradients_of_experts_to_their_sums():
    """One call for each matrix and chunk; nothing waits for it, and CUDA graphs capture it."""
    from torch.profiler import ProfilerActivity, profile

    n, d = 512, 64
    model = experts.Experts(experts.sorted_and_brought_back, d=d, f=128).cuda().bfloat16()
    batch = [torch.randn(n, d, device="cuda", dtype=torch.bfloat16), experts.routed(n).cuda()]

    def step(x, chosen):
        return model(x, chosen).square().mean()

    eager = gradients(model, step, batch)
    for options in ({"triton.cudagraphs": True}, {}):
        compiled = looped(step, chunk_tokens=128, inner="inductor", **options)
        for _ in range(3):
            ours = gradients(model, compiled, batch)
        assert all(relative_error(ours[name], value) < 2e-2 for name, value in eager.items())
    torch.cuda.set_sync_debug_mode("error")
    try:
        compiled(*batch).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        compiled(*batch).backward()
    (kernel,) = (event for event in recorded.key_averages() if "_multiply_and_add" in event.key)
    assert kernel.count == 2 * 4


def test_handwritten_gpt_with_many_lengths():
    model = NanoGPT().cuda()
    compiled = looped(model, inner="inductor")
    before = len(mst_fx.reports())
    for length in (37, 50, 5, 64):
        ids, labels = on_gpu(tokens(2, length, ignored=0))
        eager, ours = gradients(model, model, (ids, labels)), gradients(model, compiled, (ids, labels))
        for name, value in eager.items():
            assert relative_error(ours[name], value) < 1e-4, name
    assert len(mst_fx.reports()) - before == 2


def test_labels_that_start_at_an_odd_address():
    w = torch.randn(512, 64, device="cuda", requires_grad=True)
    x = torch.randn(1, 256, 64, device="cuda", requires_grad=True)
    ids = torch.randint(0, 512, (1, 256), device="cuda")

    def shifted(x, w, ids):
        labels = F.pad(ids, (0, 1), value=-100)[..., 1:].contiguous()
        return F.cross_entropy(F.linear(x, w).view(-1, 512), labels.view(-1))

    loss = looped(shifted, chunk_tokens=64, inner="inductor")(x, w, ids)
    torch.testing.assert_close(loss, shifted(x, w, ids))
    loss.backward()
    torch.cuda.synchronize()


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_cuda_graphs_capture_the_loop(mode):
    from functools import partial

    from torch.profiler import ProfilerActivity, profile

    model = MlpLM().cuda()
    batch = on_gpu(tokens(2, 64))
    backend = partial(mst_fx.backend, options={"min_bytes": 0, "chunk_tokens": 32, "strict": True})
    compiled = torch.compile(model, backend=backend, mode=mode)
    eager = gradients(model, model, batch)
    for _ in range(4):
        ours = gradients(model, compiled, batch)
    assert len(mst_fx.reports()[-1].regions) == 2
    for name, value in eager.items():
        assert relative_error(ours[name], value) < 1e-4, name
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        compiled(*batch).backward()
    launches = [event.key for event in recorded.key_averages() if "cudaGraphLaunch" in event.key]
    assert launches, "no graph was replayed"


def test_cuda_graphs_of_lengths_that_vary():
    model = MlpLM().cuda()
    options = {"min_bytes": 0, "chunk_tokens": 32, "strict": True, "triton.cudagraphs": True}
    compiled = torch.compile(model, backend=mst_fx.backend, options=options, dynamic=True)
    for length in (64, 50, 37):
        batch = on_gpu(tokens(2, length))
        eager, ours = gradients(model, model, batch), gradients(model, compiled, batch)
        for name, value in eager.items():
            assert relative_error(ours[name], value) < 1e-4, name


def test_nothing_waits_for_the_device():
    model = MlpLM().cuda()
    compiled, batch = looped(model, chunk_tokens=32, inner="inductor"), on_gpu(tokens(2, 100))
    for _ in range(2):
        compiled(*batch).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        compiled(*batch).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("accumulate", ["native", "float32"])
@pytest.mark.parametrize("program", [*predictions.MLPS, *predictions.HEADS], ids=lambda program: program.__name__)
def test_predicted_peak(program, accumulate):
    sizes = predictions.Sizes(t=8192, d=512, ff=2048, v=16384)
    for chunk in (512, 2048):
        torch._dynamo.reset()
        options = {"chunk_tokens": chunk, "accumulate": accumulate}
        measured, predicted = predictions.peaks(program, sizes, torch.bfloat16, "cuda", **options)
        print(program.__name__, accumulate, chunk, measured / 2**20, predicted / 2**20, measured / predicted)
        assert abs(measured / predicted - 1) <= 0.1


@pytest.mark.parametrize("accumulate", ["native", "float32"])
def test_predicted_peak_of_a_wide_head(accumulate):
    sizes, options = predictions.Sizes(t=4096, d=2048, ff=0, v=32768), {"chunk_tokens": 256, "accumulate": accumulate}
    measured, predicted = predictions.peaks(predictions.cross_entropy, sizes, torch.bfloat16, "cuda", **options)
    assert abs(measured / predicted - 1) <= 0.1


@pytest.mark.parametrize("accumulate", ["native", "float32"])
def test_predicted_peak_of_experts(accumulate):
    sizes, options = predictions.Sizes(t=8192, d=512, ff=512, v=64), {"chunk_tokens": 1024, "accumulate": accumulate}
    measured, predicted = predictions.peaks(predictions.experts, sizes, torch.bfloat16, "cuda", **options)
    assert abs(measured / predicted - 1) <= 0.1


def test_autocast():
    model = MlpLM().cuda()
    batch = on_gpu(tokens(2, 64))
    truth = gradients(model.double(), model, batch)
    model.float()

    def step(m):
        with torch.autocast("cuda", torch.bfloat16):
            return m(*batch)

    eager = gradients(model, lambda *_: step(model), batch)
    compiled = looped(model, inner="inductor")
    ours = gradients(model, lambda *_: step(compiled), batch)
    for name, value in truth.items():
        assert relative_error(ours[name], value) <= relative_error(eager[name], value) + 4e-3, name


T, D, FF, V, CHUNK = 8192, 512, 2048, 32768, 1024


def half(*shape):
    return (torch.randn(*shape, device="cuda") * 0.05).bfloat16().requires_grad_()


@pytest.mark.parametrize("accumulate", ["native", "float32"])
def test_head_peak(accumulate):
    x, w, labels = half(T, D), half(V, D), torch.randint(0, V, (T,), device="cuda")
    compiled = looped(
        lambda x, w, y: F.cross_entropy(F.linear(x, w).float(), y),
        chunk_tokens=CHUNK,
        inner="inductor",
        accumulate=accumulate,
    )

    def step():
        x.grad = w.grad = None
        compiled(x, w, labels).backward()

    accumulator = 4 * V * D if accumulate == "float32" else 0
    bound = 2 * (T * D + V * D) + accumulator + 2 * CHUNK * V  # gradients, logits of a chunk, which theirs overwrites
    assert peak_bytes(step, "cuda") <= bound * 1.02


@pytest.mark.parametrize("classes", [128256, 151936, 256000])
def test_wide_rows_are_reduced_in_registers(classes):
    rows = 128
    x, w, labels = half(2 * rows, 16), half(classes, 16), torch.randint(0, classes, (2 * rows,), device="cuda")
    compiled = looped(lambda x, w, y: F.cross_entropy(F.linear(x, w).float(), y), chunk_tokens=rows, inner="inductor")
    _, codes = run_and_get_code(lambda: compiled(x, w, labels).backward())
    kernels = re.findall(r"async_compile\.triton\(.*?\'\'\'\)?, device_str", "".join(codes), re.DOTALL)
    passes = [int(re.search(r"xnumel = (\d+)", kernel)[1]) for kernel in kernels if "for r0_offset" in kernel]
    assert kernels
    assert max(passes, default=0) <= rows  # over the parts of a row at most, not over the classes


def test_mlp_peak():
    weights = [half(T, D), half(FF, D), half(FF, D), half(D, FF)]
    compiled = looped(
        lambda x, g, u, d: F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), d), chunk_tokens=CHUNK, inner="inductor"
    )

    def step():
        for x in weights:
            x.grad = None
        compiled(*weights).sum().backward()

    bound = 2 * (3 * T * D) + 6 * (3 * FF * D) + 7 * 2 * CHUNK * FF
    assert peak_bytes(step, "cuda") <= bound
    assert bound < 2 * 3 * T * FF  # less than the three intermediates that it avoids


PROGRAMS = {
    **{name: losses.CROSS_ENTROPY[name] for name in ("label_smoothing_mean", "z_loss", "k_dim_mean")},
    **{name: losses.SHIFTED[name] for name in ("sliced_contiguous_logits",)},
    **{name: losses.PER_TOKEN[name] for name in ("log_softmax_and_gather", "loss_and_top_k")},
    **{name: losses.REINFORCEMENT[name] for name in ("grpo_with_metrics", "dpo")},
    **{name: losses.DISTILLATION[name] for name in ("jensen_shannon",)},
}


@pytest.mark.parametrize("name", list(PROGRAMS))
def test_losses_through_triton(name):
    fn = PROGRAMS[name]
    batch, length = losses.B, 2048
    x = torch.randn(batch, length, losses.D, device="cuda", requires_grad=True)
    w = (torch.randn(losses.V, losses.D, device="cuda") * 0.5).requires_grad_()
    y = torch.randint(0, losses.V, (batch, length), device="cuda")
    logits = batch * length * losses.V * 4

    exact = [tensor.detach().double().requires_grad_() for tensor in (x, w)]

    def step(fn, x=x, w=w):
        x.grad = w.grad = None
        result = fn(x, w, y)
        first = result[0] if isinstance(result, tuple) else result
        first.sum().backward()
        return [first.detach(), x.grad, w.grad]

    compiled = looped(fn, chunk_tokens=128, inner="inductor")
    for ours, eager, truth in zip(step(compiled), step(fn), step(fn, *exact), strict=True):
        assert relative_error(ours.double(), truth) < 1e-4 + relative_error(eager.double(), truth)
    assert peak_bytes(lambda: step(compiled), "cuda") < logits / 2
    assert peak_bytes(lambda: step(fn), "cuda") > logits


def test_dropout_through_triton():
    def loss(x, up, down):
        return (F.linear(F.dropout(F.gelu(F.linear(x, up)), 0.3), down) ** 2).mean()

    x = torch.randn(2, 512, 64, device="cuda", requires_grad=True)
    up, down = (torch.randn(*s, device="cuda", requires_grad=True) for s in ((256, 64), (64, 256)))
    compiled = looped(loss, chunk_tokens=128, inner="inductor")
    torch.manual_seed(1)
    compiled(x, up, down).backward()
    with torch.no_grad():  # the derivative along the gradient, with the same mask
        step = 1e-3 * down.grad / down.grad.norm()
        values = []
        for sign in (1, -1):
            torch.manual_seed(1)
            values.append(float(compiled(x, up, down + sign * step)))
    slope = (values[0] - values[1]) / (2 * float(step.norm()))
    assert slope == pytest.approx(float((down.grad * step).sum() / step.norm()), rel=2e-2)
