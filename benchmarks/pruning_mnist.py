"""MNIST with 1,000 training images, a VGG-like and a ResNet-like net: accuracy against measured speed.

Iterative magnitude pruning (30 % of the remaining weights a round, rewinding to the end of epoch 1) gives the masks of
single weights; refill and the paper's regroup (Mt-KaHyPar, columns by count) remake them and train again from the same
weights. Ours are group-column masks at fixed shares of the multiply-adds: with training in rounds, rewinding or going
on; without any training; and this distilled from the dense net, on images without their labels. The stem is left alone
by all.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxsparse
from benchmarks import pruning_nets as nets
from benchmarks.pruning_cells import Cells, Masks, macs, speed, spread, table
from fxsparse import pruning
from fxsparse.demo.data import Images
from fxsparse.demo.train import accuracy, logits_of, train
from fxsparse.inputs import ExampleInputs
from fxsparse.pruning.costs import count
from fxsparse.pruning.group_columns import GroupColumns
from fxsparse.pruning.layers import conv_layers
from fxsparse.pruning.strips import row_groups

EPOCHS, REWIND = 8, 1
RATE = 0.3
IMP_ROUNDS = 12
IMP_LEVELS = (4, 6, 8, 10, 11, 12)  # rounds whose masks are remade
SHARES = (0.30, 0.19, 0.126, 0.087, 0.059)  # of the multiply-adds
FIRST_SHARE = 0.55
BATCHES = (64, 1)
DISTIL_EPOCHS, DISTIL_RATE = 16, 0.015
WITHOUT_TRAINING = ("ours, no training", "ours, distilled")
METHODS = ("imp", "refill", "paper", "ours", "ours, no rewind", *WITHOUT_TRAINING)


class Experiment:
    """One net and seed: the dense net, trained, and its early weights."""

    def __init__(self, net: str, seed: int, cells: Cells, folder: Path | None, device: str) -> None:
        self.net, self.seed, self.cells = net, seed, cells
        self.images, self.select_x, self.select_y = nets.images(seed, folder, device)
        self.test_x = self.images.centred()
        self.inputs = ExampleInputs((self.test_x[:1],), {})
        self.model = nets.build(net, seed).to(device)
        fit(self.model, self.images, seed, range(REWIND))
        self.early = copy.deepcopy(self.model.state_dict())
        fit(self.model, self.images, seed, range(REWIND, EPOCHS))
        self.dense = copy.deepcopy(self.model.state_dict())
        self.layers = conv_layers(self.model, exclude=(nets.stem(net),))

    def name(self, method: str, level: Any) -> str:
        return f"mnist-{self.net}-{self.seed}-{method.replace(', ', '-').replace(' ', '-')}-{level}"

    def add(self, method: str, level: Any, model: nn.Module, masks: Masks) -> None:
        """Test a model and keep what it shows."""
        self.cells.add(
            self.name(method, level),
            masks,
            net=self.net,
            seed=self.seed,
            method=method,
            level=level,
            weights=pruning.kept_share(masks),
            macs=macs(model, masks, self.inputs),
            test=100 * accuracy(logits_of(model.eval(), self.test_x), self.images.test_y),
            select=100 * accuracy(logits_of(model, self.select_x), self.select_y),
        )

    def reset(self, state: dict[str, Tensor]) -> nn.Module:
        self.model.load_state_dict(state)
        return self.model

    def retrain(self, masks: Masks) -> nn.Module:
        """Train from the early weights under masks."""
        model = self.reset(self.early)
        with pruning.hold(model, masks):
            fit(model, self.images, self.seed, range(REWIND, EPOCHS))
        return model

    def run(self, methods: tuple[str, ...]) -> None:
        everything = {name: torch.ones_like(conv.weight, dtype=torch.bool) for name, conv in self.layers.items()}
        if not self.cells.has(self.name("dense", 0)):
            self.add("dense", 0, self.reset(self.dense), everything)
        if {"imp", "refill", "paper"} & set(methods):
            self.imp(methods)
        for method, rewind in (("ours", True), ("ours, no rewind", False)):
            if method in methods and not self.cells.has(self.name(method, SHARES[-1])) and not self.cells.is_over:
                self.ours(method, rewind)
        for share in SHARES:
            missing = {m for m in WITHOUT_TRAINING if m in methods and not self.cells.has(self.name(m, share))}
            if missing and not self.cells.is_over:
                self.without_training(share, missing)

    def imp(self, methods: tuple[str, ...]) -> None:
        if not self.cells.has(self.name("imp", IMP_ROUNDS)) and not self.cells.is_over:
            model = self.reset(self.dense)
            exclude = (nets.stem(self.net),)
            rounds = pruning.Rounds(
                model, pruning.Magnitude(RATE), IMP_ROUNDS, trained=True, early=self.early, exclude=exclude
            )
            for step in rounds:
                fit(model, self.images, self.seed, range(REWIND, EPOCHS))
                if step.number in IMP_LEVELS:
                    self.add("imp", step.number, model, step.masks)
        target = fxsparse.Target(partitioner="hypergraph")
        for level in IMP_LEVELS:
            if not self.cells.has(self.name("imp", level)):
                continue
            masks = {n: m.to(self.test_x.device) for n, m in self.cells.masks(self.name("imp", level)).items()}
            if "paper" in methods and not self.cells.has(self.name("paper", level)) and not self.cells.is_over:
                regrouped = fxsparse.regroup_masks(masks, target)
                self.add("paper", level, self.retrain(regrouped), regrouped)
            if "refill" in methods and not self.cells.has(self.name("refill", level)) and not self.cells.is_over:
                channels = pruning.refill(self.reset(self.dense), masks)
                self.add("refill", level, self.retrain(channels), channels)

    def ours(self, method: str, rewind: bool) -> None:
        model = self.reset(self.dense)
        labels = {}
        for name, conv in self.layers.items():
            energy = conv.weight.detach().double().flatten(1).cpu().numpy() ** 2
            labels[name] = row_groups(energy, 1, 32 if conv.out_channels >= 96 else 16, "consecutive", 0)
        costs = count(model, self.inputs, list(self.layers)).layers
        total = sum(cost.dense for cost in costs.values())
        shares = (FIRST_SHARE, *SHARES)
        rule = GroupColumns(labels, costs, tuple(total * share for share in shares))
        rounds = pruning.Rounds(
            model,
            rule,
            len(shares),
            trained=True,
            rewind=rewind,
            early=self.early,
            exclude=(nets.stem(self.net),),
        )
        for step in rounds:
            fit(model, self.images, self.seed, range(REWIND, EPOCHS))
            if step.number > 1:
                self.add(method, shares[step.number - 1], model, step.masks)

    def without_training(self, share: float, methods: Collection[str]) -> None:
        """Prune once, and distil that for the second of the methods."""
        model = self.reset(self.dense)
        costs = count(model, self.inputs, list(self.layers))
        total = sum(cost.dense for cost in costs.layers.values())
        inside = slice(self.images.shift, self.images.shift + self.images.size)
        data = self.images.train_x[:, :, inside, inside].contiguous()
        settings = fxsparse.PruneSettings(cost="macs", samples=len(data), exclude=(nets.stem(self.net),))
        pruned = fxsparse.prune(model, (share * total + costs.rest) / costs.total, data, settings=settings)
        masks = {n: torch.ones_like(c.weight, dtype=torch.bool) for n, c in self.layers.items()} | pruned.masks
        for method in WITHOUT_TRAINING:
            if method not in methods:
                continue
            if method == "ours, distilled":
                self.distil(pruned.model, pruned.masks)
            self.add(method, share, pruned.model, masks)

    def distil(self, model: nn.Module, masks: Masks) -> None:
        """Train a pruned net to answer as the dense one does."""
        loss = pruning.Distillation(copy.deepcopy(self.reset(self.dense)))
        with pruning.hold(model, masks):
            train(
                model,
                self.images,
                epochs=range(DISTIL_EPOCHS),
                of=DISTIL_EPOCHS,
                seed=self.seed,
                loss=lambda logits, x, y: loss(logits, x),
                peak=DISTIL_RATE,
            )


def fit(model: nn.Module, images: Images, seed: int, epochs: range) -> None:
    """Train some epochs of the schedule that all methods have."""
    train(model, images, epochs=epochs, of=EPOCHS, seed=seed, label="training")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, or measure, what is not there yet; print the table."""
    cells = Cells(arguments.state, arguments.seconds)
    methods = tuple(arguments.methods or METHODS)
    if arguments.measure:
        _measure(cells, arguments.nets, arguments.seeds[0], arguments.data)
    else:
        for seed in arguments.seeds:
            for net in arguments.nets:
                if not cells.is_over:
                    Experiment(net, seed, cells, arguments.data, arguments.device).run(methods)
    return _summary(cells)


def _measure(cells: Cells, chosen: list[str], seed: int, folder: Path | None) -> None:
    """Measure the speed of every cell of one seed."""
    x = nets.images(seed, folder)[0].centred()
    for batch, net in itertools.product(BATCHES, chosen):
        for name, cell in cells.all(f"mnist-{net}-{seed}-").items():
            if cell["method"] == "dense" or f"batch {batch}" in cell or cells.is_over:
                continue
            found = cells.same_masks(name, f"batch {batch}")
            if found is None:
                found = speed(nets.build(net, seed).eval(), cells.masks(name), ExampleInputs((x[:batch],), {}), 1.0)
            cells.update(name, {f"batch {batch}": found})


def _summary(cells: Cells) -> dict[str, Any]:
    """Print means over the seeds with their spread."""
    found = cells.all("mnist-")
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for cell in found.values():
        groups.setdefault((cell["net"], cell["method"], str(cell["level"])), []).append(cell)
    rows, kept = [], []
    for (net, method, level), group in groups.items():
        shares = [100 * cell["macs"] for cell in group]
        speeds = {b: [c[f"batch {b}"]["speed"] for c in group if f"batch {b}" in c] for b in BATCHES}
        order = (net, ("dense", *METHODS).index(method), -sum(shares) / len(shares))
        tests = [cell["test"] for cell in group]
        cells_of = (
            net,
            method,
            spread([100 * cell["weights"] for cell in group]),
            spread(shares),
            spread(tests),
            spread([cell["select"] for cell in group]),
            str(len(group)),
            *(f"{speeds[b][0]:.2f}x" if speeds[b] else "-" for b in BATCHES),
        )
        rows.append((order, cells_of))
        kept.append({"net": net, "method": method, "level": level, "cells": group})
    speeds_of = (f"batch {batch}" for batch in BATCHES)
    headers = ("net", "method", "weights %", "MACs %", "test %", "selection %", "seeds", *speeds_of)
    print(table(headers, [row for _, row in sorted(rows)]))
    return {"groups": kept}
