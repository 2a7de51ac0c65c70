"""Which nodes are decomposed, once for each kind, and which are not: their values or ops are unknown."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from graphs import captured, sketched

from mst_fx.core.refusal import Reason
from mst_fx.recognise import decomposed_nodes as module
from mst_fx.recognise.decomposed_nodes import decomposed_nodes, reshapes_in_place, strange_tensors

T, D = 6, 4


def calls(gm):
    return [node for node in gm.graph.nodes if node.op.startswith("call")]


def test_nodes_that_are_alike_are_decomposed_once():
    gm = sketched(lambda x: F.gelu(F.gelu(x)) + F.gelu(x[0]), torch.randn(T, D))
    one, again, _, shorter, total = calls(gm)
    found = decomposed_nodes(gm, {})
    assert found[one] is found[again]
    assert found[one] is not found[shorter]
    assert [op.target for op in found[total].ops if op.op == "call_function"] == [torch.ops.aten.add.Tensor]
    assert found.keys() == set(calls(gm))


def test_what_is_known_is_not_decomposed_again(monkeypatch):
    known = {}
    first = sketched(lambda x: F.gelu(x).mul_(2), torch.randn(T, D))
    decomposed_nodes(first, known)
    kinds = len(known)
    tried = []
    monkeypatch.setattr(module, "decompose_together", lambda owner, nodes: tried.extend(nodes) or {})
    monkeypatch.setattr(module, "decompose_alone", lambda owner, node, result: tried.append(node))
    second = sketched(lambda x: F.gelu(x).mul_(2), torch.randn(T, D))
    assert None not in decomposed_nodes(second, known).values()
    assert (tried, len(known)) == ([], kinds)


def test_a_node_that_was_tried_in_vain_is_not_tried_again():
    gm, known = sketched(lambda x, y: torch.mm(x, y), torch.randn(T, D), torch.randn(D, T)), {}
    (node,) = calls(gm)
    node.args = (node.args[0], node.args[0])  # shapes that do not fit
    assert decomposed_nodes(gm, known) == {node: None}
    assert list(known.values()) == [None]


def test_a_write_is_read_from_the_operand_that_it_changes():
    def program(x):
        x = x * 1
        x[0] = 2.0
        return x

    gm = captured(program, torch.randn(T, D))
    _, write = calls(gm)
    assert write.meta.get("example_value") is None
    assert decomposed_nodes(gm, {})[write].ops[-1].target == torch.ops.aten.select_scatter.default


def test_what_is_there_for_its_effect_is_not_decomposed():
    def program(x):
        with torch.no_grad():
            return x.exp()

    gm = captured(program, torch.randn(T, D))
    assert [node.target for node in decomposed_nodes(gm, {})] == ["exp"]


def test_values_of_a_transform_mean_nothing_outside_of_it():
    gm, inside = sketched(lambda x: x.exp().sin(), torch.randn(T, D)), []
    torch.vmap(lambda x: inside.append(x) or x)(torch.randn(T, D))
    exp, sin = calls(gm)
    gm.graph.find_nodes(op="placeholder")[0].meta["example_value"] = inside[0]
    assert decomposed_nodes(gm, {}).keys() == {sin}
    exp.meta["example_value"] = inside[0]
    assert decomposed_nodes(gm, {}) == {}


@pytest.mark.parametrize(
    ("change", "reshapes"),
    [("transpose_", True), ("t_", True), ("swapaxes_", True), ("transpose", False), ("add_", False), ("exp_", False)],
)
def test_changes_of_shape_in_place(change, reshapes):
    arguments = {"add_": (1,)}.get(change, () if change in ("t_", "exp_") else (0, 1))
    gm = sketched(lambda x: getattr(x * 1, change)(*arguments), torch.randn(T, D))
    assert [reshapes_in_place(node) for node in calls(gm)] == [False, reshapes]
    assert (calls(gm)[1] in decomposed_nodes(gm, {})) != reshapes


def test_ops_on_tensors_of_tensors_are_unknown():
    def program(rows, lengths):
        tokens = torch.nested.nested_tensor_from_jagged(rows, lengths)
        return (tokens * 2).values(), rows * 2

    gm = captured(program, torch.randn(8, D), torch.tensor([0, 3, 8]))
    plain = [node for node in calls(gm) if strange_tensors(node) is None]
    strange = [strange_tensors(node) for node in calls(gm) if node not in plain]
    assert {refusal.reason for refusal in strange} == {Reason.SUBCLASS}
    assert any("works on values of NestedTensor" in refusal.text for refusal in strange)
    found = decomposed_nodes(gm, {})
    assert [node for node in calls(gm) if node in found] == [node for node in plain if node in found]
    assert any("mul" in node.name for node in plain)
