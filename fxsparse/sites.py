"""Conv sites: one convolution call in a graph, in normal form, and the ways to run it.

Setting a site's mode re-targets its node: a vanilla site is a plain `torch.conv2d` on the masked weight, a sparse one
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

from fxsparse import vanilla
from fxsparse.ops import tile_cache
from fxsparse.regrouping import Regrouping
from fxsparse.site_checks import checked_conv2d, timed_conv2d

META = "fxsparse"
TRAINING = "training"  # the value of Mode.TRAINING
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
        weight_layout: the memory layout of the weight as the user has it, "contiguous" or "channels_last".
        stride, dilation: (vertical, horizontal).
        padding: (top, bottom, left, right).
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        groups: convolution groups.
        support: whether the site can run sparse.
        regrouping: of the weight's mask, once regroup_weights has run.
        estimate: the cost model's sparse time over dense time, or None.
        packed: stem of the packed tensors' names (a weight used at two sites is packed once), or None.
        mask: name of the bool buffer that says which weights are kept, or None where none is pruned.
        path: "vanilla" or "sparse": what the plan, or the user, chose.
        mode: value of the `fxsparse.Mode` that its node is in; equal to `path` while the site just runs.
        resume: the mode to go back to when TRAINING ends, or None outside of it.
        frozen: whether `fxsparse.freeze` has dropped what the other path needs.
        layout: the memory layout that it computes in, as calibrated, or None where that was not measured.
        packing: "blocks" (as regrouped) or "rows" (every weight as residual).
        reason: why it has this path, for the report.
        input_shape, output_shape: as seen in calibration, or None.
        vanilla_ms, sparse_ms: medians of one call, measured, or None.
        vanilla_ci, sparse_ci: 95 % confidence intervals of those medians.
        bound_ms: roofline bound of the chosen path, or None.
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
    weight_layout: str = "contiguous"
    support: Support = Support(True)
    regrouping: Regrouping | None = None
    estimate: float | None = None
    packed: str | None = None
    mask: str | None = None
    path: str = "vanilla"
    mode: str = "vanilla"
    resume: str | None = None
    frozen: bool = False
    layout: str | None = None
    packing: str = "blocks"
    reason: str = ""
    input_shape: tuple[int, ...] | None = None
    output_shape: tuple[int, ...] | None = None
    vanilla_ms: float | None = None
    vanilla_ci: tuple[float, float] | None = None
    sparse_ms: float | None = None
    sparse_ci: tuple[float, float] | None = None
    bound_ms: float | None = None

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
    """Choose the `vanilla` or `sparse` path for a site and put its node on it, whatever mode it was in."""
    site: ConvSite = node.meta[META]
    if site.path == site.mode == path:
        return
    update(node, path=path, resume=None)
    retarget(gm, node, path)


def retarget(gm: GraphModule, node: Node, mode: str) -> None:
    """Re-target a site's node to a mode, and drop what that leaves unused; its `path` stays.

    The caller lints and recompiles. A mode that the site has nothing for (no mask to train under, no packed weight to
    test) computes as the site's path does. A site that leaves TRAINING gets its weight packed again.

    Args:
        gm: owns the node.
        node: of a conv site.
        mode: value of a `fxsparse.Mode`.
    """
    site: ConvSite = node.meta[META]
    if site.mode == TRAINING != mode:
        refresh_weight(gm, site)
    graph, source = gm.graph, input_node(node)
    leftover = [n for n in node.all_input_nodes if n is not source]
    with graph.inserting_before(node):
        node.target, node.args = _call(graph, source, site, mode, node.name)
    node.kwargs = {}
    update(node, mode=mode)
    for other in leftover:
        erase_unused(graph, other)


def _call(graph: Graph, source: Node, site: ConvSite, mode: str, node: str) -> tuple[Any, tuple[Any, ...]]:
    """Build what a site's node calls in a mode, at the graph's insertion point."""
    if mode == TRAINING and site.mask is not None:
        # Not a product: an overflowed gradient times 0 is NaN, and would bring a pruned weight to life.
        mask, weight = graph.get_attr(site.mask), graph.get_attr(site.weight)
        return torch.conv2d, vanilla_arguments(graph, source, site, graph.call_function(torch.where, (mask, weight, 0)))
    if mode == TRAINING:
        return torch.conv2d, vanilla_arguments(graph, source, site)
    if mode == "benchmark" or (mode == "test" and site.packed is not None):
        weight = graph.get_attr(site.weight)
        bias = None if site.bias is None else graph.get_attr(site.bias)
        packed = None if site.packed is None else tuple(graph.get_attr(name) for name in site.packed_names)
        arguments = (source, weight, bias, packed, *_geometry(site), site.path, site.name)
        return (checked_conv2d, arguments) if mode == "test" else (timed_conv2d, (*arguments, node))
    if mode == "sparse" or (mode != "vanilla" and site.path == "sparse"):
        return torch.ops.fxsparse.conv2d.default, sparse_arguments(graph, source, site)
    return torch.conv2d, vanilla_arguments(graph, source, site)


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


def vanilla_arguments(graph: Graph, source: Node, site: ConvSite, weight: Node | None = None) -> tuple[Any, ...]:
    """Build the arguments of `torch.conv2d` at the graph's insertion point, with a pad before it where needed.

    Args:
        graph: of the site.
        source: what the site convolves.
        site: the site.
        weight: a node to use in the place of the site's weight.
    """
    weight = weight or graph.get_attr(site.weight)
    bias = None if site.bias is None else graph.get_attr(site.bias)
    outer, inner = vanilla.split_padding(site.padding, site.padding_mode)
    if outer:
        source = graph.call_function(F.pad, (source, *outer))
    return source, weight, bias, site.stride, inner, site.dilation, site.groups


def _geometry(site: ConvSite) -> tuple[Any, ...]:
    return site.stride, site.padding, site.dilation, site.groups, site.padding_mode


def run_vanilla(gm: nn.Module, site: ConvSite, source: Tensor) -> Tensor:
    """Run a site's vanilla path on a tensor, exactly as its node would."""
    bias = None if site.bias is None else attribute(gm, site.bias)
    return vanilla_conv2d(site, source, attribute(gm, site.weight), bias)


def run_sparse(gm: nn.Module, site: ConvSite, source: Tensor) -> Tensor:
    """Run a site's sparse path on a tensor, exactly as its node would."""
    bias = None if site.bias is None else attribute(gm, site.bias)
    return sparse_conv2d(site, source, tuple(attribute(gm, name) for name in site.packed_names), bias)


def vanilla_conv2d(site: ConvSite, source: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve as a site does, on a dense weight."""
    return vanilla.conv2d(source, weight, bias, *_geometry(site))


def sparse_conv2d(site: ConvSite, source: Tensor, packed: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
    """Convolve as a site does, on a packed weight."""
    result: Tensor = torch.ops.fxsparse.conv2d.default(source, *packed, bias, site.weight_shape, *_geometry(site))
    return result


def input_node(node: Node) -> Node:
    """Return the node whose value a site convolves, before any padding."""
    site: ConvSite = node.meta[META]
    source = node.args[0]
    assert isinstance(source, Node)
    # Only torch.conv2d leaves padding to a node before it.
    if node.target is torch.conv2d and vanilla.split_padding(site.padding, site.padding_mode)[0]:
        source = source.args[0]
        assert isinstance(source, Node)
    return source


@torch.no_grad()
def refresh_weight(gm: nn.Module, site: ConvSite) -> None:
    """Write exact zeros where a site's weight is pruned, and the weight as it is now into its packed form, in place.

    An optimizer leaves pruned weights at zero where it sees zero gradients alone; one that adds noise does not, nor
    does loading other weights.
    """
    weight = attribute(gm, site.weight)
    if site.mask is not None:
        revived = (weight != 0) & ~attribute(gm, site.mask)
        if bool(revived.any()):  # a write would count as a change, which a pending backward refuses
            weight.masked_fill_(revived, 0)
    if site.packed is not None:
        values, *tables = (attribute(gm, name) for name in site.packed_names)
        values.copy_(torch.ops.fxsparse.repack(weight, *tables, values.numel()))
        tile_cache.refresh(values)


def erase_unused(graph: Graph, node: Node) -> None:
    """Erase a node that nobody reads, and the parameters that only it read."""
    if node.users or node.op == "placeholder":
        return
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for other in inputs:
        if other.op == "get_attr":
            erase_unused(graph, other)
