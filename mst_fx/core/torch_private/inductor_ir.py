"""Inductor's graph, its lowering and its wrapper code.

Private torch API: all names of this file. Run on torch 2.11, 2.13 and 2.15.
"""

from torch._inductor import config as config
from torch._inductor import ir as ir
from torch._inductor.ir import convert_shape_to_inductor as convert_shape_to_inductor  # type: ignore[attr-defined]
from torch._inductor.lowering import constrain_to_fake_tensor as constrain_to_fake_tensor
from torch._inductor.lowering import lowerings as lowerings
from torch._inductor.lowering import register_lowering as register_lowering
from torch._inductor.virtualized import V as V
