"""Rung 1: torch.fx.symbolic_trace."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Tracer

from fxsparse.capture.refusal import Refusal, first_line, refuse_different_outputs, refuse_hooks
from fxsparse.graph_module import ConvertedModule
from fxsparse.inputs import ExampleInputs


def capture_symbolic(
    model: nn.Module, inputs: ExampleInputs | None
) -> tuple[nn.Module, list[tuple[str, GraphModule]], list[str]]:
    """Trace the model symbolically; refuse what tracing would drop."""
    refuse_hooks(model)
    graph = _trace(model)
    notes = []
    other = _training_difference(model, graph)
    if other:
        if any(module.training for module in model.modules() if not _Tracer().is_leaf_module(module, "")):
            raise Refusal(
                f"the model is in training mode and its behaviour there is baked at trace time ({other}); "
                "call model.eval() first to convert it for inference"
            )
        notes.append(f"The graph holds the behaviour in evaluation mode only ({other}).")
    gm = ConvertedModule(model, graph, type(model).__name__)
    refuse_different_outputs(model, gm, inputs)
    return gm, [("", gm)], notes


class _Tracer(Tracer):
    """A tracer that records what happens to buffers; by default they are constants, written to while tracing."""

    proxy_buffer_attributes = True


def _trace(model: nn.Module) -> Graph:
    try:
        return _Tracer().trace(model)
    except Exception as error:  # tracing runs the user's code, which may raise anything
        raise Refusal(f"symbolic tracing failed{_place(error)}: {type(error).__name__}: {first_line(error)}") from error


def _place(error: BaseException) -> str:
    """Say which line of the user's code raised, if one did."""
    torch_folder = str(Path(torch.__file__).parent)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((torch_folder, "<"))]
    frames = [f for f in frames if f.filename != __file__]
    return f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""


def _training_difference(model: nn.Module, graph: Graph) -> str:
    """Say where the graph depends on the training flags of modules that tracing looks into; "" if nowhere."""
    flags = {module: module.training for module in model.modules()}
    try:
        for module in flags:
            module.training = not module.training
        other = _trace(model)
    except Refusal:
        return "forward branches on self.training"
    finally:
        for module, flag in flags.items():
            module.training = flag
    for a, b in zip(graph.nodes, other.nodes, strict=False):
        if a.format_node() != b.format_node():
            return f"first at '{a.name}'"
    return "" if len(graph.nodes) == len(other.nodes) else "forward branches on self.training"
