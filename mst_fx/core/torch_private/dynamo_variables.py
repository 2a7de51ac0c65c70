"""How Dynamo captures a call of an operator over graphs.

Private torch API: all names of this file. Run on torch 2.11, 2.13 and 2.15.
"""

from torch._dynamo.utils import set_example_value as set_example_value
from torch._dynamo.variables.builder import wrap_fx_proxy as wrap_fx_proxy
from torch._dynamo.variables.higher_order_ops import (
    TorchHigherOrderOperatorVariable as TorchHigherOrderOperatorVariable,
)
from torch._dynamo.variables.higher_order_ops import _hop_name_to_variable_class
from torch._dynamo.variables.higher_order_ops import make_attr as make_attr
from torch._dynamo.variables.tensor import SymNodeVariable as SymNodeVariable

variable_classes = _hop_name_to_variable_class
"""The class that captures the calls of each operator, by the operator's name."""
