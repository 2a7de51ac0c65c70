"""Values without memory, and traces of what runs on them.

Private torch API: all names of this file. Run on torch 2.11, 2.13 and 2.15.
"""

from torch._decomp import decomposition_table as decomposition_table
from torch._dispatch.python import enable_python_dispatcher as enable_python_dispatcher
from torch._guards import detect_fake_mode as detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch._subclasses.fake_tensor import disable_fake_tensor_cache as disable_fake_tensor_cache
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode as ProxyTorchDispatchMode
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing as disable_proxy_modes_tracing
from torch.fx.experimental.proxy_tensor import make_fx as make_fx
from torch.fx.experimental.proxy_tensor import track_tensor_tree as track_tensor_tree
from torch.fx.passes.fake_tensor_prop import FakeTensorProp as FakeTensorProp
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
