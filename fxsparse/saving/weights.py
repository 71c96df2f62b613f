"""`save_weights` and `load_weights`: the tensors of a converted model and how its convolutions run, without its code.

The code is the user's: the plain model that he builds is captured again by the same rung, so that it has the same
convolutions in the same order. They get the saved tensors, paths, packings and layouts; nothing is regrouped, packed or
measured again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

import fxsparse
from fxsparse import graph_module, json_values, layouts, sites
from fxsparse.calibration import applying
from fxsparse.inputs import ExampleInputs, remembered
from fxsparse.passes.fold_batch_norm import FOLDED_NORMS
from fxsparse.plan import Plan
from fxsparse.regrouping import Regrouping
from fxsparse.report import report_of
from fxsparse.saving import rebuilding, regroupings, safety, site_state, tensors, weights_file
from fxsparse.saving.rebuilding import SavedGraph, SavedWeights

_REGROUPINGS = "fxsparse:regroupings"  # no parameter has such a name


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write the tensors of a converted model, its plan, its report and how its convolutions run, without its code.

    For models that `fxsparse.save` cannot keep as one graph, such as those of the capture rung `modules`; it takes all
    others too. The file is safetensors; there is no pickle in it.

    Args:
        model: what `fxsparse.convert` returned, in any mode, frozen or not; not changed.
        path: the file, by convention ending in .safetensors; replaced as a whole, or not at all.

    Raises:
        FxsparseError: the model was not converted, has tensors of a special class, or the file cannot be written.
    """
    report = report_of(model)
    named = rebuilding.tensors_of(model)
    plain = {name: tensors.alias(tensor) for name, tensor in named.items()}
    tied = {name: first for first, *others in tensors.tied(named) for name in others}
    known: list[Regrouping] = []
    graphs = {name: _describe(gm, known) for name, gm in applying.graphs(model).items()}
    stored = {name: tensor.detach().cpu() for name, tensor in plain.items() if name not in tied}
    content = regroupings.to_bytes(known)
    stored[_REGROUPINGS] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    weights_file.write(
        Path(path),
        stored,
        {
            "fxsparse": fxsparse.__version__,
            "torch": torch.__version__,
            "rung": report.rung,
            "folded": any(gm.meta.get(FOLDED_NORMS) for gm in applying.graphs(model).values()),
            "device": str(tensors.device_of(model)),
            "training": [name for name, module in model.named_modules() if module.training],
            "graphs": graphs,
            "tied": tied,
            "channels_last": [name for name, t in plain.items() if t.dim() == 4 and _is_last(t)],
            "inputs": _shapes(remembered(model, torch.device("meta"))),
            "plan": model.__dict__.get("plan", Plan()).to_dict(),
            "report": report.to_dict(),
        },
    )


def load_weights(path: str | Path, model: nn.Module, *, example_inputs: Any = None) -> nn.Module:
    """Make a converted model of a plain one and what `save_weights` wrote.

    Args:
        path: the file.
        model: the model as it was given to `fxsparse.convert`: of the same class, with any weights, in the same mode
            (`model.eval()`) and dtype; it is copied, never changed. The result is on its device.
        example_inputs: as for `fxsparse.convert`; only needed for a model that was captured by torch.export with
            inputs other than tensors.

    Returns:
        The converted model as it was when it was saved: paths, modes, layouts, plan, report; the same bits come out.
        Nothing is measured again.

    Raises:
        FxsparseError: the file cannot be read, is damaged, is no file of `save_weights`, or is of a newer version; or
            the model does not fit it: other convolutions, other tensors, other shapes or dtypes.
    """
    path = Path(path)
    header, stored = weights_file.read(path)
    with safety.reading(path):
        saved = _read(header.document, stored)
    inputs = ExampleInputs.of(example_inputs, model) or _zeros(saved.inputs, model)
    return rebuilding.rebuild(path, model, saved, inputs)


def _describe(gm: GraphModule, known: list[Regrouping]) -> dict[str, Any]:
    def number(regrouping: Regrouping | None) -> int | None:
        if regrouping is None:
            return None
        if not any(other is regrouping for other in known):
            known.append(regrouping)
        return next(i for i, other in enumerate(known) if other is regrouping)

    return {
        "sites": [site_state.to_dict(site, number(site.regrouping)) for _, site in sites.conv_sites(gm)],
        "moves": [dataclasses.asdict(move) for move in layouts.current(gm)],
        "laid_aside": [dataclasses.asdict(move) for move in graph_module.laid_aside(gm)],
    }


def _is_last(tensor: Tensor) -> bool:
    return layouts.layout_of(tensor) == "channels_last"


def _shapes(inputs: ExampleInputs | None) -> dict[str, Any] | None:
    """Describe inputs that are tensors alone; None where there are none, or other things."""
    if inputs is None or not all(isinstance(value, Tensor) for value in (*inputs.args, *inputs.kwargs.values())):
        return None

    def shape(value: Tensor) -> dict[str, Any]:
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}

    return {"args": [shape(v) for v in inputs.args], "kwargs": {name: shape(v) for name, v in inputs.kwargs.items()}}


def _zeros(inputs: ExampleInputs | None, model: nn.Module) -> ExampleInputs | None:
    """Make the inputs that a file describes."""
    if inputs is None:
        return None
    device = tensors.device_of(model)
    made = pytree.tree_map_only(
        Tensor, lambda t: torch.zeros(t.shape, dtype=t.dtype, device=device), (inputs.args, inputs.kwargs)
    )
    return ExampleInputs(*made)


def _read(document: Mapping[str, Any], stored: dict[str, Tensor]) -> SavedWeights:
    """Read what the file says besides its tensors."""
    content = stored.pop(_REGROUPINGS, torch.empty(0, dtype=torch.uint8))
    known = regroupings.from_bytes(content.numpy().tobytes())
    graphs = {
        name: SavedGraph(
            tuple(site_state.from_dict(site, f"graphs[{name!r}].sites[{i}]", known) for i, site in enumerate(values)),
            *rest,
        )
        for name, (values, *rest) in rebuilding.read_graphs(document.get("graphs"), "graphs").items()
    }
    fields = {name: value for name, value in document.items() if name not in ("format", "version", "graphs", "plan")}
    read = rebuilding.read_fields(fields, "")
    for alias, name in read["tied"].items():
        if name not in stored or alias in stored:
            raise json_values.Wrong(name, f"tied[{alias!r}]", "a tensor of the file, under another name")
        stored[alias] = stored[name]
    for name in read["channels_last"]:
        if name not in stored or stored[name].dim() != 4:
            raise json_values.Wrong(name, "channels_last", "names of tensors in four dimensions")
    return SavedWeights(graphs=graphs, tensors=stored, plan=Plan.from_dict(document.get("plan")), **read)
