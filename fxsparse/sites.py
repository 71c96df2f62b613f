"""Conv sites: one convolution call in a graph, in normal form, and its two ways to run.

Setting a site's path re-targets its node: a vanilla site is a plain `torch.conv2d` on the masked weight, a sparse one
calls `torch.ops.fxsparse.conv2d` on the packed tensors. There is no branch at run time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from fxsparse.regrouping import Regrouping

META = "fxsparse"
FOLDED = "_folded"  # ends the name of a weight that fold_constant_weights made
_METADATA = ("shape", "ndim", "dtype", "device", "layout", "is_cuda", "requires_grad")
PACKED_SUFFIXES = ("_values", "_columns", "_panels", "_rows")


class Support(NamedTuple):
    """Whether a site can run sparse and, if not, why."""

    ok: bool
    reason: str = ""

    @staticmethod
    def no(reason: str) -> Support:
        """Return a refusal."""
        return Support(False, reason)


@dataclasses.dataclass(frozen=True)
class ConvSite:
    """One convolution call. Frozen, because copies of a graph share it; `update` replaces it on one node.

    Attributes:
        name: the original module's name (or the parameter's, where no module owns it).
        weight: name of the weight in the graph's module, for `get_attr`.
        bias: name of the bias, or None.
        weight_shape: (O, C / groups, kh, kw).
        stride, dilation: (vertical, horizontal).
        padding: (top, bottom, left, right).
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        groups: convolution groups.
        support: whether the site can run sparse.
        regrouping: of the weight's mask, once regroup_weights has run.
        estimate: the cost model's sparse time over dense time, or None.
        packed: stem of the packed tensors' names (a weight used at two sites is packed once), or None.
        path: "vanilla" or "sparse".
        reason: why it has this path, for the report.
        input_shape: as seen in calibration, or None.
        vanilla_ms, sparse_ms: medians of one call, measured, or None.
    """

    name: str
    weight: str
    bias: str | None
    weight_shape: tuple[int, int, int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    padding_mode: str = "zeros"
    support: Support = Support(True)
    regrouping: Regrouping | None = None
    estimate: float | None = None
    packed: str | None = None
    path: str = "vanilla"
    reason: str = ""
    input_shape: tuple[int, ...] | None = None
    vanilla_ms: float | None = None
    sparse_ms: float | None = None

    @property
    def density(self) -> float | None:
        """Share of the weights that the mask keeps, once known."""
        return None if self.regrouping is None else self.regrouping.density

    @property
    def packed_names(self) -> tuple[str, ...]:
        """Names of the four packed tensors in the graph's module."""
        if self.packed is None:
            raise ValueError(f"The site '{self.name}' has no packed weight: {self.reason or 'not lowered'}")
        return tuple(self.packed + suffix for suffix in PACKED_SUFFIXES)


def name_of(weight: str) -> str:
    """Return a conv site's name: the module that owns the weight, or the parameter itself where none does."""
    plain = weight.rstrip("_").removesuffix(FOLDED)
    return plain.removesuffix(".weight")


def is_plain_conv(module: nn.Module) -> bool:
    """Tell whether a module computes exactly what `nn.Conv2d` computes, on a weight that is a plain parameter."""
    return (
        isinstance(module, nn.Conv2d)
        and type(module).forward is nn.Conv2d.forward
        and type(module)._conv_forward is nn.Conv2d._conv_forward
        and "weight" in module._parameters
    )


def from_module(conv: nn.Module, weight: str, bias: str) -> ConvSite:
    """Describe the call of a plain `nn.Conv2d` whose parameters the graph knows as `weight` and `bias`."""
    assert isinstance(conv, nn.Conv2d)
    o, c, kh, kw = conv.weight.shape
    stride, dilation = pair(conv.stride), pair(conv.dilation)
    return ConvSite(
        name=weight.rpartition(".")[0],
        weight=weight,
        bias=None if conv.bias is None else bias,
        weight_shape=(o, c, kh, kw),
        stride=stride,
        padding=explicit_padding(conv.padding, (kh, kw), dilation),
        dilation=dilation,
        groups=conv.groups,
        padding_mode=conv.padding_mode,
    )


def explicit_padding(
    padding: Any, kernel_size: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Return (top, bottom, left, right) for any padding that `conv2d` takes; for "same" the odd one comes last."""
    if padding == "valid":
        return (0, 0, 0, 0)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
        top, left = total[0] // 2, total[1] // 2
        return (top, total[0] - top, left, total[1] - left)
    vertical, horizontal = pair(padding)
    return (vertical, vertical, horizontal, horizontal)


def pair(value: Any) -> tuple[int, int]:
    """Return (vertical, horizontal) for a size that may be one integer for both."""
    if isinstance(value, int):
        return (value, value)
    values = tuple(int(v) for v in value)
    return (values[0], values[-1])


def site_of(node: Node) -> ConvSite | None:
    """Return the conv site of a node, or None."""
    site: ConvSite | None = node.meta.get(META)
    return site


def update(node: Node, **changes: Any) -> ConvSite:
    """Replace some fields of a node's conv site."""
    site: ConvSite = dataclasses.replace(node.meta[META], **changes)
    node.meta[META] = site
    return site


def conv_sites(gm: GraphModule) -> Iterator[tuple[Node, ConvSite]]:
    """Yield every conv site of a graph with its node, in graph order."""
    for node in gm.graph.nodes:
        site = site_of(node)
        if site is not None:
            yield node, site


def value_users(node: Node) -> list[Node]:
    """Return the users of a node that read its value, not only its shape, dtype or device."""

    def reads_metadata(user: Node) -> bool:
        if user.op == "call_function":
            return user.target is getattr and user.args[1] in _METADATA
        return user.op == "call_method" and user.target in ("size", "dim", "stride", "numel", "is_contiguous")

    return [user for user in node.users if not reads_metadata(user)]


def attribute(module: nn.Module, name: str) -> Any:
    """Return the attribute with a dotted name."""
    owner, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(owner), leaf)


def set_attribute(module: nn.Module, name: str, value: Any) -> None:
    """Set the attribute with a dotted name."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, value)


def set_path(gm: GraphModule, node: Node, path: str) -> None:
    """Re-target a site's node to the `vanilla` or `sparse` path and drop what that leaves unused."""
    site = node.meta[META]
    if site.path == path:
        return
    graph = gm.graph
    source = input_node(node)
    leftover = [n for n in node.all_input_nodes if n is not source]
    with graph.inserting_before(node):
        if path == "sparse":
            node.target = torch.ops.fxsparse.conv2d.default
            node.args = sparse_arguments(graph, source, site)
        else:
            node.target = torch.conv2d
            node.args = vanilla_arguments(graph, source, site)
    node.kwargs = {}
    update(node, path=path)
    for other in leftover:
        erase_unused(graph, other)


def sparse_arguments(graph: Graph, source: Node, site: ConvSite) -> tuple[Any, ...]:
    """Build the arguments of `fxsparse::conv2d` at the graph's insertion point."""
    packed = [graph.get_attr(name) for name in site.packed_names]
    bias = None if site.bias is None else graph.get_attr(site.bias)
    return (
        source,
        *packed,
        bias,
        list(site.weight_shape),
        list(site.stride),
        list(site.padding),
        list(site.dilation),
        site.groups,
        site.padding_mode,
    )


def vanilla_arguments(graph: Graph, source: Node, site: ConvSite) -> tuple[Any, ...]:
    """Build the arguments of `torch.conv2d` at the graph's insertion point, with a pad before it where needed."""
    weight = graph.get_attr(site.weight)
    bias = None if site.bias is None else graph.get_attr(site.bias)
    outer, inner = split_padding(site)
    if outer:
        source = graph.call_function(F.pad, (source, *outer))
    return source, weight, bias, site.stride, inner, site.dilation, site.groups


def split_padding(site: ConvSite) -> tuple[tuple[tuple[int, ...], str] | None, tuple[int, int]]:
    """Return the padding that `torch.conv2d` cannot do itself, as arguments of `F.pad`, and the one that it can."""
    top, bottom, left, right = site.padding
    if not any(site.padding) or (site.padding_mode == "zeros" and (top, left) == (bottom, right)):
        return None, (top, left)
    mode = "constant" if site.padding_mode == "zeros" else site.padding_mode
    return ((left, right, top, bottom), mode), (0, 0)


def run_vanilla(gm: nn.Module, site: ConvSite, source: Tensor) -> Tensor:
    """Run a site's vanilla path on a tensor, exactly as its node would."""
    outer, inner = split_padding(site)
    if outer:
        source = F.pad(source, *outer)
    bias = None if site.bias is None else attribute(gm, site.bias)
    return torch.conv2d(source, attribute(gm, site.weight), bias, site.stride, inner, site.dilation, site.groups)


def run_sparse(gm: nn.Module, site: ConvSite, source: Tensor) -> Tensor:
    """Run a site's sparse path on a tensor, exactly as its node would."""
    bias = None if site.bias is None else attribute(gm, site.bias)
    result: Tensor = torch.ops.fxsparse.conv2d.default(
        source,
        *(attribute(gm, name) for name in site.packed_names),
        bias,
        site.weight_shape,
        site.stride,
        site.padding,
        site.dilation,
        site.groups,
        site.padding_mode,
    )
    return result


def input_node(node: Node) -> Node:
    """Return the node whose value a site convolves, before any padding."""
    site: ConvSite = node.meta[META]
    source = node.args[0]
    assert isinstance(source, Node)
    if site.path == "vanilla" and split_padding(site)[0]:
        source = source.args[0]
        assert isinstance(source, Node)
    return source


def erase_unused(graph: Graph, node: Node) -> None:
    """Erase a node that nobody reads, and the parameters that only it read."""
    if node.users or node.op == "placeholder":
        return
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for other in inputs:
        if other.op == "get_attr":
            erase_unused(graph, other)
