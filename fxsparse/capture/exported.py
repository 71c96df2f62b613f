"""Rung 2: torch.export on the example inputs, non-strict."""

from __future__ import annotations

import contextlib
import io
import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from fxsparse.capture.refusal import Refusal, first_line, refuse_different_outputs, refuse_hooks
from fxsparse.graph_module import ConvertedModule
from fxsparse.inputs import ExampleInputs

log = logging.getLogger(__name__)


def capture_exported(
    model: nn.Module, inputs: ExampleInputs | None
) -> tuple[nn.Module, list[tuple[str, GraphModule]], list[str]]:
    """Export the model, with a dynamic batch where it allows one; refuse what exporting would drop."""
    refuse_hooks(model)
    if inputs is None:
        raise Refusal("torch.export needs example inputs, and none were given")
    for path, module in model.named_modules():
        if module.training:
            raise Refusal(
                f"module '{path}' ({type(module).__name__}) is in training mode, whose behaviour export bakes in; "
                "call model.eval() first to convert it for inference"
            )
    notes: list[str] = []
    try:
        gm = _export(model, _batch_of_two(inputs), dynamic_batch=True)
    except Exception as error:  # export runs the user's code, which may raise anything
        log.info("Export with a dynamic batch failed: %s", error)
        try:
            gm = _export(model, inputs, dynamic_batch=False)
        except Exception as second:
            raise Refusal(f"torch.export failed: {type(second).__name__}: {first_line(second)}") from second
        notes.append("The graph serves the batch size of the example inputs only: a dynamic one did not export.")
    refuse_different_outputs(model, gm, inputs)
    return gm, [("", gm)], notes


def _export(model: nn.Module, inputs: ExampleInputs, *, dynamic_batch: bool) -> GraphModule:
    def spec(value: Any) -> Any:
        return {0: Dim.AUTO} if dynamic_batch and isinstance(value, Tensor) and value.dim() > 1 else None

    shapes = (*pytree.tree_map(spec, inputs.args), *pytree.tree_map(spec, inputs.kwargs).values())
    # A failing export prints its partial graph, thousands of lines; the error says enough.
    with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
        exported = torch.export.export(model, inputs.args, inputs.kwargs or None, dynamic_shapes=shapes, strict=False)
    module = exported.module(check_guards=False)
    assert isinstance(module, GraphModule)
    for node in list(module.graph.nodes):
        # They assert the dtypes of the example run, which autocast and .half() change rightly.
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            module.graph.erase_node(node)
    for node in list(module.graph.nodes):
        # Export reads everything that the model has, which would keep the norms that are folded.
        if node.op == "get_attr" and not node.users:
            module.graph.erase_node(node)
    # Built anew, because export's own module refuses train() and eval().
    gm = ConvertedModule(module, module.graph, type(model).__name__)
    return gm.eval()


def _batch_of_two(inputs: ExampleInputs) -> ExampleInputs:
    """Double a batch of one: torch.export treats a size of 1 as a constant."""

    def double(value: Tensor) -> Tensor:
        return torch.cat([value, value]) if value.dim() > 1 and value.shape[0] == 1 else value

    return ExampleInputs(*pytree.tree_map_only(Tensor, double, (inputs.args, inputs.kwargs)))
