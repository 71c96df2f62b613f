"""Pruned models of the zoos at small sizes, converted but not calibrated: where `tuner` and `never-slower` start."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import fxsparse
from benchmarks import models
from benchmarks.lth import Features
from fxsparse.arms import Arm
from fxsparse.magnitude import magnitude_masks
from fxsparse.output_agreement import allowed_error, largest_error, own_error

STRUCTURES = ("unstructured", "regrouped")
# Family and pixels. Fixed and varied: plain, residual, concatenating, grouped, depthwise, squeeze-and-excite, large
# kernels, one that only torch.export captures. The sizes keep a batch of 16 below about 0.1 s on two cores.
ZOO: dict[str, tuple[str, int]] = {
    "resnet18": ("torchvision", 64),
    "vgg11_bn": ("torchvision", 32),
    "squeezenet1_1": ("torchvision", 96),
    "mobilenet_v2": ("torchvision", 96),
    "mobilenet_v3_small": ("torchvision", 128),
    "shufflenet_v2_x1_0": ("torchvision", 128),
    "mnasnet0_5": ("torchvision", 128),
    "regnet_x_400mf": ("torchvision", 96),
    "googlenet": ("torchvision", 64),
    "efficientnet_b0": ("torchvision", 64),
    "legacy_seresnet18": ("timm", 64),
    "lcnet_050": ("timm", 128),
    "ghostnet_100": ("timm", 96),
    "repvgg_a0": ("timm", 64),
    "dla34": ("timm", 64),
    "selecsls42b": ("timm", 64),
    "rexnet_100": ("timm", 96),
    "ese_vovnet19b_dw": ("timm", 64),
    "convnext_atto": ("timm", 64),
    "tf_mixnet_s": ("timm", 64),
}


@dataclasses.dataclass(frozen=True)
class Start:
    """A converted model before its calibration.

    Attributes:
        model: what `fxsparse.convert` made, following the cost model's estimate.
        vanilla: a copy with every site as captured; batch norms are folded in it as in `model`.
        inputs: by batch size.
        wanted: the masked dense model's outputs, by batch size.
        allowed: by batch size, how far an output may be from that (`fxsparse/output_agreement.py`).
    """

    model: nn.Module
    vanilla: nn.Module
    inputs: dict[int, Tensor]
    wanted: dict[int, Any]
    allowed: dict[int, float]

    def check(self, batch: int, arms: Mapping[str, Arm]) -> float:
        """Compare every arm's output with the masked dense model's and return the largest error.

        Raises:
            RuntimeError: an output is further from it than rounding explains.
        """
        errors = [0.0]
        for name, arm in arms.items():
            with torch.inference_mode():  # as in the timing
                errors.append(largest_error(arm(), self.wanted[batch]))
            if not errors[-1] <= self.allowed[batch]:
                raise RuntimeError(
                    f"The arm '{name}' differs from the masked dense model by {errors[-1]:.3g} "
                    f"(allowed {self.allowed[batch]:.3g})."
                )
        return max(errors)


def start(
    name: str, size: int, density: float, structure: str, batches: Iterable[int], settings: fxsparse.Settings
) -> Start:
    """Build a model of `ZOO`, prune it and convert it without measuring.

    Args:
        name: of the model.
        size: pixels of the images' sides.
        density: share of the weights kept.
        structure: of the masks, one of `STRUCTURES`.
        batches: the batch sizes to make inputs of.
        settings: of the conversion.
    """
    model = build(name)
    masks = make_masks(model, density, structure)
    example = _images(2, size)
    models.prepare(model, masks, example)
    inputs = {batch: _images(batch, size) for batch in batches}
    outputs = {batch: own_error(model, x) for batch, x in inputs.items()}
    wanted = {batch: output for batch, (output, _) in outputs.items()}
    allowed = {batch: allowed_error(own, torch.float32) for batch, (_, own) in outputs.items()}
    models.fill_pruned(model, masks)
    settings = dataclasses.replace(settings, calibrate=False)
    converted = fxsparse.convert(model, masks, example_inputs=(example,), settings=settings)
    vanilla = copy.deepcopy(converted)
    fxsparse.set_mode(vanilla, fxsparse.Mode.VANILLA)
    return Start(converted, vanilla, inputs, wanted, allowed)


def build(name: str) -> nn.Module:
    """Build a model of `ZOO`, in eval mode."""
    model = models.build(ZOO[name][0], name)
    # The classifier of a VGG is two dense layers of 4096, which would hide what becomes of its convolutions.
    return Features(model).eval() if name.startswith("vgg") else model


def make_masks(model: nn.Module, density: float, structure: str) -> dict[str, Tensor]:
    """Prune by magnitude, or keep the same number of weights in blocks."""
    masks = magnitude_masks(model, density)
    if structure == "unstructured":
        return masks
    convolutions = {name: model.get_submodule(name) for name in masks}
    groups = {name: conv.groups for name, conv in convolutions.items() if isinstance(conv, nn.Conv2d)}
    return fxsparse.regroup_masks(masks, groups=groups)


def _images(batch: int, size: int) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))
