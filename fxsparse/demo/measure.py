"""What the demo measures of finished models: whether two agree, and how long they take against each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fxsparse import timing
from fxsparse.arms import Arm, channels_last, compiled_or_reason, dense_arms, fold_batch_norm, with_layout
from fxsparse.demo.model import SmallVgg
from fxsparse.demo.train import logits_of
from fxsparse.inputs import ExampleInputs

TOLERANCE = 1e-4
COMPILE_LIMIT_S = 120


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far a converted model is from the masked dense one, on the same images.

    Attributes:
        name: which conversion.
        difference: largest absolute difference of a logit.
        scale: largest absolute logit.
        changed: number of images with another prediction.
        images: number of images.
    """

    name: str
    difference: float
    scale: float
    changed: int
    images: int

    @property
    def ok(self) -> bool:
        """Whether the two compute the same up to rounding."""
        return self.difference <= TOLERANCE * self.scale


def compare(name: str, dense: nn.Module, converted: nn.Module, x: Tensor) -> Agreement:
    """Run two models on the same images and compare their logits."""
    expected, found = logits_of(dense, x), logits_of(converted, x)
    return Agreement(
        name,
        float((found - expected).abs().max()),
        float(expected.abs().max()),
        int((found.argmax(1) != expected.argmax(1)).sum()),
        len(x),
    )


def arms(dense: SmallVgg, masked: SmallVgg, x: Tensor) -> dict[str, Arm]:
    """Return what a user could run without fxsparse; pruned weights are multiplied like any other."""
    inputs = ExampleInputs((x,), {})
    folded = dense_arms(fold_batch_norm(masked), inputs)
    return {
        "dense": lambda: dense(x),
        "masked": lambda: masked(x),
        "masked, batch norm folded": folded["dense eager"],
        "masked, folded, channels_last": folded["dense channels_last"],
    }


def compiled_arm(masked: SmallVgg, x: Tensor) -> tuple[Arm | None, str]:
    """Compile the masked model with torch.compile; None and the reason where that fails or takes too long."""
    inputs = with_layout(ExampleInputs((x,), {}), torch.channels_last)
    return compiled_or_reason(channels_last(fold_batch_norm(masked)), inputs, COMPILE_LIMIT_S)


def speed(arms: Mapping[str, Arm], *, budget_s: float) -> dict[str, timing.Timing]:
    """Time the arms, interleaved."""
    return dict(timing.interleaved(arms, torch.device("cpu"), budget_s=budget_s, max_rounds=500, sample_ms=1.0))
