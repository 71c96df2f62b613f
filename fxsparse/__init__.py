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
    from fxsparse.conversion import convert as convert
    from fxsparse.errors import FxsparseError as FxsparseError
    from fxsparse.ops.library import capabilities as capabilities
    from fxsparse.passes.calibrate import calibrate as calibrate
    from fxsparse.regrouping import Regrouping as Regrouping
    from fxsparse.regrouping import Target as Target
    from fxsparse.regrouping import regroup as regroup
    from fxsparse.regrouping import regroup_masks as regroup_masks
    from fxsparse.report import Report as Report
    from fxsparse.settings import Settings as Settings

__version__ = "0.1.0"

_PUBLIC = {
    "FxsparseError": "fxsparse.errors",
    "Regrouping": "fxsparse.regrouping",
    "Report": "fxsparse.report",
    "Settings": "fxsparse.settings",
    "Target": "fxsparse.regrouping",
    "calibrate": "fxsparse.passes.calibrate",
    "capabilities": "fxsparse.ops.library",
    "convert": "fxsparse.conversion",
    "regroup": "fxsparse.regrouping",
    "regroup_masks": "fxsparse.regrouping",
}
__all__ = ["__version__", "ops", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'fxsparse' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
