"""What the tests of the backend share."""

from __future__ import annotations

from typing import Any

import torch
from models import error_in_float64, masked_dense, random_masks, small_net
from programs import sparse_calls
from torch import Tensor, nn
from torch.fx import GraphModule

import fxsparse
from fxsparse import dynamo
from fxsparse.report import Report

TOLERANCE = 1e-5
ESTIMATED = fxsparse.Settings(calibrate=False)


class Inner:
    """An inner backend that counts its compilations and keeps the graphs."""

    def __init__(self) -> None:
        self.graphs: list[GraphModule] = []

    def __call__(self, gm: GraphModule, inputs: Any) -> Any:
        self.graphs.append(gm)
        return gm.forward

    @property
    def count(self) -> int:
        return len(self.graphs)

    def sparse(self) -> list[int]:
        """Return the number of sparse convolutions of each graph."""
        return [sparse_calls(gm.graph) for gm in self.graphs]


def pruned_net(density: float = 0.05) -> nn.Module:
    """Return a net whose weights are zero where they are pruned."""
    model = small_net()
    return masked_dense(model, random_masks(model, density))


def compiled(model: Any, inner: Any = "eager", **options: Any) -> Any:
    """Compile a model with the backend, on the cost model's estimates."""
    chosen = {"inner": inner, "settings": ESTIMATED, **options}
    return torch.compile(model, backend="fxsparse", options=chosen)


def sparse_sites(model: Any) -> list[int]:
    """Return the number of sparse sites in each report of a model."""
    return [report.sparse for report in dynamo.reports(model)]


def only_report(model: Any) -> Report:
    (report,) = dynamo.reports(model)
    return report


def assert_right(fast: Any, model: nn.Module, x: Tensor | None = None) -> None:
    """Compare a compiled model with the model in float64, as its weights are now."""
    x = torch.randn(2, 3, 16, 16) if x is None else x
    with torch.no_grad():
        y = fast(x)
    error = error_in_float64(y.detach().clone(), model, x.clone())
    assert error < TOLERANCE, error
