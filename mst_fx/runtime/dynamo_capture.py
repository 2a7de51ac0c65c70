"""Dynamo's capture of the loop operator: compiled autograd hands Dynamo AOTAutograd's backward graphs, with loops.

The operator and its bodies go into the captured graph as they are.

Where Dynamo's classes have other names, compiled autograd cannot compile backward graphs that hold loops; nothing else
changes.
"""

from __future__ import annotations

import logging
from typing import Any

from torch.fx import GraphModule

from mst_fx.runtime.loop_operator import mini_sequence_loop

log = logging.getLogger("mst_fx")


def let_dynamo_capture_loops() -> None:
    """Register the operator with Dynamo, so that it can put the operator into a graph; further calls do nothing."""
    try:
        from mst_fx.core.torch_private import dynamo_variables

        if mini_sequence_loop.__name__ not in dynamo_variables.variable_classes:
            dynamo_variables.variable_classes[mini_sequence_loop.__name__] = _variable_class()
    except (ImportError, AttributeError) as error:
        log.debug("mst_fx: compiled autograd cannot capture loops: %s", error)


def _variable_class() -> Any:
    from mst_fx.core.torch_private import dynamo_variables as dynamo

    def literal(tx: Any, argument: Any) -> Any:
        """Return a literal of the spec; a number that Dynamo took as varying is fixed to its value."""
        argument = argument.realize()
        if isinstance(argument, dynamo.SymNodeVariable):
            return argument.evaluate_expr(tx.output)
        if argument.is_python_constant():
            return argument.as_python_constant()
        return tuple(literal(tx, item) for item in argument.items)

    def proxy_of(tx: Any, argument: Any) -> Any:
        body = vars(argument).get("value")
        if not isinstance(body, GraphModule):
            return argument.as_proxy()
        modules = tx.output.nn_modules
        if all(module is not body for module in modules.values()):  # loops may share a body
            tx.output.install_subgraph("mini_sequence_body", body)
        proxy = dynamo.make_attr(tx, next(name for name, module in modules.items() if module is body))
        dynamo.set_example_value(proxy.node, body)
        return proxy

    class Variable(dynamo.TorchHigherOrderOperatorVariable):
        _HOP_NAME = "torch.ops.higher_order.mini_sequence_loop"

        def _call_function(self, tx: Any, args: Any, kwargs: Any) -> Any:
            import mst_fx.runtime.inductor_lowering  # noqa: F401 - registers the lowering: Inductor may compile the graph

            full, tail, *operands = (proxy_of(tx, argument.realize()) for argument in (*args[:2], *args[3:]))
            arguments = (full, tail, literal(tx, args[2]), *operands)
            call = tx.output.create_proxy("call_function", self.value, args=arguments, kwargs={})
            return dynamo.wrap_fx_proxy(tx=tx, proxy=call)

    return Variable
