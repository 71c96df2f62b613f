"""`load`: a saved model from its archive, checked before torch sees it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.export.passes import move_to_device_pass
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from fxsparse import calibration_mode, graph_module, json_values, layouts, plan, sites, vanilla
from fxsparse.errors import FxsparseError
from fxsparse.graph_module import ConvertedModule
from fxsparse.inputs import ExampleInputs, remember
from fxsparse.json_values import Wrong
from fxsparse.pictures import WeightPicture, picture
from fxsparse.plan import Move, Plan
from fxsparse.regrouping import Regrouping
from fxsparse.report import Report, attach, draw, refresh
from fxsparse.saving import regroupings, safety, site_state
from fxsparse.saving.report_state import report_from_dict
from fxsparse.saving.site_state import Damaged
from fxsparse.saving.tensors import retie, tied
from fxsparse.saving.writing import GRAPH_META
from fxsparse.sites import ConvSite

_DEVICE = re.compile(r"(cpu|cuda|mps|xpu)(:\d{1,3})?")
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
_SPARSE = torch.ops.fxsparse.conv2d.default
_ADDRESSED = 11  # arguments of the operator up to `groups`


def load(path: str | Path, *, map_location: torch.device | str | None = None) -> nn.Module:
    """Read a model that `fxsparse.save` wrote.

    Nothing in the file is run, and no pickle is read: what could run code, or make a kernel read out of bounds, is
    refused before torch opens the file.

    Args:
        path: the file.
        map_location: the device to load to; None is the device that the model was saved from.

    Returns:
        The model, as it was when it was saved: paths, modes, layouts, plan, report. Nothing is measured again.

    Raises:
        FxsparseError: the file cannot be read, is damaged, is no saved model, or is of a newer version; or the device
            is not there.
    """
    path = Path(path)
    with safety.reading(path):
        checked = safety.check(path)
        state: _State = _read_state(checked.state, "state")
        device = _device(path, state.device, map_location)
        with path.open("rb") as file:
            exported = torch.export.load(file)
        groups = tied(exported.state_dict)
        if device.type != "cpu":
            exported = move_to_device_pass(exported, str(device))
        gm = _graph(exported, groups, state.class_name)
        _check_sparse_calls(gm)
        state = dataclasses.replace(state, moves=_renamed(gm, state.moves), laid_aside=_renamed(gm, state.laid_aside))
        known = regroupings.from_bytes(checked.regroupings)
        _place_sites(gm, state, known)
        remember(gm, _inputs(exported, state))
        recorded = Plan.from_dict(checked.plan, f"The plan in '{path}'")
        entries = (dataclasses.replace(entry, moves=_renamed(gm, entry.moves)) for entry in recorded.entries)
        recorded = dataclasses.replace(recorded, entries=tuple(entries))
        _finish(gm, state, report_from_dict(checked.report), recorded)
    return gm


@dataclasses.dataclass(frozen=True)
class _State:
    """What `state.json` holds."""

    class_name: str
    device: str
    training: bool
    inputs: tuple[tuple[tuple[int, ...], torch.dtype] | None, ...]
    sites: dict[str, Any]
    moves: tuple[Move, ...]
    laid_aside: tuple[Move, ...]
    attributes: dict[str, Any]
    meta: dict[str, Any]


def _device(path: Path, saved: str, map_location: torch.device | str | None) -> torch.device:
    try:
        device = torch.device(saved if map_location is None else map_location)
        torch.empty(0, device=device)
    except Exception as error:  # each backend has its own way to say that it is not there
        where = f"'{path}' was saved from {saved}" if map_location is None else f"map_location is '{map_location}'"
        raise FxsparseError(
            f"{where}, which is not there. Give the device to load to: fxsparse.load(path, map_location='cpu')."
        ) from error
    return device


def _graph(exported: ExportedProgram, groups: list[list[str]], class_name: str) -> ConvertedModule:
    """Return a program as a graph with all its parameters and buffers, also those that no node reads."""
    module = exported.module(check_guards=False)
    # Built anew, because export's own module refuses train() and eval(). It copies what the graph reads, and export
    # reads everything once.
    gm = ConvertedModule(module, module.graph, class_name)
    # Export puts tensors that it reads before the inputs; what is put before the first other node would precede these.
    for node in reversed(gm.graph.find_nodes(op="placeholder")):
        next(iter(gm.graph.nodes)).prepend(node)
    for node in list(gm.graph.nodes):
        node.meta = {}
        if node.op == "get_attr" and not node.users:
            gm.graph.erase_node(node)
    for name in exported.graph_signature.non_persistent_buffers:
        owner, _, leaf = name.rpartition(".")
        gm.get_submodule(owner).register_buffer(leaf, sites.attribute(gm, name), persistent=False)
    tensors = _tensors(gm)
    retie(tensors, groups)
    for name in (name for names in groups for name in names):
        sites.set_attribute(gm, name, tensors[name])
    return gm


def _renamed(gm: GraphModule, moves: Iterable[Move]) -> tuple[Move, ...]:
    """Return moves of the program as moves of its graph: torch.fx renames an input that is called like a builtin."""
    names = {str(node.target): node.name for node in gm.graph.find_nodes(op="placeholder")}
    return tuple(dataclasses.replace(move, value=names.get(move.value, move.value)) for move in moves)


def _tensors(gm: GraphModule) -> dict[str, Tensor]:
    """Return all parameters and buffers by name."""
    return {**dict(gm.named_parameters(remove_duplicate=False)), **dict(gm.named_buffers(remove_duplicate=False))}


def _check_sparse_calls(gm: GraphModule) -> None:
    """Check the packed tensors of every call of the sparse operator, whether it belongs to a site or not."""
    tensors = _tensors(gm)
    for node in gm.graph.nodes:
        if node.target is not _SPARSE:
            continue
        packed = [tensors.get(str(arg.target)) for arg in node.args[1:5] if isinstance(arg, Node)]
        values, columns, panels, rows = (tensor for tensor in packed if tensor is not None)
        weight_shape, groups = node.args[6], node.args[_ADDRESSED - 1]
        site_state.check_packed(node.name, values, columns, panels, rows, weight_shape, groups)


def _place_sites(gm: GraphModule, state: _State, known: Sequence[Regrouping]) -> None:
    """Attach the conv sites to their nodes, and put them and the layouts in their modes and places."""
    tensors = _tensors(gm)
    nodes = {node.name: node for node in gm.graph.nodes}
    for name, values in state.sites.items():
        site = site_state.from_dict(values, f"state.sites[{name!r}]", known)
        site_state.check_tensors(site, tensors)
        owner = site.weight.rpartition(".")[0]
        if owner and owner not in dict(gm.named_modules()):
            gm.add_submodule(owner, nn.Module())  # all that was in it is frozen away
        node = nodes.get(name)
        if node is None or not _is_call(node, site):
            raise Damaged(f"the graph has no convolution '{name}'")
        if node.target is not _SPARSE:
            node.target = torch.conv2d  # the normal form of a vanilla site
        node.meta[sites.META] = dataclasses.replace(site, mode="vanilla")
        sites.retarget(gm, node, site.mode)
    if layouts.place(gm, state.moves):
        raise Damaged("the graph has no place for one of its changes of layout")
    graph_module.lay_aside(gm, state.laid_aside)
    graph_module.recompile(gm)


def _is_call(node: Node, site: ConvSite) -> bool:
    """Tell whether a node is what `save` exports for a site: a convolution, with a pad before it where it needs one."""
    if node.target not in (_SPARSE, torch.ops.aten.conv2d.default) or not node.args:
        return False
    source = node.args[0]
    if node.target is not _SPARSE and vanilla.split_padding(site.padding, site.padding_mode)[0]:
        if not isinstance(source, Node) or source.op != "call_function" or not source.args:
            return False
        source = source.args[0]
    return isinstance(source, Node)


def _inputs(exported: ExportedProgram, state: _State) -> ExampleInputs:
    """Return inputs that look like those that the model was saved with."""
    user = [spec.arg for spec in exported.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT]
    if len(user) != len(state.inputs):
        raise Wrong(len(state.inputs), "state.inputs", f"{len(user)} inputs, as the graph has them")
    leaves: list[Any] = []
    for arg, saved in zip(user, state.inputs, strict=True):
        if saved is not None:
            leaves.append(torch.empty(saved[0], dtype=saved[1], device="meta"))
        else:
            leaves.append(arg.value if isinstance(arg, ConstantArgument) else None)
    spec = exported.call_spec.in_spec
    assert spec is not None
    return ExampleInputs(*pytree.tree_unflatten(leaves, spec))


def _finish(gm: ConvertedModule, state: _State, report: Report, recorded: Plan) -> None:
    """Attach plan, report and attributes, and put the flags and hooks back that follow from the modes."""
    gm.meta.update(state.meta)
    nn.Module.train(gm, state.training)  # the sites are in their modes already
    if recorded.entries:
        attach(gm, "plan", recorded)
    refresh(gm, report, _pictures(gm))
    calibration_mode.follow(gm)
    for name, value in state.attributes.items():
        if not name.isidentifier() or hasattr(gm, name):  # none may replace what a model is made of
            raise Wrong(name, "state.attributes", "names that are free on the model")
        setattr(gm, name, value)


def _pictures(gm: GraphModule) -> dict[str, WeightPicture]:
    """Draw the weights; those of frozen sites, whose masks are gone, from what they keep."""
    drawn = draw(gm)
    for _, site in sites.conv_sites(gm):
        if site.frozen and site.regrouping is not None and site.regrouping.kept < site.regrouping.dense_cost:
            if site.path == "sparse":
                packed = (sites.attribute(gm, name) for name in site.packed_names)
                weight = torch.ops.fxsparse.unpack(*packed, list(site.weight_shape))
            else:
                weight = sites.attribute(gm, site.weight).detach()
            kept = (weight != 0).reshape(site.weight_shape[0], -1)
            drawn[site.name] = picture(kept.cpu().numpy(), site.regrouping)
    return drawn


def _identifier(value: Any, place: str) -> str:
    if not isinstance(value, str) or not value.isidentifier() or not value.isascii():
        raise Wrong(value, place, "a name of a class")
    return value


def _device_text(value: Any, place: str) -> str:
    if not isinstance(value, str) or not _DEVICE.fullmatch(value):
        raise Wrong(value, place, "a device, as in 'cpu' or 'cuda:0'")
    return value


def _any(value: Any, place: str) -> Any:
    return value


def _meta(value: Any, place: str) -> dict[str, Any]:
    keys, norms = GRAPH_META
    readers = {keys: _keys, norms: json_values.tuple_of(_read_norm)}
    if not isinstance(value, dict) or not set(value) <= set(readers):
        raise Wrong(value, place, f"an object with fields of {', '.join(readers)}")
    return {key: list(readers[key](item, f"{place}.{key}")) for key, item in value.items()}


_text_or_none = json_values.optional(json_values.text)
_keys = json_values.tuple_of(json_values.text)
_read_norm = json_values.record(
    dict,
    weight=json_values.text,
    bias=json_values.text,
    old_bias=site_state.boolean,
    norm=json_values.record(dict, mean=_text_or_none, var=_text_or_none, weight=_text_or_none, bias=_text_or_none),
    eps=json_values.milliseconds,  # a finite number of at least 0
)
_read_input = json_values.record(
    lambda shape, dtype: (shape, _DTYPES[dtype]),
    shape=json_values.tuple_of(json_values.integer),
    dtype=json_values.one_of(tuple(_DTYPES)),
)
_read_moves = json_values.tuple_of(plan.read_move)


def _read_state(values: Mapping[str, Any], place: str) -> _State:
    renamed = {"class_name" if name == "class" else name: value for name, value in dict(values).items()}
    state: _State = _read_fields(renamed, place)
    return state


_read_fields = json_values.record(
    _State,
    class_name=_identifier,
    device=_device_text,
    training=site_state.boolean,
    inputs=json_values.tuple_of(json_values.optional(_read_input)),
    sites=json_values.by_name(_any),
    moves=_read_moves,
    laid_aside=_read_moves,
    attributes=json_values.by_name(_any),
    meta=_meta,
)
