"""Inductor's passes on captured graphs, among them ours under `enable`, without the code that it would generate."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any
from unittest import mock

import pytest
from torch._inductor import compile_fx
from torch._inductor.compile_fx import _recursive_pre_grad_passes
from torch.fx import GraphModule

import mst_fx
from mst_fx import pipeline
from mst_fx.core.torch_private import inductor
from mst_fx.inner_compiler import inner_compiler

ENABLED = bool(os.environ.get("MST_FX_ENABLE"))
"""Whether the whole suite takes this way."""
of_the_backend_alone = pytest.mark.skipif(ENABLED, reason="an error of the compiler behind `enable` ends the compile")


@contextmanager
def through_inductor() -> Iterator[None]:
    """Let the backend leave its graph to Inductor's passes under `enable`, and compile what these give.

    Only code generation is left out, which costs seconds: the inner compiler stays the one of the options.
    """
    with mock.patch.object(pipeline, "compiled_and_told", _compiled_and_told):
        yield


@contextmanager
def without_code() -> Iterator[None]:
    """Let plain `torch.compile` run what Inductor's passes make of a graph as it is, which saves seconds a graph."""

    def passes(gm: GraphModule, inputs: Sequence[Any], **_: Any) -> GraphModule:
        return _recursive_pre_grad_passes(gm, inputs)

    with mock.patch.object(compile_fx, "compile_fx", passes):
        yield


def _compiled_and_told(
    gm: GraphModule, inputs: Sequence[Any], mode: str | None, options: dict[str, Any] | None
) -> tuple[Callable[..., Any], mst_fx.Report]:
    config, foreign = mst_fx.Config.split(options, inductor.option_names())
    compile_graph = inner_compiler(config, mode, foreign)
    own = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in ("inner", "mode")}
    with mst_fx.enabled(**own):
        looped = _recursive_pre_grad_passes(gm, inputs)
    return compile_graph(looped, inputs), mst_fx.reports()[-1]
