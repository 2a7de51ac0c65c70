"""The private names of torch that graphs are traced with, for all packages.

Values without memory, sizes that vary, and what composite ops ask of them; which ops run; the trace itself; torch's own
decompositions.

Private torch API: all names of this file. Run on torch 2.11, 2.13 and 2.15.
"""

from torch._decomp import decomposition_table as decomposition_table
from torch._dispatch.python import enable_python_dispatcher as enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx as make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv as ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
