"""Writes what run_model reads: an AOTInductor package of a converted model, its inputs, and what they must give.

python export.py FOLDER [--device cuda]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.utils.prune as prune
from torch import nn

import fxsparse


def pruned_net() -> nn.Module:
    """Return a small VGG for [N, 3, 32, 32] whose convolutions keep 10 % of their weights; yours goes here."""
    layers: list[nn.Module] = []
    for channels, out_channels in ((3, 32), (32, 64), (64, 128)):
        conv = nn.Conv2d(channels, out_channels, 3, padding=1)
        layers += [conv, nn.BatchNorm2d(out_channels), nn.ReLU(), nn.MaxPool2d(2)]
        prune.l1_unstructured(conv, "weight", amount=0.9)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4 * 4, 10)).eval()


def main() -> None:
    """Convert, export with a dynamic batch, compile, and write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    # With example_inputs=(images,) it measures, and keeps convolutions dense where sparse does not pay. Here the cost
    # model decides, so that the package calls the operators on every machine.
    fast = fxsparse.freeze(fxsparse.convert(pruned_net().to(arguments.device)))
    print(fast.report)

    images = torch.randn(8, 3, 32, 32, device=arguments.device)
    with torch.no_grad():
        expected = fast(images)
        program = torch.export.export(fast, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    metadata = {
        "input_shape": ",".join(map(str, images.shape[1:])),
        "output_shape": ",".join(map(str, expected.shape[1:])),
    }
    torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(arguments.folder / "model.pt2"),
        inductor_configs={"aot_inductor.metadata": metadata},
    )
    images.cpu().numpy().tofile(arguments.folder / "input.f32")
    expected.cpu().numpy().tofile(arguments.folder / "expected.f32")


if __name__ == "__main__":
    main()
