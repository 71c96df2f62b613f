"""Export a converted graph so that each of its nodes can be found again in the exported one.

What is exported is the graph in one canonical form: every site that is not frozen vanilla, no changes of layout. The
archive is then a plain program of torch.export, and how each site runs is data beside it, put in place by the functions
that modes and plans use as well. Exporting the graph as it runs would not do: the modes TEST, BENCHMARK and TRAINING
have no form in an archive, and a site that is put on another path later needs the normal form anyway. Only a frozen
sparse site, which has no dense weight any more, is exported as the sparse operator.

Nodes are found by marks. After each node the exported forward calls `fxsparse::mark`, an operator without a result, on
the node's value: what is traced between two marks belongs to the node of the second one. No mark stays in the program.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import io
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import SymInt, Tensor, nn
from torch.export import Dim, ExportedProgram, ModuleCallEntry
from torch.export.graph_signature import InputKind
from torch.export.passes import move_to_device_pass
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import is_concrete_int, statically_known_true
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.utils import _pytree as pytree

from fxsparse import calibration_mode, layouts, sites, vanilla
from fxsparse.capture.refusal import Refusal, first_line, refuse_hooks
from fxsparse.errors import FxsparseError
from fxsparse.graph_module import ConvertedModule, single_steps
from fxsparse.inputs import ExampleInputs
from fxsparse.saving.tensors import alias, retie, tied

log = logging.getLogger(__name__)

_library = torch.library.Library("fxsparse", "FRAGMENT")
_library.define("mark(Tensor[] values, str node) -> ()")
_library.impl("mark", lambda values, node: None, "CompositeExplicitAutograd")
torch.library.register_fake("fxsparse::mark", lambda values, node: None, lib=_library)
_MARK = torch.ops.fxsparse.mark.default
torch.fx.node.has_side_effect(_MARK)  # or it would be dropped as dead code

_CONVOLUTIONS = (torch.ops.aten.conv2d.default, torch.ops.fxsparse.conv2d.default)
_IN_TRAINING = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd, nn.RReLU)


@dataclasses.dataclass(frozen=True)
class Program:
    """A converted graph, exported.

    Attributes:
        exported: on the CPU, without example inputs and without metadata of its nodes but their values.
        source: the graph in canonical form, as it was exported.
        values: by node of the source, the exported node that computes its value.
        owners: by exported node, the node of the source that it belongs to.
        notes: what the loaded model cannot do that the saved one can.
    """

    exported: ExportedProgram
    source: GraphModule
    values: dict[str, str]
    owners: dict[str, str]
    notes: tuple[str, ...]


def canonical(model: ConvertedModule) -> ConvertedModule:
    """Return a copy of a converted graph that shares its memory: unfrozen sites vanilla, no moves, evaluation mode.

    Raises:
        FxsparseError: the model has hooks, which no program holds, or tensors of a special class.
    """
    tensors = [*model.parameters(), *model.buffers()]
    gm = copy.deepcopy(model, {id(tensor): alias(tensor) for tensor in tensors})
    layouts.clear(gm)
    for node, site in list(sites.conv_sites(gm)):
        path = site.path if site.frozen else "vanilla"
        # The mode first: to leave TRAINING would write to the weights, which are the model's.
        sites.update(node, mode=path)
        sites.retarget(gm, node, path)
    gm.recompile()
    calibration_mode.follow(gm)
    try:
        refuse_hooks(gm)
    except Refusal as refusal:
        raise FxsparseError(
            f"The model cannot be saved as one graph: {refusal}. Remove it and register it again on the loaded model, "
            "or use fxsparse.save_weights."
        ) from refusal
    return gm.eval()


def export(gm: ConvertedModule, inputs: ExampleInputs, device: torch.device) -> Program:
    """Export a graph in canonical form, with as many dynamic sizes as it allows.

    Args:
        gm: what `canonical` returned.
        inputs: example inputs; only their structure, shapes and dtypes count.
        device: that they and the model are on.

    Raises:
        FxsparseError: torch.export refuses the graph.
    """
    with _marked(gm) as marked:
        exported, notes = _export(marked, inputs)
    values, owners = _read_marks(exported)
    for node, site in sites.conv_sites(gm):
        found = next((n for n in exported.graph.nodes if n.name == values.get(node.name)), None)
        if found is None or found.target not in _CONVOLUTIONS:
            raise FxsparseError(f"torch.export left no convolution in the place of '{site.name}'. Use save_weights.")
    groups = tied(exported.state_dict)
    if device.type != "cpu":
        exported = move_to_device_pass(exported, "cpu")
    return Program(_stripped(exported, groups), gm, values, owners, (*notes, *_training_notes(gm)))


@contextlib.contextmanager
def _marked(gm: ConvertedModule) -> Iterator[ConvertedModule]:
    """Put a mark behind every node, while inside."""
    marks = []
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for node in [node for node in gm.graph.nodes if node.op != "output"]:
        place = placeholders[-1] if node.op == "placeholder" else node
        with gm.graph.inserting_after(place):
            marks.append(gm.graph.call_function(_mark, (node, node.name)))
    try:
        with single_steps(gm):
            yield gm
    finally:
        for mark in marks:
            gm.graph.erase_node(mark)
        gm.recompile()


def _mark(value: Any, node: str) -> None:
    _MARK([value] if isinstance(value, Tensor) else [], node)


def _export(gm: GraphModule, inputs: ExampleInputs) -> tuple[ExportedProgram, tuple[str, ...]]:
    """Export with all sizes of the inputs dynamic, or the batch only, or none."""
    attempts: tuple[tuple[Callable[[Tensor], Any], ExampleInputs], ...] = (
        (lambda value: dict.fromkeys(range(value.dim()), Dim.AUTO), _batches_of_two(inputs)),
        (lambda value: {0: Dim.AUTO} if value.dim() > 1 else None, _batches_of_two(inputs)),
        (lambda value: None, inputs),
    )
    error: Exception | None = None
    for dynamic, given in attempts:

        def spec(value: Any, dynamic: Callable[[Tensor], Any] = dynamic) -> Any:
            return dynamic(value) if isinstance(value, Tensor) else None

        bound = inspect.signature(gm.forward).bind(*given.args, **given.kwargs).arguments
        shapes = {name: pytree.tree_map(spec, value) for name, value in bound.items()}
        try:
            with torch.no_grad(), _quiet():
                exported = torch.export.export(
                    gm, given.args, given.kwargs or None, dynamic_shapes=shapes, strict=False
                )
        except Exception as failure:  # export runs the model's operators, which may raise anything
            log.info("Export failed: %s", failure)
            error = failure
            continue
        return exported, _notes(exported)
    raise FxsparseError(
        f"torch.export refuses the model: {type(error).__name__}: {first_line(error or Exception())}. Use "
        "fxsparse.save_weights, which keeps the model's own code."
    ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep export from printing partial graphs and inequalities that it gives up on: an error says enough."""
    shapes = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = shapes.level
    shapes.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        shapes.setLevel(level)


def _notes(exported: ExportedProgram) -> tuple[str, ...]:
    """Say which sizes and values of the inputs the program serves alone."""
    notes = []
    specs = exported.graph_signature.input_specs
    given = {spec.arg.name for spec in specs if spec.kind == InputKind.USER_INPUT}
    for node in exported.graph.nodes:
        if node.op != "placeholder" or node.name not in given:
            continue
        value = node.meta["val"]
        if not isinstance(value, Tensor):
            notes.append(f"Saved with '{node.name}' = {value!r}: the loaded model always computes with that value.")
            continue
        sizes = [_fixed(size) for size in value.shape]
        if len(sizes) > 1 and sizes[0] is not None:
            notes.append(f"The saved graph serves '{node.name}' of batch size {sizes[0]} only.")
        if len(sizes) == 4 and sizes[2:] != [None, None]:
            area = " x ".join("any" if size is None else str(size) for size in sizes[2:])
            notes.append(f"The saved graph serves '{node.name}' of height and width {area} only.")
    return tuple(notes)


def _fixed(size: int | SymInt) -> int | None:
    """Return the one value that a size may have, or None.

    Export does not always put the number in the place of a size that its guards fix: so the guards are asked.
    """
    if is_concrete_int(size):
        return int(size)
    assert isinstance(size, SymInt)
    hint = size.node.hint
    return hint if hint is not None and statically_known_true(size == hint) else None


def _training_notes(gm: GraphModule) -> tuple[str, ...]:
    names = [
        str(node.target)
        for node in gm.graph.nodes
        if node.op == "call_module" and behaves_otherwise_in_training(gm.get_submodule(str(node.target)))
    ]
    if not names:
        return ()
    shown = ", ".join(f"'{name}'" for name in names[:3]) + (", ..." if len(names) > 3 else "")
    return (f"Saved in evaluation mode: {shown} (dropout, batch norm) stay so when the loaded model trains.",)


def behaves_otherwise_in_training(module: nn.Module) -> bool:
    """Tell whether a module that a graph calls computes something else in training mode."""
    return any(isinstance(part, _IN_TRAINING) for part in module.modules())


def _batches_of_two(inputs: ExampleInputs) -> ExampleInputs:
    """Make each batch at least two: torch.export treats sizes of 0 and 1 as constants."""

    def larger(value: Tensor) -> Tensor:
        few = value.dim() > 1 and value.shape[0] < 2
        return value.new_zeros((2, *value.shape[1:])) if few else value

    return ExampleInputs(*pytree.tree_map_only(Tensor, larger, (inputs.args, inputs.kwargs)))


def _read_marks(exported: ExportedProgram) -> tuple[dict[str, str], dict[str, str]]:
    """Return what the marks of a program say (see `Program`), and erase them."""
    values: dict[str, str] = {}
    owners: dict[str, str] = {}
    since: list[Node] = []
    for node in list(exported.graph.nodes):
        if node.target is _MARK:
            tensors, source = node.args
            owners |= {other.name: source for other in since}
            if tensors:
                values[source] = tensors[0].name
            since = []
            exported.graph.erase_node(node)
        elif node.target is torch.ops.aten._assert_tensor_metadata.default:
            # They assert the dtypes of the example run, which autocast and .half() change rightly.
            exported.graph.erase_node(node)
        elif node.op != "placeholder":
            since.append(node)
    return values, {**owners, **{node.name: "output" for node in since}}


def _stripped(exported: ExportedProgram, groups: list[list[str]]) -> ExportedProgram:
    """Build a program anew with nothing but what it computes: the rest names files and classes of this machine."""
    for node in exported.graph.nodes:
        node.meta = {"val": node.meta["val"]} if "val" in node.meta else {}
    exported.graph_module.meta.clear()
    state = dict(exported.state_dict)
    retie(state, groups)
    stripped = ExportedProgram(
        exported.graph_module,
        exported.graph,
        exported.graph_signature,
        state,
        exported.range_constraints,
        [_plain_outputs(exported.module_call_graph[0])],
        None,
        exported.constants,
        verifiers=exported.verifiers,
    )
    stripped._guards_code = []  # code that torch would run on load; the loaded model has no guards anyway
    return stripped


def _plain_outputs(entry: ModuleCallEntry) -> ModuleCallEntry:
    """Return the root's calling convention with plain lists and dicts in the place of those that torch.fx keeps."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict) and type(value) in (dict, immutable_dict):
            return {key: plain(item) for key, item in value.items()}
        if type(value) in (tuple, list, immutable_list):
            return tuple(map(plain, value)) if isinstance(value, tuple) else list(map(plain, value))
        return value

    signature = entry.signature
    assert signature is not None
    leaves = list(range(signature.out_spec.num_leaves))
    _, spec = pytree.tree_flatten(plain(pytree.tree_unflatten(leaves, signature.out_spec)))
    return dataclasses.replace(entry, signature=dataclasses.replace(signature, out_spec=spec))


def pad_before(node: Node, site: sites.ConvSite) -> Node | None:
    """Return the pad that belongs to a vanilla site's node, or None."""
    if node.target is torch.ops.fxsparse.conv2d.default:
        return None
    pad = node.args[0] if vanilla.split_padding(site.padding, site.padding_mode)[0] else None
    return pad if isinstance(pad, Node) else None
