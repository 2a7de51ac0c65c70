"""mst_fx: mini-sequence loops as a compiler pass. `torch.compile(model, backend=mst_fx.backend)`."""

from mst_fx.config import Config as Config
from mst_fx.explain import explain as explain
from mst_fx.pattern import Pattern as Pattern
from mst_fx.pattern import register as register
from mst_fx.pipeline import backend as backend
from mst_fx.refusal import Reason as Reason
from mst_fx.refusal import Refusal as Refusal
from mst_fx.report import Report as Report
from mst_fx.report import reports as reports

__all__ = ["Config", "Pattern", "Reason", "Refusal", "Report", "backend", "explain", "register", "reports"]
