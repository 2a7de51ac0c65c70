"""Logits that are not returned: an object tells why to who uses it, and nobody else notices it."""

from __future__ import annotations

import copy
import os
import pickle
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import torch.utils._pytree as pytree
from torch import nn

from mst_fx.runtime.not_returned import NotReturned, NotReturnedError, returning

MISSING = NotReturned("why")

USES = {
    "attribute": lambda x: x.shape,
    "method": lambda x: x.detach(),
    "item": lambda x: x[:, :-1],
    "write": lambda x: x.__setitem__(0, 1),
    "sum": lambda x: 1 + x,
    "product with a tensor": lambda x: torch.ones(2) @ x,
    "comparison": lambda x: x == torch.ones(2),
    "unlike": lambda x: x != 2,
    "negative": lambda x: -x,
    "iteration": list,
    "length": len,
    "number": float,
    "function": lambda x: torch.softmax(x, -1),
    "functional": lambda x: F.cross_entropy(x, torch.ones(2)),
    "keyword": lambda x: F.cross_entropy(input=x, target=torch.ones(2)),
    "list": lambda x: torch.cat([torch.ones(2), x]),
    "in another compiled function": torch.compile(lambda x: x.float(), backend="eager"),
}


@pytest.mark.parametrize("name", USES)
def test_a_use_tells_why(name):
    with pytest.raises(Exception, match="why") as raised:
        USES[name](MISSING)
    assert isinstance(raised.value, NotReturnedError) or "compiled" in name


def test_code_that_looks_for_tensors_leaves_it_alone():
    assert not any(
        hasattr(MISSING, name) for name in ("dtype", "to", "detach", "requires_grad", "__dataclass_fields__")
    )
    assert not MISSING
    assert MISSING == None  # noqa: E711
    assert (MISSING != None) is False  # noqa: E711
    assert repr(MISSING) == "<why>"
    assert pytree.tree_map_only(torch.Tensor, torch.neg, [MISSING]) == [MISSING]
    assert [repr(twin) for twin in (copy.deepcopy(MISSING), pickle.loads(pickle.dumps(MISSING)))] == ["<why>"] * 2
    hooked = nn.Identity()
    hooked.register_full_backward_hook(lambda *_: None)
    assert hooked(MISSING) is MISSING


def test_it_stands_where_it_should():
    assert returning(lambda x: [x, None, None], {2: MISSING})(1) == (1, None, MISSING)


@dataclass
class Output:
    loss: torch.Tensor
    logits: torch.Tensor
    others: dict


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.small, self.lm_head = nn.Linear(8, 64), nn.Linear(8, 128)

    def forward(self, x):
        logits = self.lm_head(x)
        others = self.small(x).float()
        return Output(logits.logsumexp(-1).sum() + others.logsumexp(-1).sum(), logits, {"small": others, "none": None})


@pytest.mark.skipif("MST_FX_ENABLE" in os.environ, reason="under enable() they are None")
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_it_names_the_module_the_option_and_the_line(inner):
    torch._dynamo.reset()
    options = {"min_bytes": 0, "inner": inner, "returned_logits": "drop"}
    model, x = TwoHeads(), torch.randn(2, 16, 8, requires_grad=True)
    model.compile(backend="mst_fx", options=options)
    output = model(x)
    output.loss.backward()
    assert x.grad is not None and output.others["none"] is None  # noqa: PT018
    with pytest.raises(NotReturnedError, match=r"of lm_head \(16.0 KiB.*self.lm_head\(x\)\).*='drop' is set.*'detach'"):
        output.logits.argmax(-1)
    with pytest.raises(NotReturnedError, match=rf"of small .*{Path(__file__).name}:\d+: others = self.small\(x\)"):
        output.others["small"].argmax(-1)
    with torch.no_grad():
        assert model(x).logits.shape == (2, 16, 128)
