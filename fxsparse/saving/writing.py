"""`save`: a converted model as one archive of torch.export, with plan, report and conv sites as data inside."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import secrets
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule
from torch.utils import _pytree as pytree

import fxsparse
from fxsparse import graph_module, layouts, sites
from fxsparse.errors import FxsparseError
from fxsparse.graph_module import ConvertedModule
from fxsparse.inputs import REMEMBERED, ExampleInputs, remembered
from fxsparse.plan import Plan
from fxsparse.regrouping import Regrouping
from fxsparse.report import report_of
from fxsparse.saving import regroupings, safety, site_state
from fxsparse.saving.program import behaves_otherwise_in_training, canonical, export
from fxsparse.saving.tensors import device_of
from fxsparse.saving.translation import Translation

GRAPH_META = ("fxsparse_dense_keys", "fxsparse_folded_norms")  # plain data about the dense model, see `checkpoints`
# Attributes that are saved as what they are; the last two are those of exported graphs.
_OWN = {"report", "plan", REMEMBERED, "_in_spec", "_out_spec"}


def save(model: nn.Module, path: str | Path, *, example_inputs: Any = None) -> None:
    """Write a converted model to one file, which `fxsparse.load` reads without the model's class.

    The file is a .pt2 archive of torch.export with the report, the plan and the state of every convolution inside, and
    without pickle. The loaded model computes the same to the bit, and everything works on it that works on this one:
    modes, calibration, `freeze`, `to_dense`, training, saving again. A convolution comes back in the mode that it is in
    now; in the mode CALIBRATION the first call after loading measures again.

    All sizes of the inputs stay variable where the model allows that, else the batch size, else none; the loaded
    model's report says which. What a graph cannot keep is an error, or a note in that report: dropout and batch norms
    that were not folded stay in evaluation mode, and inputs that are no tensors keep the value that they had.

    Args:
        model: what `fxsparse.convert` returned, captured as one graph; not changed.
        path: the file, by convention ending in .pt2; replaced as a whole, or not at all.
        example_inputs: as for `fxsparse.convert`; only needed where neither `convert` nor `calibrate` had any.

    Raises:
        FxsparseError: the model was not converted, or module by module (`save_weights` is for those); it has hooks, or
            attributes that are not JSON; it is on several devices; the inputs are not known; torch.export refuses it;
            or the file cannot be written.
    """
    report = report_of(model)
    if not isinstance(model, ConvertedModule):
        raise FxsparseError(
            f"This model was captured by the rung '{report.rung}': it is no single graph, which a .pt2 archive needs. "
            "Use fxsparse.save_weights(model, path), and fxsparse.load_weights(path, model) on the same model."
        )
    device = device_of(model)
    inputs = ExampleInputs.of(example_inputs, model) or remembered(model, device)
    if inputs is None:
        raise FxsparseError(
            "The model's inputs are not known, because it was converted without example inputs and not calibrated. "
            "Give them here: fxsparse.save(model, path, example_inputs=x)."
        )
    _refuse_training(model)
    attributes = _attributes(model)
    program = export(canonical(model), inputs, device)
    translation = Translation(program)
    known: list[Regrouping] = []
    plan: Plan = model.__dict__.get("plan", Plan())
    entries = tuple(dataclasses.replace(entry, moves=translation.moves(entry.moves)) for entry in plan.entries)
    state = {
        "class": type(model).__name__,
        "device": str(device),
        "training": model.training,
        "inputs": [_shape_of(leaf) for leaf in pytree.tree_leaves((inputs.args, inputs.kwargs))],
        "sites": {
            program.values[node.name]: site_state.to_dict(site, _number(site.regrouping, known))
            for node, site in sites.conv_sites(model)
        },
        "moves": [dataclasses.asdict(move) for move in translation.moves(layouts.current(model))],
        "laid_aside": [dataclasses.asdict(move) for move in translation.moves(graph_module.laid_aside(model))],
        "attributes": attributes,
        "meta": {key: model.meta[key] for key in GRAPH_META if key in model.meta},
    }
    notes = tuple(dict.fromkeys((*report.notes, *program.notes)))
    contents = {
        "extra/fxsparse/state.json": _json(state),
        "extra/fxsparse/plan.json": _json(Plan(entries).to_dict()),
        "extra/fxsparse/report.json": _json(dataclasses.replace(report, notes=notes).to_dict()),
        # Not below extra/, where torch.export.load reads text alone.
        "data/fxsparse/regroupings.safetensors": regroupings.to_bytes(known),
    }
    _write(Path(path), program.exported, contents)


def _refuse_training(model: GraphModule) -> None:
    """Refuse a model in training mode that computes otherwise there: a graph holds one behaviour."""
    for node in model.graph.nodes:
        if model.training and node.op == "call_module":
            module = model.get_submodule(str(node.target))
            if behaves_otherwise_in_training(module):
                raise FxsparseError(
                    f"The model is in training mode, and '{node.target}' ({type(module).__name__}) computes otherwise "
                    "there; a saved graph holds one behaviour. Call model.eval() first."
                )


def _attributes(model: GraphModule) -> dict[str, Any]:
    """Return the attributes that the user set on a model.

    Raises:
        FxsparseError: one is not what JSON can hold.
    """
    usual = set(ConvertedModule(nn.Module(), Graph()).__dict__) | _OWN
    found = {name: value for name, value in model.__dict__.items() if name not in usual}
    for name, value in found.items():
        try:
            kept = json.loads(json.dumps(value, allow_nan=False)) == value
        except (TypeError, ValueError, RecursionError):
            kept = False
        if not kept:
            raise FxsparseError(
                f"The model's attribute '{name}' is a {type(value).__name__}, which cannot be saved without pickle. "
                "Delete it, or make it of JSON values (strings, numbers, lists, dicts)."
            )
    return found


def _shape_of(leaf: Any) -> dict[str, Any] | None:
    if not isinstance(leaf, Tensor):
        return None
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype).removeprefix("torch.")}


def _number(regrouping: Regrouping | None, known: list[Regrouping]) -> int | None:
    """Return where a regrouping is in the list, which gets it if it is new: sites on one weight share it."""
    if regrouping is None:
        return None
    place = next((i for i, other in enumerate(known) if other is regrouping), len(known))
    if place == len(known):
        known.append(regrouping)
    return place


def _json(values: Any) -> bytes:
    return json.dumps(values, allow_nan=False).encode()


def _write(path: Path, exported: ExportedProgram, contents: dict[str, bytes]) -> None:
    """Write the archive beside its place, check it as `load` would, and put it there.

    Raises:
        FxsparseError: the file cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            with temporary.open("wb") as file, warnings.catch_warnings():
                # Of weights in channels_last, whose memory is written and read back as it is.
                warnings.filterwarnings("ignore", "No complete tensor found")
                torch.export.save(exported, file)
            _append(temporary, contents)
            _check(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise FxsparseError(
            f"The model cannot be written to '{path}' ({error}). Name a file in a folder that exists."
        ) from error


def _check(path: Path) -> None:
    """Refuse to write what `load` would refuse to read.

    Raises:
        FxsparseError: the graph has an operator or a name that no file may have.
    """
    try:
        safety.check(path)
    except FxsparseError as error:
        raise FxsparseError(
            f"The model cannot be saved: {error.__cause__ or error}, and fxsparse.load takes only what is known to be "
            "harmless. Use fxsparse.save_weights, which keeps the model's own code."
        ) from error


def _append(path: Path, contents: dict[str, bytes]) -> None:
    """Add entries to an archive, and last the manifest, with the digests of all others."""
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
        root = archive.namelist()[0].partition("/")[0]
        for name, content in contents.items():
            archive.writestr(f"{root}/{name}", content)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
        digests = {}
        for name in archive.namelist():
            digest = hashlib.sha256()
            with archive.open(name) as entry:
                while part := entry.read(1 << 20):
                    digest.update(part)
            digests[name.removeprefix(f"{root}/")] = digest.hexdigest()
        manifest = {
            "format": safety.FORMAT,
            "version": safety.VERSION,
            "fxsparse": fxsparse.__version__,
            "torch": torch.__version__,
            "sha256": digests,
        }
        archive.writestr(f"{root}/extra/fxsparse/manifest.json", _json(manifest))
