"""What `python -m benchmarks cpu` measures: networks, plain code but for ResNet-50, pruned and converted."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fxsparse
from benchmarks import lth, models
from fxsparse.graph_module import ConvertedModule
from fxsparse.magnitude import magnitude_masks
from fxsparse.masks import bake

GROUP_ROWS = 32
TICKET_ZEROS = 0.792  # of the published ticket as a whole
STRUCTURES = ("regrouped", "unstructured", "blocks", "ticket")
_VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)  # 0: a max pool
_RESNET18 = ((64, 1), (128, 2), (256, 2), (512, 2))
_MOBILENET = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))


@dataclasses.dataclass(frozen=True)
class Workload:
    """A network, the side of its images in pixels, and the batch size; written NAME:PX:BATCH."""

    name: str
    px: int
    batch: int

    @classmethod
    def read(cls, text: str) -> Workload:
        """Read NAME:PX:BATCH.

        Raises:
            ValueError: it is none.
            argparse.ArgumentTypeError: the network is not one of `NETWORKS`.
        """
        name, px, batch = text.split(":")
        if name not in NETWORKS:
            raise argparse.ArgumentTypeError(f"'{name}' is none of the networks {', '.join(NETWORKS)}.")
        return cls(name, int(px), int(batch))

    def __str__(self) -> str:
        """Return NAME:PX:BATCH."""
        return f"{self.name}:{self.px}:{self.batch}"

    def images(self, batch: int | None = None) -> Tensor:
        """Return random images: as many as a batch has, or another number."""
        generator = torch.Generator().manual_seed(self.batch)
        return torch.randn(batch or self.batch, 3, self.px, self.px, generator=generator)


@dataclasses.dataclass(frozen=True)
class Level:
    """A structure and a share of zeros, which a ticket brings along; its `str` names an arm."""

    structure: str
    zeros: float

    @classmethod
    def every(cls, structures: list[str], zeros: list[float]) -> list[Level]:
        """Return all structures at all shares of zeros."""
        return list(
            dict.fromkeys(cls(s, TICKET_ZEROS if s == "ticket" else share) for s in structures for share in zeros)
        )

    def __str__(self) -> str:
        """Return the name."""
        return f"fxsparse {self.structure} {self.zeros:g}"


@dataclasses.dataclass(frozen=True)
class Sparse:
    """A converted model.

    Attributes:
        model: calibrated.
        dense: the masked dense model, its batch norms not folded.
        sparse_sites, sites: how many convolutions run sparse, and how many there are.
        convert_s: seconds that the conversion took.
    """

    model: ConvertedModule
    dense: nn.Module
    sparse_sites: int
    sites: int
    convert_s: float


class ConvNormReLU(nn.Sequential):
    """A convolution that keeps the size (but for its stride), a batch norm and a ReLU."""

    def __init__(self, channels: int, out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> None:
        super().__init__(
            nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
        )


class VGG16(nn.Module):
    """VGG-16 with batch norms as it is used on CIFAR: 13 convolutions, and one linear layer on 1x1 features."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for out in _VGG16:
            layers.append(ConvNormReLU(channels, out) if out else nn.MaxPool2d(2))
            channels = out or channels
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(channels, classes))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x))
        return logits


class BasicBlock(nn.Module):
    """ResNet's block of two 3x3 convolutions, with a 1x1 convolution on the shortcut where the shape changes."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = ConvNormReLU(channels, out, 3, stride)
        self.second = nn.Sequential(nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out))
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        summed: Tensor = self.relu(self.second(self.first(x)) + self.shortcut(x))
        return summed


class ResNet18(nn.Module):
    """ResNet-18 as it is used on CIFAR: a 3x3 stem of stride 1, and no max pool after it."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = ConvNormReLU(3, 64)
        blocks: list[nn.Module] = []
        channels = 64
        for out, stride in _RESNET18:
            blocks += [BasicBlock(channels, out, stride), BasicBlock(out, out, 1)]
            channels = out
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.blocks(self.stem(x)))
        return logits


class MobileNetV1(nn.Module):
    """MobileNet of width 1: a stem of stride 2, and 13 pairs of a depthwise 3x3 and a 1x1 convolution."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.stem = ConvNormReLU(3, 32, stride=2)
        blocks: list[nn.Module] = []
        channels = 32
        for out, stride in _MOBILENET:
            depthwise = ConvNormReLU(channels, channels, 3, stride, groups=channels)
            blocks.append(nn.Sequential(depthwise, ConvNormReLU(channels, out, 1)))
            channels = out
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.blocks(self.stem(x)))
        return logits


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vgg16": VGG16,
    "resnet18": ResNet18,
    "resnet50": partial(models.build, "torchvision", "resnet50"),
    "mobilenetv1": MobileNetV1,
}


def build(workload: Workload, level: Level) -> Sparse:
    """Prune a network and convert it with default settings, which calibrates it at the workload's batch size."""
    dense = pruned(workload, level)
    start = time.perf_counter()
    converted = fxsparse.convert(dense, example_inputs=(workload.images(),))
    took = time.perf_counter() - start
    assert isinstance(converted, ConvertedModule)  # every network here is captured as one graph
    report: Any = converted.report
    made = Sparse(converted, dense, report.sparse, len(report.rows), took)
    print(
        f"{workload}, {level}: converted in {took:.1f} s; {made.sparse_sites} of {made.sites} convolutions run sparse",
        flush=True,
    )
    return made


def pruned(workload: Workload, level: Level, group_rows: int = GROUP_ROWS) -> nn.Module:
    """Build a pruned network in eval mode: its weights hide no error, and its zeros are in them for good."""
    torch.manual_seed(0)
    model = NETWORKS[workload.name]().eval()
    masks = make_masks(model, level.structure, level.zeros, group_rows)
    models.prepare(model, masks, workload.images(2))
    return bake(model, masks).model


def make_masks(model: nn.Module, structure: str, zeros: float, group_rows: int = GROUP_ROWS) -> dict[str, Tensor]:
    """Prune every convolution but the first and the grouped ones; linear layers stay dense too.

    Args:
        model: any module; not changed.
        structure: "regrouped": groups of `group_rows` rows, drawn at random, each with its own random columns, of which
            all weights are kept; "unstructured": the largest weights of each layer; "blocks": these, regrouped, so
            that as many weights are kept in blocks; "ticket": the blocks of the published ticket (`lth.py`), for
            VGG-16.
        zeros: share of the weights that are pruned.
        group_rows: rows of a group.
    """
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    chosen = {name: conv for i, (name, conv) in enumerate(convs.items()) if i > 0 and conv.groups == 1}
    if structure == "regrouped":
        generator = torch.Generator().manual_seed(0)
        return {name: _grouped_mask(conv.weight, zeros, group_rows, generator) for name, conv in chosen.items()}
    if structure == "ticket":
        return _ticket_masks(convs)
    every = magnitude_masks(model, 1 - zeros)
    masks = {name: every[name] for name in chosen}
    return masks if structure == "unstructured" else fxsparse.regroup_masks(masks)


def _ticket_masks(convs: dict[str, nn.Conv2d]) -> dict[str, Tensor]:
    """Return the ticket's masks, whose layers are those of VGG-16 in their order; the first is dense."""
    masks = lth.ticket_masks()
    if [conv.weight.shape for conv in convs.values()] != [mask.shape for mask in masks.values()]:
        raise SystemExit("The published ticket is one of VGG-16: give --networks vgg16:32:... with --structure ticket.")
    return dict(list(zip(convs, masks.values(), strict=True))[1:])


def _grouped_mask(weight: Tensor, zeros: float, group_rows: int, generator: torch.Generator) -> Tensor:
    """Return a mask whose rows, in groups drawn at random, share their columns."""
    rows, columns = len(weight), weight[0].numel()
    kept = max(1, round((1 - zeros) * columns))
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for group in torch.randperm(rows, generator=generator).split(group_rows):
        mask[group[:, None], torch.randperm(columns, generator=generator)[:kept]] = True
    return mask.reshape(weight.shape)
