"""What only a GPU shows: Triton bodies, float32 accumulation by the matrix units, alignment, CUDA graphs, peaks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from memory_probe import peak_bytes
from models import Gelu, MlpLM, NanoGPT, SwiGLU, tokens
from numerics import TOLERANCE, gradients, looped, relative_error

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


def test_cuda_graphs_capture_the_loop():
    model = MlpLM().cuda()
    batch = on_gpu(tokens(2, 64))
    options = {"min_bytes": 0, "chunk_tokens": 32, "strict": True, "triton.cudagraphs": True}
    compiled = torch.compile(model, backend=mst_fx.backend, options=options)
    eager = gradients(model, model, batch)
    for _ in range(4):
        ours = gradients(model, compiled, batch)
    for name, value in eager.items():
        assert relative_error(ours[name], value) < 1e-4, name


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
    bound = 2 * (T * D + V * D) + accumulator + 2 * 2 * CHUNK * V  # gradients, logits of a chunk and their gradient
    assert peak_bytes(step, "cuda") <= bound * 1.02


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
