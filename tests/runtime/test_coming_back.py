"""Whether the products behind a loop over heads take as long as a layer's input needs to come from the host."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from mst_fx.ops.projected import sum_of_products
from mst_fx.runtime.coming_back import hides

TOKENS = 64


def behind(x_TH, grads_TN, weights_NH):
    """The gradients of the projections' weights, and that of the tokens."""
    return [*(x_TH.t() @ grad for grad in grads_TN), sum_of_products(grads_TN, weights_NH)]


@pytest.mark.parametrize(
    ("hidden", "queries", "keys", "enough"),
    [(4096, 4096, 1024, True), (8192, 8192, 1024, True), (1024, 2048, 1024, False)],  # Llama 8B, 70B, Qwen3-0.6B
)
def test_layers_wide_enough_hide_the_copy(hidden, queries, keys, enough):
    with FakeTensorMode():
        x_TH = torch.empty(TOKENS, hidden, dtype=torch.bfloat16)
        widths = (queries, keys, keys)
        grads_TN = [torch.empty(TOKENS, width, dtype=torch.bfloat16) for width in widths]
        weights_NH = [torch.empty(width, hidden, dtype=torch.bfloat16) for width in widths]
        nodes = list(make_fx(behind)(x_TH, grads_TN, weights_NH).graph.nodes)
    assert hides(nodes[:1], nodes) == enough
