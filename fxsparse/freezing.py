"""Ends of a conversion: `freeze` keeps what the plan uses and nothing else, `to_dense` gives the plain model back."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.fx import GraphModule

from fxsparse import calibration_mode, graph_module, layouts, sites
from fxsparse.capture.modules import plain_conv
from fxsparse.errors import FxsparseError
from fxsparse.report import graphs_of, refresh, report_of


def freeze(model: nn.Module) -> nn.Module:
    """Drop what the chosen paths do not use: dense weights of sparse sites, packed weights of vanilla ones, masks.

    The model computes the same, to the bit, in less memory and with a smaller `state_dict`. It cannot be trained,
    tested, measured or put on other paths any more. A model of the capture rung `modules` loses `weight` of the
    convolutions that run sparse: code of its own that reads them fails.

    Args:
        model: what `fxsparse.convert` returned; changed in place.

    Returns:
        The same model; its `.report` shows the bytes of all parameters and buffers before and after.

    Raises:
        FxsparseError: the model was not converted, or a convolution is in a mode other than its path.
    """
    report = report_of(model)
    graphs = graphs_of(model)
    for gm in graphs:
        for _, site in sites.conv_sites(gm):
            if site.mode != site.path:
                raise FxsparseError(
                    f"'{site.name}' is in the mode '{site.mode}', and freeze drops what that needs. Leave it first: "
                    "model.eval() ends 'training', fxsparse.set_mode(model, 'vanilla' or 'sparse') any mode."
                )
    before = nbytes(model)
    for gm in graphs:
        _freeze(gm)
    refresh(model, report, bytes_before=before, bytes_after=nbytes(model))
    return model


def to_dense(model: nn.Module) -> nn.Module:
    """Return the plain masked model: a copy in which every site is a `torch.conv2d` or `nn.Conv2d` on a dense weight.

    Nothing of fxsparse is left in it, so it exports to whatever takes plain PyTorch. Batch norms that were folded stay
    folded. In the mode TRAINING it gets the weights as they are now. Weights that `freeze` dropped are unpacked, as
    parameters that require gradients.

    Args:
        model: what `fxsparse.convert` returned; not changed.

    Raises:
        FxsparseError: the model was not converted.
    """
    report_of(model)
    dense = copy.deepcopy(model)
    graphs = graphs_of(dense)
    for gm in graphs:
        _unpack(gm)
    calibration_mode.follow(dense)
    if isinstance(dense, GraphModule):
        return _plain_graph(dense)
    plain = {gm: plain_conv(gm) for gm in graphs}
    for module in list(dense.modules()):
        for name, child in module._modules.items():
            if child in plain:
                module._modules[name] = plain[child]
    for name in ("report", "plan"):
        dense.__dict__.pop(name, None)
    return dense


def nbytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers, memory that several share counted once."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        storages[tensor.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _freeze(gm: GraphModule) -> None:
    unused: set[str] = set()
    for node, site in sites.conv_sites(gm):
        dropped = {site.mask} if site.mask else set()
        if site.path == "sparse":
            dropped.add(site.weight)
        elif site.packed:
            dropped.update(site.packed_names)
        unused |= dropped
        packed = site.packed if site.path == "sparse" else None
        sites.update(node, mask=None, packed=packed, frozen=site.frozen or bool(dropped))
    _drop(gm, unused)


def _drop(gm: GraphModule, names: set[str]) -> None:
    """Delete tensors that no node reads, and no module that the graph calls may read."""
    read = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    called = tuple(f"{node.target}." for node in gm.graph.nodes if node.op == "call_module")
    for name in names - read:
        owner, _, leaf = name.rpartition(".")
        if not name.startswith(called) and hasattr(gm.get_submodule(owner), leaf):
            delattr(gm.get_submodule(owner), leaf)


def _unpack(gm: GraphModule) -> None:
    """Make every site of a graph vanilla on its masked weight, and delete the rest."""
    unpacked: dict[str, nn.Parameter] = {}
    unused: set[str] = set()
    for node, site in sites.conv_sites(gm):
        owner, _, leaf = site.weight.rpartition(".")
        if site.packed and not hasattr(gm.get_submodule(owner), leaf):
            if site.packed not in unpacked:  # what was one parameter stays one
                packed = (sites.attribute(gm, name) for name in site.packed_names)
                weight = torch.ops.fxsparse.unpack(*packed, list(site.weight_shape))
                unpacked[site.packed] = nn.Parameter(weight)
            sites.set_attribute(gm, site.weight, unpacked[site.packed])
        sites.set_path(gm, node, "vanilla")
        unused.update(site.packed_names if site.packed else (), [site.mask] if site.mask else ())
    _drop(gm, unused)
    layouts.clear(gm)
    for node, _ in list(sites.conv_sites(gm)):
        del node.meta[sites.META]
    graph_module.recompile(gm)


def _plain_graph(gm: GraphModule) -> GraphModule:
    """Return a graph as the class that torch.fx makes, with the hooks that hang on it."""
    plain = GraphModule(gm, gm.graph, type(gm).__name__)
    for name in graph_module.HOOKS:
        plain.__dict__[name] = gm.__dict__[name]
    return plain
