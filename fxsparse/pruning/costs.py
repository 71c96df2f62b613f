"""What every convolution costs dense and in blocks: measured on the device, or counted in multiply-adds.

Measured means: the model is converted under trial masks of two areas, calibrated as usual, and a line is put through
the two sparse times of each layer. So the prices are those of the kernels that will run, at the shapes that they get.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxsparse.errors import FxsparseError
from fxsparse.inputs import ExampleInputs, unchanged_state
from fxsparse.ops.library import has_kernel
from fxsparse.pruning.strips import LayerCost

log = logging.getLogger(__name__)

SOURCES = ("measured", "macs")
_AREAS = (0.12, 0.4)  # of the trial masks
_LEAST_SLOPE = 0.3  # of the mean price of a weight: two noisy times must not make weights free


@dataclasses.dataclass(frozen=True)
class Costs:
    """The costs of a model.

    Attributes:
        unit: "ms" or "MACs".
        total: of the dense model, one call.
        rest: of what is not in `layers`: whatever is pruned, this stays.
        layers: by module name.
        notes: what the reader should know.
    """

    unit: str
    total: float
    rest: float
    layers: dict[str, LayerCost]
    notes: tuple[str, ...] = ()


def measure(
    model: nn.Module,
    inputs: ExampleInputs,
    groups: Mapping[str, Any],
    *,
    source: str = "measured",
    budget_s: float | None = None,
    progress: bool = False,
) -> Costs:
    """Return what the layers cost.

    Args:
        model: in evaluation mode; not changed.
        inputs: of the call to be made faster: the batch size counts.
        groups: the layers by name, each with the row group of every row, int64 [O].
        source: "measured" or "macs". Where nothing can be measured, multiply-adds are counted, with a note.
        budget_s: seconds for each of the two calibrations; None as in `fxsparse.calibrate`.
        progress: show bars.

    Raises:
        FxsparseError: the source is unknown, or a layer is not called on these inputs.
    """
    if source not in SOURCES:
        raise FxsparseError(f"cost='{source}' is not known. Choose one of {', '.join(SOURCES)}.")
    counted = count(model, inputs, list(groups))
    if source == "macs":
        return counted
    device = next(model.parameters()).device
    if not has_kernel(device):
        note = f"There is no compiled kernel for '{device}' here, so the budget is counted in multiply-adds."
        return dataclasses.replace(counted, notes=(note,))
    try:
        return _measured(model, inputs, groups, counted, budget_s, progress)
    except FxsparseError as error:
        log.info("No measured cost: %s", error)
        note = f"The model cannot be measured, so the budget is counted in multiply-adds: {error}"
        return dataclasses.replace(counted, notes=(note,))


def count(model: nn.Module, inputs: ExampleInputs, names: list[str]) -> Costs:
    """Count the multiply-adds of all plain convolutions, and those of the named ones for each weight."""
    macs: dict[str, float] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Conv2d, args: Any, output: Tensor) -> None:
            positions = output.numel() / module.out_channels
            macs[name] = macs.get(name, 0.0) + positions * module.weight.numel()

        return hook

    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    handles = [module.register_forward_hook(note(name)) for name, module in convs.items()]
    try:
        with unchanged_state(model), torch.no_grad():
            inputs.run(model)
    finally:
        for handle in handles:
            handle.remove()
    for name in names:
        if name not in macs:
            raise FxsparseError(f"'{name}' is not called on the example inputs. Exclude it, or give others.")
    layers = {name: LayerCost(macs[name], 0.0, macs[name] / convs[name].weight.numel()) for name in names}
    total = sum(macs.values())
    return Costs("MACs", total, total - sum(macs[name] for name in names), layers)


def model_ms(model: nn.Module, masks: Mapping[str, Tensor], inputs: ExampleInputs, budget_s: float | None) -> float:
    """Convert and calibrate a model under masks; return the measured milliseconds of a call."""
    report = _converted(model, masks, inputs, budget_s, False).report
    assert report.model_ms is not None
    return float(report.model_ms)


def trial_masks(model: nn.Module, groups: Mapping[str, Any], share: float) -> dict[str, Any]:
    """Return block lists that keep a share of every layer: as many columns in each group, drawn at random."""
    generator = np.random.default_rng(0)
    masks: dict[str, Any] = {}
    for name, labels in groups.items():
        weight = model.get_submodule(name).get_parameter("weight")
        columns = weight[0].numel()
        kept = max(1, round(share * columns))
        masks[name] = [
            (np.flatnonzero(labels == g), np.sort(generator.choice(columns, kept, replace=False)))
            for g in range(int(labels.max()) + 1)
        ]
    return masks


def _measured(
    model: nn.Module,
    inputs: ExampleInputs,
    groups: Mapping[str, Any],
    counted: Costs,
    budget_s: float | None,
    progress: bool,
) -> Costs:
    found: list[dict[str, tuple[float, float]]] = []
    wholes = []
    for share in _AREAS:
        report = _converted(model, trial_masks(model, groups, share), inputs, budget_s, progress).report
        times: dict[str, tuple[float, float]] = {}
        for row in report.rows:  # a layer that is called twice has two rows
            if row.vanilla_ms is not None and row.sparse_ms is not None:
                dense, sparse = times.get(row.name, (0.0, 0.0))
                times[row.name] = (dense + row.vanilla_ms, sparse + row.sparse_ms)
        found.append(times)
        wholes.append(report.model_vanilla_ms)
    total = float(np.mean(wholes))
    layers, unmeasured = {}, []
    for name in groups:
        if any(name not in times for times in found):
            unmeasured.append(name)
            continue
        size = model.get_submodule(name).get_parameter("weight").numel()
        layers[name] = line(found[0][name][1], found[1][name][1], size, min(t[name][0] for t in found))
    if not layers:
        raise FxsparseError("no layer was measured sparse")
    rest = max(total - sum(cost.dense for cost in layers.values()), 0.0)
    notes: tuple[str, ...] = ()
    if unmeasured:
        rate = sum(cost.dense for cost in layers.values()) / sum(counted.layers[name].dense for name in layers)
        for name in unmeasured:  # priced by its multiply-adds, at the rate of the others, as it cannot gain
            dense = counted.layers[name].dense * rate
            layers[name] = LayerCost(dense, dense, 0.0)
            rest = max(rest - dense, 0.0)
        shown = ", ".join(f"'{name}'" for name in unmeasured[:3])
        notes = (f"{len(unmeasured)} layers have no sparse path, and stay dense: {shown}.",)
    return Costs("ms", total, rest, layers, notes)


def line(first_ms: float, second_ms: float, size: int, dense_ms: float) -> LayerCost:
    """Put a line through the times of a layer at the two trial areas."""
    low, high = (share * size for share in _AREAS)
    slope = max((second_ms - first_ms) / (high - low), _LEAST_SLOPE * second_ms / high)
    fixed = max((first_ms + second_ms - slope * (low + high)) / 2, 0.0)
    return LayerCost(dense_ms, fixed, slope)


def _converted(model: nn.Module, masks: Any, inputs: ExampleInputs, budget_s: float | None, progress: bool) -> Any:
    import fxsparse  # the whole compiler: not for those who only hold masks

    target = fxsparse.Target(partitioner="consecutive")
    settings = fxsparse.Settings(budget_s=budget_s, cache=False, progress=progress, target=target)
    return fxsparse.convert(model, masks, example_inputs=inputs, settings=settings)
