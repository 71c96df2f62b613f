"""What the demo measures of finished models: whether two agree, and how long they take against each other."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fxsparse import timing
from fxsparse.demo.model import SmallVgg
from fxsparse.demo.train import logits_of

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


def dense_arms(dense: SmallVgg, masked: SmallVgg, x: Tensor) -> dict[str, Callable[[], Any]]:
    """Return what a user could run without fxsparse; pruned weights are multiplied like any other."""
    folded = fold_batch_norm(masked)
    last = channels_last(folded)
    x_last = x.to(memory_format=torch.channels_last)
    return {
        "dense": lambda: dense(x),
        "masked": lambda: masked(x),
        "masked, batch norm folded": lambda: folded(x),
        "masked, folded, channels_last": lambda: last(x_last),
    }


def fold_batch_norm(model: SmallVgg) -> nn.Module:
    """Return a copy of a net in eval mode without its batch norms, as anybody would deploy it."""
    copied = copy.deepcopy(model)
    layers = copied.features
    for i, (conv, norm) in enumerate(itertools.pairwise(list(layers))):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            layers[i], layers[i + 1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
    return copied


def channels_last(model: nn.Module) -> nn.Module:
    """Return a copy of a model in the memory format in which its dense convolutions and poolings are fastest."""
    copied = copy.deepcopy(model)
    return copied.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def compiled_arm(masked: SmallVgg, x: Tensor) -> tuple[Callable[[], Any] | None, str]:
    """Compile the masked model with torch.compile, within a time limit.

    Returns:
        The arm, or None and the reason why there is none.
    """
    model = torch.compile(channels_last(fold_batch_norm(masked)), dynamic=False)
    x = x.to(memory_format=torch.channels_last)
    try:
        with _limit(COMPILE_LIMIT_S), torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(x)
    except Exception as error:  # whatever the compiler stack raises, the demo can go on without it
        return None, f"torch.compile is left out: {type(error).__name__}: {str(error).splitlines()[0]}"
    return lambda: model(x), ""


def speed(arms: Mapping[str, Callable[[], Any]], *, budget_s: float) -> dict[str, timing.Timing]:
    """Time the arms, interleaved."""
    return dict(timing.interleaved(arms, torch.device("cpu"), budget_s=budget_s, max_rounds=500, sample_ms=1.0))


@contextmanager
def _limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the body after some time, where the platform and the thread allow it."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it took over {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
