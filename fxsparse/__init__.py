"""fxsparse makes pruned CNNs faster in PyTorch.

    fast = fxsparse.convert(model, masks, example_inputs=(x,))
    print(fast.report)

Importing registers the operators (so that saved and exported models find them) and nothing else: the compiler's own
modules are imported at first use, and CUDA is never started.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fxsparse import ops as ops

if TYPE_CHECKING:
    from fxsparse.calibration import calibrate as calibrate
    from fxsparse.conversion import convert as convert
    from fxsparse.conversion import explain as explain
    from fxsparse.errors import FxsparseError as FxsparseError
    from fxsparse.freezing import freeze as freeze
    from fxsparse.freezing import to_dense as to_dense
    from fxsparse.modes import Mode as Mode
    from fxsparse.modes import set_mode as set_mode
    from fxsparse.ops.library import capabilities as capabilities
    from fxsparse.plan import Plan as Plan
    from fxsparse.pruning import Pruned as Pruned
    from fxsparse.pruning import PruneSettings as PruneSettings
    from fxsparse.pruning import prune as prune
    from fxsparse.regrouping import Regrouping as Regrouping
    from fxsparse.regrouping import Target as Target
    from fxsparse.regrouping import regroup as regroup
    from fxsparse.regrouping import regroup_masks as regroup_masks
    from fxsparse.report import Report as Report
    from fxsparse.saving import load as load
    from fxsparse.saving import load_weights as load_weights
    from fxsparse.saving import save as save
    from fxsparse.saving import save_weights as save_weights
    from fxsparse.settings import Settings as Settings

__version__ = "0.1.0"

_PUBLIC = {
    "FxsparseError": "fxsparse.errors",
    "Mode": "fxsparse.modes",
    "Plan": "fxsparse.plan",
    "PruneSettings": "fxsparse.pruning",
    "Pruned": "fxsparse.pruning",
    "Regrouping": "fxsparse.regrouping",
    "Report": "fxsparse.report",
    "Settings": "fxsparse.settings",
    "Target": "fxsparse.regrouping",
    "calibrate": "fxsparse.calibration",
    "capabilities": "fxsparse.ops.library",
    "convert": "fxsparse.conversion",
    "explain": "fxsparse.conversion",
    "freeze": "fxsparse.freezing",
    "load": "fxsparse.saving",
    "load_weights": "fxsparse.saving",
    "prune": "fxsparse.pruning",
    "regroup": "fxsparse.regrouping",
    "regroup_masks": "fxsparse.regrouping",
    "save": "fxsparse.saving",
    "save_weights": "fxsparse.saving",
    "set_mode": "fxsparse.modes",
    "to_dense": "fxsparse.freezing",
}
__all__ = ["__version__", "ops", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'fxsparse' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
