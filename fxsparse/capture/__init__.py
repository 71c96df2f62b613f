"""The capture ladder: from any module to graphs whose convolutions can be rewritten.

1. `symbolic`: torch.fx.symbolic_trace keeps the module structure and dynamic shapes.
2. `export`: torch.export (non-strict) sees through Python control flow on shapes and values known at export.
3. `modules`: each convolution alone, swapped inside a copy of the model, so that data-dependent control flow, hooks
   and several entry points still work.

A rung that would silently drop something refuses, by name, and the next one takes over.
"""

from __future__ import annotations

import dataclasses
import logging

from torch import nn
from torch.fx import GraphModule

from fxsparse.capture.exported import capture_exported
from fxsparse.capture.modules import capture_modules
from fxsparse.capture.refusal import Refusal
from fxsparse.capture.symbolic import capture_symbolic
from fxsparse.errors import FxsparseError
from fxsparse.inputs import ExampleInputs

log = logging.getLogger(__name__)

RUNGS = {"symbolic": capture_symbolic, "export": capture_exported, "modules": capture_modules}


@dataclasses.dataclass
class Captured:
    """A captured model.

    Attributes:
        model: a GraphModule, or (rung `modules`) a module with a GraphModule in the place of every convolution.
        graphs: the graphs to work on, each with the name prefix of what is inside it ("" or "layer1.conv.").
        rung: which rung captured it.
        refused: why each earlier rung did not, by rung.
        notes: what the user should know about this capture.
    """

    model: nn.Module
    graphs: list[tuple[str, GraphModule]]
    rung: str
    refused: dict[str, str]
    notes: list[str]


def capture(model: nn.Module, inputs: ExampleInputs | None, rung: str = "auto") -> Captured:
    """Capture a model by the first rung of the ladder that can do it without dropping anything.

    Args:
        model: a private copy of the user's model; the rung `modules` changes it in place.
        inputs: example inputs, or None; the rung `export` needs them, the others are checked with them.
        rung: "auto", or the one rung to use.

    Raises:
        FxsparseError: the rung asked for refuses.
    """
    refused: dict[str, str] = {}
    for name, attempt in RUNGS.items():
        if rung not in ("auto", name):
            continue
        try:
            root, graphs, notes = attempt(model, inputs)
        except Refusal as refusal:
            refused[name] = str(refusal)
            log.info("Capture rung '%s' refused: %s", name, refusal)
            continue
        log.info("Captured by rung '%s'", name)
        return Captured(root, graphs, name, refused, notes)
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    raise FxsparseError(f"The model cannot be captured. {reasons}")
