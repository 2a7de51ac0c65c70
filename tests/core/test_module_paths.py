"""Paths of the user's modules, from torch's texts for them, and what the option `modules` may say for one."""

from __future__ import annotations

import pytest
from torch import nn
from torch.fx import Graph, GraphModule

from mst_fx.core.module_paths import (
    Landmarks,
    common_path,
    knowing,
    landmarks_of,
    matches,
    module_names,
    module_path,
)


def known(**meta):
    node = Graph().placeholder("x")
    node.meta.update(meta)
    return node


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("L['self']", ""),
        ("L['self'].model.layers[3].mlp", "model.layers.3.mlp"),
        ("L['fn']._modules['layers']._modules['0']", "layers.0"),
        ("L['self']._modules['layers']['first'].head", "layers.first.head"),
        ("G['model'].head", "head"),
        ("L['self'].__dict__['_modules']['layers']._modules['0']", "layers.0"),
        ("L['args'][0].mlp", "0.mlp"),
        ("L['self']._orig_mod.layers[0]._checkpoint_wrapped_module.mlp", "layers.0.mlp"),
    ],
)
def test_the_path_of_the_innermost_module(path, expected):
    assert module_path(known(nn_module_stack={"a": ("L['self']", nn.Module), "b": (path, nn.Module)})) == expected


@pytest.mark.parametrize("meta", [{}, {"nn_module_stack": {}}, {"nn_module_stack": None}])
def test_outside_of_modules_there_is_no_path(meta):
    assert module_path(known(**meta)) == ""


@pytest.mark.parametrize(
    ("stack", "roots", "expected"),
    [
        (["L['self'].model", "L['self'].model.mlp"], ["L['self']"], "model.mlp"),  # a method of a module
        (["L['self'].model", "L['self'].model.mlp"], ["L['self'].model"], "mlp"),  # of what is no module
        (["L['self'].model", "L['self'].model.mlp"], [], "model.mlp"),
        (["L['m']", "L['m'].blocks[1].mlp"], ["L['m'].blocks[1]"], "blocks.1.mlp"),
        (["L['fn'].args[0].mlp"], ["L['fn'].args[0]"], "mlp"),
        (["L['self'].blocks[1].mlp"], ["L['self'].blocks[1]", "L['self']"], "blocks.1.mlp"),  # a plain list in a module
        (["L['c']._orig_mod", "L['c']._orig_mod.mlp"], ["L['c']._orig_mod"], "mlp"),
        (["L['self'].model2.mlp"], ["L['self'].model", "L['self'].model2"], "mlp"),
    ],
)
def test_paths_begin_below_the_root(stack, roots, expected):
    node = known(nn_module_stack={str(number): (source, nn.Module) for number, source in enumerate(stack)})
    with knowing(Landmarks(tuple(roots))):
        assert module_path(node) == expected


def graph_of(*stacks):
    graph = Graph()
    for number, stack in enumerate(stacks):
        sources = [f"L['self']{part}" for part in stack]
        graph.placeholder(f"x{number}").meta["nn_module_stack"] = {s: (s, nn.Module) for s in sources}
    graph.output(())
    return GraphModule(nn.Module(), graph)


@pytest.mark.parametrize(
    ("stacks", "chain"),
    [
        ([["", ".base.model", ".base.model.up"], ["", ".base.model"], [""]], ("base", "model")),
        ([["", ".model", ".model.up"], ["", ".head"]], ()),
        ([["", ".model", ".model.layers.0", ".model.layers.0.mlp"]], ("model",)),  # no item of a list
        ([["", ".layers.0", ".layers.0.mlp"]], ()),
        ([[]], ()),
    ],
)
def test_the_chain_of_wrappers(stacks, chain):
    assert landmarks_of(graph_of(*stacks)).chain == chain


def test_wrappers_may_be_left_out():
    node = known(nn_module_stack={"a": ("L['self']", nn.Module), "b": ("L['self'].base.model.up", nn.Module)})
    with knowing(Landmarks(("L['self']",), ("base", "model"))):
        assert module_names(node) == {"base.model.up", "model.up", "up"}
    assert module_names(node) == {"base.model.up"}


@pytest.mark.parametrize(
    ("path", "written", "does"),
    [
        ("model.layers.0.mlp.up", "model.layers.0.mlp", True),
        ("model.layers.0.mlp", "layers.0.mlp", False),
        ("model.layers.0.mlp", "*.mlp", True),
        ("mlp.up", "*.mlp", True),
        ("model.mlps", "*.mlp", False),
        ("model.layers.0.mlp", "module.model.layers.0.mlp", True),
        ("model.layers.0.mlp", "_orig_mod.model.layers.0._checkpoint_wrapped_module.mlp", True),
        ("module.mlp", "module.mlp", True),
        ("layers.0.mlp.up", "model.layers.0.mlp", True),  # behind a graph break, the part is a root
        ("layers.0.mlp", "base.model.*.mlp", True),
        ("0.mlp", "layers.0.mlp", True),
        ("mlp", "layers.0.mlp", False),  # whichever layer
        ("head", "vision.head", False),
    ],
)
def test_what_the_option_may_say(path, written, does):
    assert matches(path, written) is does


def test_a_part_is_meant_only_where_the_whole_is_not_there():
    with knowing(Landmarks(modules=frozenset(["vision.layers.0", "layers.0"]))):
        assert not matches("layers.0", "vision.layers.0")
    assert matches("layers.0", "vision.layers.0")


@pytest.mark.parametrize(
    ("paths", "common"), [(["a.b.up", "a.b.down"], "a.b"), (["up", "down"], ""), (["a.b"], "a.b"), (["a", "ab"], "")]
)
def test_the_module_around_several(paths, common):
    assert common_path(paths) == common
