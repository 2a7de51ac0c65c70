"""mst_fx: mini-sequence loops as a compiler pass. `torch.compile(model, backend=mst_fx.backend)`."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from mst_fx.core.config import Config as Config
from mst_fx.core.refusal import Reason as Reason
from mst_fx.core.refusal import Refusal as Refusal
from mst_fx.enable import disable as disable
from mst_fx.enable import enable as enable
from mst_fx.enable import enabled as enabled
from mst_fx.explain import explain as explain
from mst_fx.pipeline import backend as backend
from mst_fx.report.report import Report as Report
from mst_fx.report.report import reports as reports
from mst_fx.report.report import summary as summary

if TYPE_CHECKING:
    from mst_fx.recognise.pattern import Pattern as Pattern
    from mst_fx.recognise.pattern import register as register
    from mst_fx.rules import check_rule as check_rule
    from mst_fx.rules import register_rule as register_rule

__all__ = [
    "Config",
    "Pattern",
    "Reason",
    "Refusal",
    "Report",
    "backend",
    "check_rule",
    "disable",
    "enable",
    "enabled",
    "explain",
    "register",
    "register_rule",
    "reports",
    "summary",
]

_LATE = {
    "Pattern": "mst_fx.recognise.pattern",
    "register": "mst_fx.recognise.pattern",
    "check_rule": "mst_fx.rules",
    "register_rule": "mst_fx.rules",
}
"""Where names are that need the pass, which a torch version may be unable to load."""

try:
    __version__ = version("mst-fx")
except PackageNotFoundError:  # the source files, not installed
    __version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Load a name that needs the pass when somebody asks for it.

    Raises:
        AttributeError: the package has no attribute of this name.
    """
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATE[name]), name)
