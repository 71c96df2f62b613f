"""The paper's own result: a VGG-16 lottery ticket pruned in blocks: `python -m benchmarks lth`.

torchvision's `vgg16_bn` with 10 classes, unmodified, on 32x32 images, with random weights and the block
lists of a really trained ticket (`data/README.md`; 20.8 % of the weights kept), given as they are as masks.
torchvision's adaptive pool blows the 1x1 feature map up to 7x7, so two dense layers of 4096 follow that the
ticket's own CIFAR network does not have; the features alone are therefore measured too.
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fxsparse
from benchmarks import models
from benchmarks.arms import budget_arguments, compare, convert
from fxsparse.output_agreement import Agreement, allowed_error, largest_error, own_error

BLOCKS = Path(__file__).parent / "data" / "lth_vgg16bn_cifar_blocks.npz"
BlockList = list[tuple[list[int], list[int]]]


class Features(nn.Module):
    """The convolutional part alone, under the same names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.features = model.get_submodule("features")

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.features(x)
        return features.flatten(1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64], help="batch sizes")
    parser.add_argument(
        "--part", choices=("whole", "features"), nargs="+", default=["whole", "features"], help="what to time"
    )
    margin = fxsparse.Settings().margin
    parser.add_argument("--margin", type=float, default=margin, help="of the calibration")
    parser.add_argument("--engines", action="store_true", help="add onnxruntime and OpenVINO (fxsparse[benchmarks])")
    budget_arguments(parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the command: print the tables and return all numbers."""
    blocks = block_lists()
    whole = pruned_model(blocks)
    kept = {name: mask.float().mean().item() for name, mask in bool_masks(whole, blocks).items()}
    parts = {"whole": whole, "features": Features(whole).eval()}
    exact = {part: exactness(parts[part], blocks) for part in arguments.part}
    for part, agreement in exact.items():
        found = f"differ by {agreement.error:.1e} (allowed {agreement.allowed:.1e})"
        print(f"{part} in float64: converted and masked dense {found}.")
        if not agreement.ok:
            raise RuntimeError(f"The converted model ({part}) and the masked dense model {found}.")
    results = [
        measure(part, parts[part], blocks, batch, arguments) for part in arguments.part for batch in arguments.batch
    ]
    print("\nBest dense over fxsparse:")
    for result in results:
        comparison = result["comparison"]
        print(f"  {result['part']}, batch {result['batch']}: {comparison['ratio']:.2f}x")
    return {
        "density": kept,
        "float64": {part: vars(agreement) for part, agreement in exact.items()},
        "results": results,
    }


def measure(
    part: str, model: nn.Module, blocks: dict[str, BlockList], batch: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Convert for one batch size and compare."""
    x = images(batch)
    settings = fxsparse.Settings(margin=arguments.margin, cache=False)
    converted = convert(model, blocks, x, settings)
    print(f"\n{part}, batch {batch}\n{converted.report()}\n")
    comparison = compare(
        model, converted, x, compiled=arguments.compile, engines=arguments.engines, budget_s=arguments.budget
    )
    print(comparison)
    return {"part": part, "batch": batch, "reports": converted.reports(), "comparison": comparison.to_dict()}


def block_lists() -> dict[str, BlockList]:
    """Read the blocks as [(rows, columns), ...] by module name."""
    with np.load(BLOCKS, allow_pickle=False) as file:
        names = [key.removesuffix(".shape") for key in file.files if key.endswith(".shape")]
        return {
            name: [
                (file[f"{name}.block{i}.rows"].tolist(), file[f"{name}.block{i}.cols"].tolist())
                for i in range(int(file[f"{name}.blocks"]))
            ]
            for name in names
        }


def pruned_model(blocks: dict[str, BlockList]) -> nn.Module:
    """Build the masked dense model."""
    import torchvision

    torch.manual_seed(0)
    model: nn.Module = torchvision.models.vgg16_bn(weights=None, num_classes=10).eval()
    models.prepare(model, bool_masks(model, blocks), images(4))
    return model


def ticket_masks() -> dict[str, Tensor]:
    """Return the ticket's masks by the names of torchvision's layers, in their order."""
    with np.load(BLOCKS, allow_pickle=False) as file:
        shapes = {key.removesuffix(".shape"): tuple(file[key].tolist()) for key in file.files if key.endswith(".shape")}
    return {name: _mask(shapes[name], pairs) for name, pairs in block_lists().items()}


def bool_masks(model: nn.Module, blocks: dict[str, BlockList]) -> dict[str, Tensor]:
    """Return the blocks as bool tensors of the weights' shapes."""
    return {name: _mask(tuple(model.get_parameter(f"{name}.weight").shape), pairs) for name, pairs in blocks.items()}


def _mask(shape: tuple[int, ...], pairs: BlockList) -> Tensor:
    mask = torch.zeros(shape[0], math.prod(shape[1:]), dtype=torch.bool)
    for rows, columns in pairs:
        mask[np.ix_(rows, columns)] = True
    return mask.reshape(shape)


def exactness(model: nn.Module, blocks: dict[str, BlockList]) -> Agreement:
    """Compare the converted model with the masked dense one in float64, with noise where the masks prune."""
    x = images(2)
    allowed = allowed_error(own_error(model, x)[1], torch.float64)
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        wanted = double(x.double())
        models.fill_pruned(double, bool_masks(model, blocks))
        settings = fxsparse.Settings(calibrate=False, cache=False)
        converted = fxsparse.convert(double, blocks, example_inputs=(x.double(),), settings=settings)
        return Agreement(largest_error(converted(x.double()), wanted), allowed)


def images(batch: int) -> Tensor:
    """Return random 32x32 images."""
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
