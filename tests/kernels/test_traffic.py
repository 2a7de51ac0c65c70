"""What a mini-sequence costs, without a GPU: kernels, products and bytes of the bodies that Inductor would generate.

The code for a CPU is generated and not compiled. One that needs more than stands here has become slower; one that needs
less may take its place. Torch 2.11 fuses more of some heads than newer versions do.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import predictions
import pytest
import torch
from graphs import captured, rewritten
from torch._inductor import metrics
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import mst_fx.runtime.inductor_lowering  # noqa: F401 - registers lowerings
from mst_fx.kernels.write_order import let_overwrite

CHUNK = 16
SIZES = predictions.Sizes(t=64, d=32, ff=128, v=512)
WIDE = replace(SIZES, v=8192)  # its log-softmax is reduced in parts


class Traffic(NamedTuple):
    """Of one body: generated kernels, calls of a library (matrix products), bytes read and written by all of them."""

    kernels: int
    products: int
    bytes: int


GOLDEN = {
    (predictions.swiglu, SIZES): {"forward": Traffic(1, 2, 38912), "backward": Traffic(1, 3, 64512)},
    (predictions.gelu, SIZES): {"forward": Traffic(1, 1, 21760), "backward": Traffic(2, 2, 47616)},
    (predictions.normed, SIZES): {"forward": Traffic(8, 1, 21504), "backward": Traffic(10, 2, 43008)},
    (predictions.cross_entropy, SIZES): {"backward": Traffic(6, 1, 116436)},
    (predictions.cross_entropy, WIDE): {"backward": Traffic(13, 1, 1836756)},
    (predictions.log_probabilities, SIZES): {"forward": Traffic(6, 1, 66752), "backward": Traffic(8, 1, 83136)},
}


def traffic(body: GraphModule) -> Traffic:
    values = [node.meta["val"] for node in body.graph.nodes if node.op == "placeholder"]
    with FakeTensorMode() as mode:
        inputs = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in values]
        decomposed = make_fx(body, decomposition_table=select_decomp_table())(*inputs)
    lowering = GraphLowering(let_overwrite(decomposed), example_inputs=inputs)
    metrics.reset()
    with V.set_graph_handler(lowering), V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
        lowering.run(*inputs)
        lowering.codegen()
        moved = lowering.count_bytes()[0]
    products = sum(node.is_extern() for node in lowering.scheduler.nodes)
    return Traffic(metrics.generated_kernel_count, products, moved)


@pytest.mark.parametrize(("program", "sizes"), GOLDEN, ids=lambda x: getattr(x, "__name__", ""))
def test_traffic_of_a_chunk(program, sizes):
    inputs = predictions.inputs_of(program, sizes, torch.bfloat16, "cpu")
    looped, _ = rewritten(captured(program, *inputs), chunk_tokens=CHUNK)
    bodies = {name.split("_")[2]: body for name, body in looped.named_children()}
    found = {name: traffic(body) for name, body in bodies.items()}
    golden = GOLDEN[program, sizes]
    assert found.keys() == golden.keys()
    for name, most in golden.items():
        assert all(now <= then for now, then in zip(found[name], most, strict=True)), (name, found[name], most)
