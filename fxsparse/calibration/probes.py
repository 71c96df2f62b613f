"""Probes: calls put into a graph for one run, to see real values where they arise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxsparse import sites
from fxsparse.report import graphs_of

Visit = Callable[[GraphModule, Node, tuple[Any, ...], dict[str, Any]], None]
See = Callable[[GraphModule, Node, Any], None]
Convolve = Callable[[GraphModule, Node, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Seen:
    """A value as it was when the model ran.

    Attributes:
        shape: of the tensor.
        dtype: of the tensor.
        device: of the tensor.
        layout: "contiguous" or "channels_last"; "" where strides of both kinds, or of neither, fit.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    layout: str

    @staticmethod
    def of(tensor: Tensor) -> Seen:
        """Describe a tensor."""
        images = tensor.dim() == 4
        flat = images and tensor.is_contiguous()
        last = images and tensor.is_contiguous(memory_format=torch.channels_last)
        layout = {(True, False): "contiguous", (False, True): "channels_last"}.get((flat, last), "")
        return Seen(tuple(tensor.shape), tensor.dtype, tensor.device, layout)


@contextmanager
def probed(
    model: nn.Module, convolve: Convolve, before: Visit, after: See, wanted: Callable[[GraphModule, Node], bool]
) -> Iterator[None]:
    """Put calls into a model's graphs, while inside.

    Args:
        model: a converted model that nobody else uses meanwhile, every site vanilla; its graphs are put back on exit.
        convolve: is called in the place of each conv site, with its input; returns its output.
        before: gets the arguments of the wanted nodes right before they run.
        after: gets the value of each node.
        wanted: chooses nodes for `before`; not asked about conv sites.
    """
    graphs = graphs_of(model)
    probes: list[tuple[GraphModule, Node]] = []
    replaced: list[tuple[Node, Any, Any, Any]] = []
    for gm in graphs:
        nodes = [node for node in gm.graph.nodes if node.op != "output"]
        first = next(node for node in gm.graph.nodes if node.op != "placeholder")
        for node in nodes:
            if sites.site_of(node) is not None:
                source = sites.input_node(node)
                replaced.append((node, node.target, node.args, node.kwargs))
                node.target, node.args, node.kwargs = _convolver(convolve, gm, node), (source,), {}
            elif wanted(gm, node):
                with gm.graph.inserting_before(node):
                    probes.append((gm, gm.graph.call_function(_caller(before, gm, node), node.args, node.kwargs)))
            place = gm.graph.inserting_before(first) if node.op == "placeholder" else gm.graph.inserting_after(node)
            with place:
                probes.append((gm, gm.graph.call_function(_watcher(after, gm, node), (node,))))
        gm.recompile()
    try:
        yield
    finally:
        for gm, node in probes:
            gm.graph.erase_node(node)
        for node, target, args, kwargs in replaced:
            node.target, node.args, node.kwargs = target, args, kwargs
        for gm in graphs:
            gm.recompile()


def _convolver(convolve: Convolve, gm: GraphModule, node: Node) -> Callable[[Tensor], Tensor]:
    def probe(source: Tensor) -> Tensor:
        return convolve(gm, node, source)

    return probe


def _caller(before: Visit, gm: GraphModule, node: Node) -> Callable[..., None]:
    def probe(*args: Any, **kwargs: Any) -> None:
        before(gm, node, args, kwargs)

    return probe


def _watcher(after: See, gm: GraphModule, node: Node) -> Callable[[Any], None]:
    def probe(value: Any) -> None:
        after(gm, node, value)

    return probe
