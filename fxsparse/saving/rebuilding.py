"""A converted model made of a plain one and the saved state of its convolutions."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxsparse import calibration_mode, checkpoints, graph_module, json_values, layouts, plan, sites, tiled_weights
from fxsparse.calibration import applying
from fxsparse.capture import RUNGS, capture
from fxsparse.errors import FxsparseError
from fxsparse.inputs import ExampleInputs, remember
from fxsparse.json_values import Wrong
from fxsparse.masks import bake
from fxsparse.passes.base import PassContext
from fxsparse.passes.fold_batch_norm import fold_batch_norm
from fxsparse.passes.fold_constant_weights import fold_constant_weights
from fxsparse.passes.normalize_convs import normalize_convs
from fxsparse.plan import Move, Plan
from fxsparse.report import Report, attach, draw, refresh
from fxsparse.saving import safety, site_state
from fxsparse.saving.report_state import report_from_dict
from fxsparse.settings import Settings
from fxsparse.sites import ConvSite

# What the code of a model says of a convolution; all else is what the conversion made of it.
_OF_CODE = ("name", "weight", "bias", "weight_shape", "stride", "padding", "dilation", "groups", "padding_mode")
_SHOWN = 3
_LARGEST_INPUT = 1 << 28  # elements; the rung `export` runs the model on inputs of this shape
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


@dataclasses.dataclass(frozen=True)
class SavedGraph:
    """How the convolutions of one graph run, in the order of the graph."""

    sites: tuple[ConvSite, ...]
    moves: tuple[Move, ...]
    laid_aside: tuple[Move, ...]


@dataclasses.dataclass(frozen=True)
class SavedWeights:
    """What a file of `save_weights` holds.

    Attributes:
        rung: the capture rung.
        folded: whether batch norms were folded.
        training: names of the modules that were in training mode.
        graphs: by name in the model.
        tensors: all parameters and buffers, by name; those that were tied are one object.
        tied: by name, the other name under which a tensor is stored.
        channels_last: names of the tensors that are in that layout.
        inputs: what the inputs look like, on the meta device, or None.
        report, plan: of the model.
        device, fxsparse, torch: where it was and what wrote it.
    """

    rung: str
    folded: bool
    training: frozenset[str]
    graphs: dict[str, SavedGraph]
    tensors: dict[str, Tensor]
    tied: dict[str, str]
    channels_last: frozenset[str]
    inputs: ExampleInputs | None
    report: Report
    plan: Plan
    device: str
    fxsparse: str
    torch: str


def rebuild(path: Path, model: nn.Module, saved: SavedWeights, inputs: ExampleInputs | None) -> nn.Module:
    """Capture a plain model as it was captured before, and bring it to the saved state.

    Args:
        path: of the file, for errors.
        model: the plain model; not changed.
        saved: what the file says.
        inputs: that the rung `export` needs; the others do without.

    Raises:
        FxsparseError: the model does not fit.
    """
    converted = _capture(model, saved, inputs)
    _refuse_others(path, saved, applying.graphs(converted))
    graphs = applying.graphs(converted)
    _place_tensors(path, converted, saved)
    with safety.reading(path):
        for name, gm in graphs.items():
            _place_sites(gm, saved.graphs[name])
        for name, module in converted.named_modules():
            module.training = name in saved.training
        if saved.plan.entries:
            attach(converted, "plan", saved.plan)
        if saved.inputs is not None:
            remember(converted, saved.inputs)
        refresh(converted, saved.report, draw(converted))
        calibration_mode.follow(converted)
    return converted


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers, under every name that they have, but for tiled weights."""
    found = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for graph, gm in applying.graphs(model).items():
        for _, site in sites.conv_sites(gm):
            for name in tiled_weights.names_of(site) if site.packed is not None else ():
                found.pop(_full(graph, name), None)
    return found


def _capture(model: nn.Module, saved: SavedWeights, inputs: ExampleInputs | None) -> nn.Module:
    """Run what convert does up to the regrouping."""
    baked = bake(model, None)
    keys = list(baked.model.state_dict())
    captured = capture(baked.model, inputs if saved.rung == "export" else None, saved.rung)
    settings = Settings(fold_batch_norm=saved.folded)
    for prefix, gm in captured.graphs:
        checkpoints.record(gm, keys, prefix)
        context = PassContext(settings, {}, prefix)
        for run in (fold_constant_weights, normalize_convs, fold_batch_norm):
            run(gm, context)
    return captured.model


def _refuse_others(path: Path, saved: SavedWeights, graphs: dict[str, GraphModule]) -> None:
    """Refuse a model with other convolutions than the saved one."""
    found = {name: [site for _, site in sites.conv_sites(gm)] for name, gm in graphs.items()}
    differences = []
    for name in dict.fromkeys((*saved.graphs, *found)):
        wanted = saved.graphs[name].sites if name in saved.graphs else ()
        here = found.get(name, [])
        if len(wanted) != len(here):
            differences.append(f"{len(here)} convolutions in '{name}'; the file has {len(wanted)}")
        for a, b in zip(here, wanted, strict=False):
            other = next((field for field in _OF_CODE if getattr(a, field) != getattr(b, field)), None)
            if other:
                values = f"{getattr(a, other)!r}; the file has {getattr(b, other)!r}"
                differences.append(f"{other} of '{a.name}' is {values:.200}")
    _refuse(path, differences)


def _place_tensors(path: Path, model: nn.Module, saved: SavedWeights) -> None:
    """Write the saved tensors over those of the model; add masks and packed tensors, delete what was frozen away."""
    own, stored = tensors_of(model), saved.tensors
    with safety.reading(path):
        added = {name: weight for name, weight in _added(saved).items() if name in stored and name not in own}
    dropped = {
        _full(graph, site.weight)
        for graph, saved_graph in saved.graphs.items()
        for site in saved_graph.sites
        if site.frozen and site.path == "sparse"
    } - set(stored)
    differences = [f"'{name}' is not in the file" for name in own if name not in stored and name not in dropped]
    differences += [
        f"the file has '{name}' besides" for name in sorted(stored) if name not in own and name not in added
    ]
    first: dict[int, str] = {}
    for name, tensor in own.items():
        other = first.setdefault(id(tensor), name)
        if name in stored and _described(tensor) != _described(stored[name]):
            differences.append(f"'{name}' is {_described(tensor)}; the file has {_described(stored[name])}")
        if stored.get(name) is not stored.get(other):
            differences.append(f"'{name}' and '{other}' are one tensor; in the file they are two")
    _refuse(path, differences)
    for name, weight in added.items():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner).register_buffer(leaf, stored[name].to(own[weight].device))
    for name in dropped:
        owner, _, leaf = name.rpartition(".")
        delattr(model.get_submodule(owner), leaf)
    for name in set(first.values()) - dropped:
        layout = torch.channels_last if name in saved.channels_last else torch.contiguous_format
        own[name].data = stored[name].to(own[name].device, copy=True).contiguous(memory_format=layout)


def _added(saved: SavedWeights) -> dict[str, str]:
    """Return the names of masks and packed tensors, each with that of the weight that it stands beside."""
    masks: dict[str, str] = {}
    packed: dict[str, str] = {}
    for graph, saved_graph in saved.graphs.items():
        weights = {site.weight for site in saved_graph.sites}
        for site in saved_graph.sites:
            weight = (site.mask or "").rstrip("_").removesuffix("_mask")
            if site.mask is not None and weight not in weights:
                raise Wrong(site.mask, f"mask of '{site.name}'", "the name of a weight, and '_mask'")
            if site.mask is not None:
                masks[_full(graph, site.mask)] = _full(graph, weight)
            if site.packed is not None and site.packed not in weights:
                raise Wrong(site.packed, f"packed of '{site.name}'", "the name of a weight")
            if site.packed is not None:
                packed |= {_full(graph, name): _full(graph, site.packed) for name in site.packed_names}
    return masks | packed  # in the order in which the conversion adds them


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _place_sites(gm: GraphModule, saved: SavedGraph) -> None:
    """Put the sites of a graph and its layouts in their modes and places."""
    tensors = tensors_of(gm)
    nodes = [node for node, _ in sites.conv_sites(gm)]
    for node, site in zip(nodes, saved.sites, strict=True):
        site_state.check_tensors(site, tensors)
        node.meta[sites.META] = dataclasses.replace(site, mode="vanilla")
        sites.retarget(gm, node, site.mode)
    if layouts.place(gm, saved.moves):
        raise Wrong(saved.moves, "moves", "changes of layout that this graph has a place for")
    graph_module.lay_aside(gm, saved.laid_aside)
    graph_module.recompile(gm)


def _full(graph: str, name: str) -> str:
    return f"{graph}.{name}" if graph else name


def _refuse(path: Path, differences: list[str]) -> None:
    if differences:
        shown = "; ".join(differences[:_SHOWN]) + (
            f"; and {len(differences) - _SHOWN} more" * (len(differences) > _SHOWN)
        )
        raise FxsparseError(
            f"The model does not fit '{path}': {shown}. Give the model as it was given to fxsparse.convert: the same "
            "class and settings, mode (eval or train) and dtype."
        )


def _input_shape(value: Any, place: str) -> tuple[int, ...]:
    shape: tuple[int, ...] = json_values.tuple_of(json_values.integer)(value, place)
    if math.prod(max(size, 1) for size in shape) > _LARGEST_INPUT:
        raise Wrong(value, place, f"of at most {_LARGEST_INPUT} elements")
    return shape


def _inputs(value: Any, place: str) -> ExampleInputs:
    args, kwargs = _read_inputs(value, place)
    return ExampleInputs(args, kwargs)


_names = json_values.tuple_of(json_values.text)
_read_moves = json_values.tuple_of(plan.read_move)
read_graphs = json_values.by_name(
    json_values.record(
        lambda sites, moves, laid_aside: (sites, moves, laid_aside),
        sites=json_values.tuple_of(lambda value, place: value),
        moves=_read_moves,
        laid_aside=_read_moves,
    )
)
_read_shape = json_values.record(
    lambda shape, dtype: torch.empty(shape, dtype=_DTYPES[dtype], device="meta"),
    shape=_input_shape,
    dtype=json_values.one_of(tuple(_DTYPES)),
)
_read_inputs = json_values.record(
    lambda args, kwargs: (args, kwargs),
    args=json_values.tuple_of(_read_shape),
    kwargs=json_values.by_name(_read_shape),
)
read_fields = json_values.record(
    dict,
    fxsparse=json_values.text,
    torch=json_values.text,
    rung=json_values.one_of(tuple(RUNGS)),
    folded=site_state.boolean,
    device=json_values.text,
    training=lambda value, place: frozenset(_names(value, place)),
    tied=json_values.by_name(json_values.text),
    channels_last=lambda value, place: frozenset(_names(value, place)),
    inputs=json_values.optional(_inputs),
    report=report_from_dict,
)
