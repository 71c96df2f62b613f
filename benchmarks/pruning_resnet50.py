"""How long a whole ResNet-50 takes to prune without training, on 256 inputs; random weights, only time is asked."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

import fxsparse


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prune, with the prices measured, and print the seconds."""
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.resnet50(weights=None).eval()
    data = torch.randn(256, 3, 224, 224)
    start = time.perf_counter()
    pruned = fxsparse.prune(model, 0.4, data, example_inputs=(1, 3, 224, 224))
    seconds = time.perf_counter() - start
    print(pruned.report)
    print(f"ResNet-50, 256 inputs of 224x224: {seconds:.0f} s, {torch.get_num_threads()} threads.")
    return {"seconds": seconds, "threads": torch.get_num_threads(), "report": pruned.report.to_dict()}
