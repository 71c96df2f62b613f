"""`fxsparse.prune`: a dense model in, one that is fast in blocks out."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxsparse.errors import FxsparseError
from fxsparse.inputs import ExampleInputs
from fxsparse.masks import bake
from fxsparse.pruning import costs as pricing
from fxsparse.pruning import ranks, refit
from fxsparse.pruning.group_columns import GroupColumns, mask_tensor
from fxsparse.pruning.layers import Masks, conv_layers, kept_share
from fxsparse.pruning.refill import run as call
from fxsparse.pruning.result import LayerRow, Pruned, PruneReport
from fxsparse.pruning.rounds import Round, Rounds
from fxsparse.pruning.settings import PruneSettings, read_budget
from fxsparse.pruning.strips import LayerCost, Strips, choose, mask_of, row_groups
from fxsparse.regrouping.weight_matrix import BoolArray, FloatArray, IntArray

_FEWEST_ROWS = 8  # rows of a convolution group: below, the lanes of a block stay empty and nothing is gained
_NARROW = 96  # rows from which on a group has 32 of them
_CORRECTIONS = 3  # trials of masks against a budget in milliseconds
_NEAR = 0.03  # how near to the budget such a trial must come


def prune(
    model: nn.Module,
    budget: float | str,
    data: Any = None,
    *,
    train: Callable[[nn.Module, Round], Any] | None = None,
    example_inputs: Any = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    early: Mapping[str, Tensor] | None = None,
    file: str | Path | None = None,
    settings: PruneSettings | None = None,
) -> Pruned:
    """Prune the convolutions of a model in blocks, to a budget of time.

    Without `train`, no labels and no training are needed: the weights that stay are fitted, layer by layer, so that
    each layer gives what the dense one gives on a few hundred inputs; minutes, even for a ResNet-50. With `train`,
    pruning goes in rounds and `train` is called in each; that costs a training a round and reaches further.

    Args:
        model: trained; not changed.
        budget: a share of the dense model's time, in (0, 1), or milliseconds as "2.5 ms". Where no time can be
            measured, or `settings.cost` is "macs", a share of the multiply-adds of its convolutions.
        data: unlabelled inputs, as those of the training: a tensor of images, or batches, each a tensor, a tuple of
            arguments or a dict of keyword arguments. Needed without `train`.
        train: `train(model, round)` trains the model in place; pruned weights stay zero whatever the optimizer.
            `round.save` and `round.restore` make it resumable (see `fxsparse.pruning.Rounds`).
        example_inputs: of the call to be made fast, as for `fxsparse.convert`; the batch size counts. None takes one
            image of `data`.
        forward: `forward(model, batch)` calls the model, where a batch is none of the above.
        early: with `settings.rewind`, the state dict to rewind to; None rewinds to the weights that it came with.
        file: with `train`, the checkpoint to go on from, or to write.
        settings: everything else.

    Returns:
        The pruned model, its masks and a report. `fxsparse.convert(pruned.model, pruned.masks, ...)` makes it fast.

    Raises:
        FxsparseError: an argument cannot be, the model has nothing to prune, or the budget cannot be kept.
    """
    return _Pruner(model, budget, data, train, example_inputs, forward, early, file, settings).run()


class _Pruner:
    """One call of `prune`."""

    def __init__(
        self,
        model: nn.Module,
        budget: float | str,
        data: Any,
        train: Callable[[nn.Module, Round], Any] | None,
        example_inputs: Any,
        forward: Callable[[nn.Module, Any], Any] | None,
        early: Mapping[str, Tensor] | None,
        file: str | Path | None,
        settings: PruneSettings | None,
    ) -> None:
        self.start = time.perf_counter()
        self.settings = settings or PruneSettings()
        self.share, self.target_ms = read_budget(budget)
        self.forward = forward or call
        self.train, self.early, self.file = train, early, file
        if train is None and (early is not None or file is not None):
            raise FxsparseError("early and file are for pruning with training. Give train, or leave them out.")
        self.model = bake(model, None).model.eval()
        self.batch = None if data is None else _batch(data, self.settings.samples)
        if self.batch is None and train is None:
            raise FxsparseError(
                "There are neither data nor train. Give some hundred unlabelled inputs, or a function that trains."
            )
        self.inputs = self._inputs(example_inputs)
        convs = conv_layers(self.model, self.settings.include, self.settings.exclude)
        self.reasons = {name: _why_dense(conv) for name, conv in convs.items()}
        self.layers = {name: conv for name, conv in convs.items() if not self.reasons[name]}
        if not self.layers:
            raise FxsparseError(f"No convolution can be pruned: {next(iter(self.reasons.values()))}")

    def run(self) -> Pruned:
        settings = self.settings
        energy = self._energy()
        labels = {
            name: row_groups(energy[name], conv.groups, self._group_rows(conv), settings.partitioner, settings.seed)
            for name, conv in self.layers.items()
        }
        costs = self._costs(labels)
        budget = self._budget(costs)
        strips = {name: Strips.of(energy[name], labels[name], costs.layers[name]) for name in self.layers}
        allowed, measured = self._calibrated(strips, budget, costs)
        chosen = choose(strips, allowed)  # refuses what cannot be kept, before any training
        if self.train is None:
            masks = self._without_training(strips, chosen)
        else:
            masks = self._with_training(labels, costs, allowed)
        return Pruned(self.model.eval(), masks, self._report(masks, costs, budget, measured))

    def _inputs(self, example_inputs: Any) -> ExampleInputs:
        found = ExampleInputs.of(example_inputs, self.model)
        if found is None:
            if self.batch is None:
                raise FxsparseError("There is no input to measure on. Give example_inputs or data.")
            one = refit.first(self.batch, 1)
            if isinstance(one, Mapping):
                return ExampleInputs((), dict(one))
            found = ExampleInputs(tuple(one) if isinstance(one, (tuple, list)) else (one,), {})
        return found

    def _energy(self) -> dict[str, FloatArray]:
        """|w|^2, and without training times E[x^2]."""
        squares = {n: refit.as_numpy(conv.weight.flatten(1)) ** 2 for n, conv in self.layers.items()}
        if self.train is not None:
            return squares
        sizes = refit.moments(self.model, list(squares), self.batch, self.forward, self.settings.seed)
        return {name: square * sizes[name] for name, square in squares.items()}

    def _group_rows(self, conv: nn.Conv2d) -> int:
        each = conv.out_channels // conv.groups
        return self.settings.group_rows or (32 if each >= _NARROW else 16)

    def _costs(self, labels: Mapping[str, IntArray]) -> pricing.Costs:
        settings = self.settings

        def found() -> Any:
            return dataclasses.asdict(
                pricing.measure(
                    self.model,
                    self.inputs,
                    labels,
                    source=settings.cost,
                    budget_s=settings.calibrate_s,
                    progress=settings.progress,
                )
            )

        values = ranks.from_first_json(found)  # one device's prices for all ranks
        values["layers"] = {name: LayerCost(**cost) for name, cost in values["layers"].items()}
        return pricing.Costs(**{**values, "notes": tuple(values["notes"])})

    def _budget(self, costs: pricing.Costs) -> float:
        """Return what the whole model may cost."""
        if self.target_ms is not None:
            if costs.unit != "ms":
                raise FxsparseError(
                    f"A budget in milliseconds needs measured times. {' '.join(costs.notes)} Give a share."
                )
            return self.target_ms
        assert self.share is not None
        return self.share * costs.total

    def _calibrated(
        self, strips: Mapping[str, Strips], budget: float, costs: pricing.Costs
    ) -> tuple[float, float | None]:
        """Return what the layers may cost so that the model keeps its budget, and what it took measured.

        A share is one of the sum of the prices. Against milliseconds masks are tried, and the limit is moved by
        what the trial shows, since layers that run in one call save what the sum does not know. Only masks matter for
        speed, so nothing is fitted or trained for it.
        """
        allowed = budget - costs.rest
        if self.target_ms is None:
            return allowed, None

        def trial(limit: float) -> float:
            chosen = choose(strips, limit)
            masks = {n: mask_tensor(mask_of(strips[n], chosen[n], c.weight.shape), c) for n, c in self.layers.items()}
            return pricing.model_ms(self.model, masks, self.inputs, self.settings.calibrate_s)

        least = sum(s.cost.of(float(s.sizes.sum()), s.size) for s in strips.values()) * (1 + 1e-9)

        def found() -> list[float]:
            limit = max(allowed, least)
            best = (limit, trial(limit))
            for _ in range(_CORRECTIONS - 1):
                limit, ms = best
                if abs(ms - budget) <= _NEAR * budget or (limit <= least and ms > budget):
                    break
                limit = max(limit + budget - ms, limit / 2, least)
                best = min(best, (limit, trial(limit)), key=lambda tried: abs(tried[1] - budget))
            return list(best)

        limit, ms = ranks.from_first_json(found)
        if limit <= least and ms > budget * (1 + _NEAR):
            raise FxsparseError(
                f"The budget of {budget:.4g} ms cannot be kept: with the least that every layer keeps, the model takes "
                f"{ms:.4g} ms. Raise the budget; {costs.rest:.4g} ms are not in the layers that may be pruned."
            )
        return limit, ms

    def _without_training(self, strips: Mapping[str, Strips], chosen: Mapping[str, BoolArray]) -> Masks:
        wanted = {}
        for name, columns in chosen.items():
            if not columns.all():
                area = int((columns * strips[name].sizes[:, None]).sum())
                wanted[name] = refit.Wanted(strips[name].labels, area)
        options = {"ridge": self.settings.ridge, "seed": self.settings.seed, "progress": self.settings.progress}
        return refit.refit(self.model, wanted, self.batch, self.forward, **options)  # type: ignore[arg-type]

    def _with_training(self, labels: Mapping[str, IntArray], costs: pricing.Costs, allowed: float) -> Masks:
        assert self.train is not None
        dense = sum(cost.dense for cost in costs.layers.values())
        share = allowed / dense
        count = self.settings.rounds or max(1, round(np.log2(1 / share)))
        rule = GroupColumns(labels, costs.layers, tuple(dense * share ** ((i + 1) / count) for i in range(count)))
        exact = tuple(f"re:{re.escape(name)}" for name in self.layers)
        rounds = Rounds(
            self.model,
            rule,
            count,
            rewind=self.settings.rewind,
            trained=True,
            early=self.early,
            file=self.file,
            include=exact,
        )
        for step in rounds:
            self.train(self.model, step)
        return {name: mask for name, mask in rounds.masks.items() if not bool(mask.all())}

    def _report(self, masks: Masks, costs: pricing.Costs, budget: float, measured: float | None) -> PruneReport:
        rows, expected = [], costs.rest
        for name, reason in self.reasons.items():
            weight = self.model.get_submodule(name).get_parameter("weight")
            kept = 1.0 if name not in masks else float(masks[name].float().mean())
            if reason:
                rows.append(LayerRow(name, tuple(weight.shape), kept, 0.0, 0.0, reason))
                continue
            price = costs.layers[name]
            cost = price.of(kept * weight.numel(), weight.numel())
            expected += cost
            why = "" if name in masks else "no faster in blocks within this budget"
            rows.append(LayerRow(name, tuple(weight.shape), kept, price.dense, cost, why))
        every = {n: masks.get(n, torch.ones_like(c.weight, dtype=torch.bool)) for n, c in self.layers.items()}
        notes = list(costs.notes)
        if measured is not None and measured > budget * (1 + _NEAR):
            notes.append(
                f"The budget of {budget:.3f} ms was not reached: the masks that came nearest took {measured:.3f} ms."
            )
        seconds = time.perf_counter() - self.start
        return PruneReport(
            tuple(rows),
            costs.unit,
            costs.total,
            budget,
            expected,
            measured,
            kept_share(every),
            seconds,
            tuple(notes),
        )


def _why_dense(conv: nn.Conv2d) -> str:
    each = conv.out_channels // conv.groups
    if each < _FEWEST_ROWS:
        return f"{each} rows in each convolution group: blocks need {_FEWEST_ROWS}"
    return ""


def _batch(data: Any, samples: int) -> Any:
    """Return up to `samples` inputs as one batch."""
    if isinstance(data, Tensor):
        data = [data]
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise FxsparseError(f"data is a {type(data).__name__}. Give a tensor of images, or an iterable of batches.")
    taken, count = [], 0
    for batch in data:
        taken.append(batch)
        count += refit.images(batch)
        if count >= samples:
            break
    if not count:
        raise FxsparseError("data holds no input. Give some hundred.")
    return refit.first(refit.concatenated(taken), samples)
