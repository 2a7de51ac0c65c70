"""mst_fx: mini-sequence loops as a compiler pass. `torch.compile(model, backend=mst_fx.backend)`."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from mst_fx.core.config import Config as Config
from mst_fx.core.refusal import Reason as Reason
from mst_fx.core.refusal import Refusal as Refusal
from mst_fx.explain import explain as explain
from mst_fx.pipeline import backend as backend
from mst_fx.report.report import Report as Report
from mst_fx.report.report import reports as reports

if TYPE_CHECKING:
    from mst_fx.recognise.pattern import Pattern as Pattern
    from mst_fx.recognise.pattern import register as register

__all__ = ["Config", "Pattern", "Reason", "Refusal", "Report", "backend", "explain", "register", "reports"]

try:
    __version__ = version("mst-fx")
except PackageNotFoundError:  # the source files, not installed
    __version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Load `Pattern` and `register` late: they need the pass, which a torch version may be unable to load.

    Raises:
        AttributeError: the package has no attribute of this name.
    """
    if name not in ("Pattern", "register"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mst_fx.recognise import pattern

    return getattr(pattern, name)
