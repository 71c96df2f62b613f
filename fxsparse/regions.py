"""Regions: consecutive sparse convolutions, and what stands between them, as one call.

Called one by one, small convolutions cost as much to call as to compute, and large ones write their results to memory
and read them back. On a CPU `fxsparse::region` runs many as one call, a few images at a time. On CUDA
`fxsparse::region_batch_inner` runs them on images stored batch-innermost, where any columns of a weight are read in
whole sectors: a change of layout costs about as much as a layer, so there is one where a region begins and one where it
ends.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from fxsparse import epilogues, layouts, node_kinds, sites, tiled_weights
from fxsparse.ops import region
from fxsparse.ops.library import has_kernel
from fxsparse.ops.precision import convs_allow_tf32
from fxsparse.writes import written_input

# Of a region on a CPU. On CUDA one convolution is worth it: on its own it has no such kernel.
_LEAST_STEPS = 2
# A linear layer with more outputs, of so many images or more, is cuBLAS's. Measured on an H200 (benchmarks/NOTES.md).
_LARGEST_LINEAR, _FEW_IMAGES = 64, 8
_RISING = ("relu", "relu6")  # max(f(a), f(b)) = f(max(a, b))


class Group:
    """Nodes that become one region: connected, and nothing outside lies between two of them.

    Attributes:
        nodes: in graph order.
        inputs: the values outside that they read. All are images of one batch, because each node reads a value of the
            group or one that the group reads already.
        batch_inner: whether the region runs on images stored batch-innermost.
    """

    def __init__(self, *, batch_inner: bool = False) -> None:
        """Begin an empty group."""
        self.batch_inner = batch_inner
        self.nodes: dict[Node, None] = {}
        self.inputs: dict[Node, None] = {}
        self._behind: set[Node] = set()
        self._rows: set[Node] = set()  # those of `nodes` whose values are rows, not images

    def takes(self, gm: GraphModule, node: Node) -> bool:
        """Tell whether a node can be a step behind those that are here."""
        values = _images(node)
        if any(value in self._behind for value in values):
            return False
        if self._is_conv(gm, node):
            return not self.nodes or any(value in self.nodes or value in self.inputs for value in values)
        written = written_input(gm, node)
        if written is not None and len(written.users) > 1:  # the others see what is written; a step makes a new value
            return False
        # Any other step is one on what a step gave only: that is known to be contiguous.
        if not all(value in self.nodes for value in values):
            return False
        if self.batch_inner and len(values) == 1 and node_kinds.flattens(gm, node):
            user = next(iter(node.users)) if len(node.users) == 1 else None
            shape = node_kinds.shape_of(gm, values[0])
            return user is not None and values[0] not in self._rows and is_classifier(gm, user, shape)
        if self._rows.intersection(values):
            return node_kinds.linear_of(gm, node) is not None and node_kinds.flattens(gm, values[0])
        return other_step(gm, node, {}) is not None

    def is_followed_by(self, gm: GraphModule, node: Node) -> bool:
        """Tell whether a node, which is no step of this group, can be the first one of the next."""
        if self._is_conv(gm, node):
            return True
        if self.nodes and not self.needs(node):  # it lies beside this group, which may go on
            return False
        # Nothing is known of the layout of what comes from outside, so nobody else may see what is made of it.
        if self.batch_inner and self._is_pooled(gm, node):
            return True
        alone = bool(node.users) and all(self._is_conv(gm, user) for user in node.users)
        return alone and written_input(gm, node) is None and other_step(gm, node, {}) is not None

    def _is_conv(self, gm: GraphModule, node: Node) -> bool:
        """Tell whether a node is a sparse site that the kernel for such a region can run."""
        return _is_tiled(gm, node) if self.batch_inner else _is_sparse(gm, node)

    def _is_pooled(self, gm: GraphModule, node: Node) -> bool:
        """Tell whether a node is an activation that a region does while it pools its input: it never falls."""
        pool = next(iter(node.users)) if len(node.users) == 1 else None
        if pool is None or node_kinds.activation_of(gm, node) not in _RISING:
            return False
        written = written_input(gm, node)
        if written is not None and (written.target is not torch.conv2d or len(written.users) > 1):
            return False
        return node_kinds.max_pool_of(gm, pool) is not None and self.is_followed_by(gm, pool)

    def add(self, gm: GraphModule, node: Node) -> None:
        """Take a node."""
        self.inputs.update(dict.fromkeys(value for value in _images(node) if value not in self.nodes))
        self.nodes[node] = None
        if node_kinds.flattens(gm, node) or node_kinds.linear_of(gm, node) is not None:
            self._rows.add(node)

    def end(self) -> None:
        """Take no more: rows leave through the linear layer that they were made for, or are made outside."""
        for node in [node for node in self._rows if not any(user in self._rows for user in node.users)]:
            if not self._rows.intersection(node.all_input_nodes):
                del self.nodes[node]
                self._rows.remove(node)
                self._behind.add(node)

    def gives_rows(self, node: Node) -> bool:
        """Tell whether a node of the group gives rows, of which a region makes images of one pixel."""
        return node in self._rows

    def pass_by(self, node: Node) -> None:
        """Note a node that stays outside."""
        if self.needs(node):
            self._behind.add(node)

    def needs(self, node: Node) -> bool:
        """Tell whether a node outside runs on what the group gives."""
        return any(value in self.nodes or value in self._behind for value in node.all_input_nodes)


def executed(gm: GraphModule) -> Graph:
    """Return the graph that a module runs: its own, or a copy with epilogues and regions in single calls."""
    graph = epilogues.fused(gm)
    groups = find(gm, graph)
    return _rewrite(gm, graph, groups) if groups else graph


def find(gm: GraphModule, graph: Graph) -> list[Group]:
    """Return the regions of a graph, in its order.

    Args:
        gm: owns the parameters.
        graph: with the epilogues in its convolutions (`epilogues.fused`).
    """
    batch_inner = any(_is_tiled(gm, node) for node in graph.nodes)
    groups = [Group(batch_inner=batch_inner)]
    for node in graph.nodes:
        if node.op in ("get_attr", "placeholder"):
            continue
        if groups[-1].takes(gm, node):
            groups[-1].add(gm, node)
        elif groups[-1].is_followed_by(gm, node):
            groups.append(Group(batch_inner=batch_inner))
            groups[-1].add(gm, node)
        elif written_input(gm, node) is not None or not node.all_input_nodes or node.is_impure():
            # A write, or a switch such as autocast's: nothing is computed sooner or later than that.
            groups.append(Group(batch_inner=batch_inner))
        else:
            groups[-1].pass_by(node)
    for group in groups:
        group.end()
    if batch_inner:
        return [group for group in groups if any(_is_tiled(gm, node) for node in group.nodes)]
    return [group for group in groups if len(group.nodes) >= _LEAST_STEPS]


def is_classifier(gm: GraphModule, node: Node, shape: tuple[int, ...] | None) -> bool:
    """Tell whether a node is a linear layer that a region on CUDA does sooner than cuBLAS.

    Args:
        gm: owns the parameters.
        node: any.
        shape: of the images that are flattened for it, or None; only planes of one pixel are.
    """
    layer = node_kinds.linear_of(gm, node)
    if layer is None or shape is None or len(shape) != 4 or tuple(shape[2:]) != (1, 1):
        return False
    weight = sites.attribute(gm, layer.weight)
    fits = weight.dim() == 2 and weight.shape[1] == shape[1]
    return fits and (len(weight) <= _LARGEST_LINEAR or shape[0] < _FEW_IMAGES)


def _rewrite(gm: GraphModule, graph: Graph, groups: list[Group]) -> Graph:
    rewritten = epilogues.empty_copy(graph)
    copies: dict[Node, Node] = {}

    def copy(node: Node) -> None:
        if node.op == "output":
            rewritten.output(map_arg(node.args[0], copies.__getitem__), node.type)
        else:
            copies[node] = rewritten.node_copy(node, copies.__getitem__)

    group_of = {node: group for group in groups for node in group.nodes}
    waiting: list[Node] = []  # nodes between the steps of a region that run on what it gives
    open_group: Group | None = None
    for node in graph.nodes:
        group = group_of.get(node)
        if group is not None:
            open_group = group
            if node is next(reversed(group.nodes)):
                _emit(gm, rewritten, group, copies)
                for other in waiting:
                    copy(other)
                open_group, waiting = None, []
        elif open_group is not None and open_group.needs(node):
            waiting.append(node)
        else:
            copy(node)
    for node in rewritten.find_nodes(op="get_attr"):
        if not node.users:  # a packed tensor, whose tiled form is read
            rewritten.erase_node(node)
    return rewritten


def _emit(gm: GraphModule, graph: Graph, group: Group, copies: dict[Node, Node]) -> None:
    """Put a region's call into a graph, and its results into `copies`."""
    numbers = {node: i for i, node in enumerate(group.inputs)}
    tensors = _Tensors(gm, graph, copies, tiled=group.batch_inner)
    program: list[int] = []
    count = len(numbers)
    for node in group.nodes:
        if group.gives_rows(node) and node_kinds.flattens(gm, node):  # of planes of one pixel: the same value
            numbers[node] = numbers[node.all_input_nodes[0]]
            continue
        step: region.Step | None
        if node.target is node_kinds.SPARSE:
            step = tensors.conv(node, numbers)
        elif group.gives_rows(node):
            step = tensors.linear(node, numbers)
        else:
            step = other_step(gm, node, numbers)
        assert step is not None
        program += step.numbers()
        numbers[node] = count
        count += 1
    results = [node for node in group.nodes if any(user not in group.nodes for user in node.users)]
    arguments = ([copies[n] for n in group.inputs], tensors.nodes, program, [numbers[n] for n in results])
    if group.batch_inner:
        last = [numbers[n] for n in results if _becomes_channels_last(group, n)]
        tf32 = graph.call_function(convs_allow_tf32)
        call = graph.call_function(torch.ops.fxsparse.region_batch_inner.default, (*arguments, last, tf32))
    else:
        call = graph.call_function(torch.ops.fxsparse.region.default, arguments)
    for i, node in enumerate(results):
        copies[node] = graph.call_function(operator.getitem, (call, i))
        if group.gives_rows(node):
            # Of an image without a batch there is no such row, as for the layer itself.
            copies[node] = graph.call_function(torch.squeeze, (copies[node], (2, 3)))


def _becomes_channels_last(group: Group, node: Node) -> bool:
    """Tell whether everybody outside a region reads one of its results through a change of layout."""
    outside = [user for user in node.users if user not in group.nodes]
    return all(layouts.moved_to(user) == "channels_last" for user in outside)


def _is_sparse(gm: GraphModule, node: Node) -> bool:
    """Tell whether a node is a sparse site that the kernel for regions can run: on a CPU."""
    if node.target is not node_kinds.SPARSE or sites.site_of(node) is None:
        return False
    values = node.args[1]
    assert isinstance(values, Node)
    device = sites.attribute(gm, str(values.target)).device
    return device.type == "cpu" and has_kernel(device)


def _is_tiled(gm: GraphModule, node: Node) -> bool:
    """Tell whether a node is a sparse site that runs on images stored batch-innermost."""
    site = sites.site_of(node) if node.target is node_kinds.SPARSE else None
    return site is not None and tiled_weights.are_possible(gm, site, site.input_shape)


def _images(node: Node) -> list[Node]:
    """Return the inputs of a node that are images, not parameters."""
    return [value for value in node.all_input_nodes if value.op != "get_attr"]


class _Tensors:
    """The tensors of a region's convolutions."""

    def __init__(self, gm: GraphModule, graph: Graph, copies: dict[Node, Node], *, tiled: bool) -> None:
        """Begin with none; `copies` are the nodes that read a module's tensors in the graph that is made."""
        self.nodes: list[Node] = []
        self._gm, self._graph, self._copies, self._tiled = gm, graph, copies, tiled
        self._numbers: dict[Any, int] = {}
        self._read: dict[str, Node] = {}

    def conv(self, node: Node, numbers: dict[Node, int]) -> region.Conv:
        """Return the step that a sparse site's node is."""
        arguments: Any = (*node.args, *("none", None)[len(node.args) - 12 :])
        source, values, columns, panels, rows, bias, *geometry, activation, add = arguments
        packed = [self._copies[value] for value in (values, columns, panels, rows)]
        if self._tiled:
            packed = self._attach(node)
        fields: Any = (
            numbers[source],
            region.NONE if add is None else numbers[add],
            tuple(self._number(value) for value in packed),
            region.NONE if bias is None else self._number(self._copies[bias]),
            *geometry,
            activation,
        )
        return region.Conv(*fields)

    def linear(self, node: Node, numbers: dict[Node, int]) -> region.Linear:
        """Return the step that a linear layer's node is: it reads the layer's own parameters, whatever they become."""
        weight, bias = node_kinds.linear_of(self._gm, node) or (None, None)
        assert weight is not None
        parameters = [region.NONE if name is None else self._number(self._get(name)) for name in (weight, bias)]
        return region.Linear(numbers[_images(node)[0]], *parameters)

    def _attach(self, node: Node) -> list[Node]:
        site = sites.site_of(node)
        assert site is not None
        tiled_weights.attach(self._gm, site)
        return [self._get(name) for name in tiled_weights.names_of(site)]

    def _get(self, name: str) -> Node:
        if name not in self._read:
            self._read[name] = self._graph.get_attr(name)
        return self._read[name]

    def _number(self, node: Node) -> int:
        if node not in self._numbers:
            self._numbers[node] = len(self.nodes)
            self.nodes.append(node)
        return self._numbers[node]


def other_step(gm: GraphModule, node: Node, numbers: dict[Node, int]) -> region.Step | None:
    """Return the step that a node is besides a convolution, or None; with {} for the numbers only whether it is one."""
    images = _images(node)
    if node_kinds.averages_planes(gm, node):
        return region.Average(numbers.get(images[0], 0))
    activation = node_kinds.activation_of(gm, node)
    if activation is not None:
        return region.Add(numbers.get(images[0], 0), region.NONE, activation)
    if node_kinds.adds_alike(gm, node):
        return region.Add(numbers.get(images[0], 0), numbers.get(images[1], 0), "none")
    window = node_kinds.max_pool_of(gm, node)
    return None if window is None else region.MaxPool(numbers.get(images[0], 0), *window)
