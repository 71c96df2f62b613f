"""Example inputs in every form a user may give them: a tensor, a tuple, a dict of keywords, or a shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxsparse.errors import FxsparseError

REMEMBERED = "_example_inputs"  # the attribute of a converted graph that `remember` sets


@dataclasses.dataclass(frozen=True)
class ExampleInputs:
    """The arguments of one call of the model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, given: Any, model: nn.Module) -> ExampleInputs | None:
        """Read what the user gave as example inputs.

        Args:
            given: a tensor, a tuple or list of positional arguments, a dict of keyword arguments, a shape (a tuple
                of integers: a random tensor of the model's dtype and device is drawn), ExampleInputs, or None.
            model: tells the dtype and device for a shape.

        Raises:
            FxsparseError: it is none of these, or a tensor is on another device than the model.
        """
        if given is None:
            return None
        if isinstance(given, ExampleInputs):
            made = cls(given.args, given.kwargs)
        elif isinstance(given, Tensor):
            made = cls((given,), {})
        elif isinstance(given, Mapping):
            made = cls((), dict(given))
        elif isinstance(given, Sequence) and given and all(type(v) is int for v in given):
            made = cls((_random(tuple(given), model),), {})
        elif isinstance(given, Sequence) and not isinstance(given, str):
            made = cls(tuple(given), {})
        else:
            raise FxsparseError(
                f"example_inputs is a {type(given).__name__}. Give a tensor, a tuple of arguments, a dict of keyword "
                "arguments, or a shape such as (1, 3, 224, 224)."
            )
        made._check_devices(model)
        return made

    def run(self, model: nn.Module) -> Any:
        """Call the model."""
        return model(*self.args, **self.kwargs)

    def _check_devices(self, model: nn.Module) -> None:
        devices = {p.device for p in model.parameters()}
        if len(devices) != 1:  # without parameters any device does; over several, the model moves its inputs itself
            return
        (device,) = devices
        for name, value in [*enumerate(self.args), *self.kwargs.items()]:
            if isinstance(value, Tensor) and value.device != device:
                raise FxsparseError(
                    f"Example input '{name}' is on {value.device}; the model is on {device}. Move one of them."
                )


def remember(model: nn.Module, inputs: ExampleInputs) -> None:
    """Note on a model what its inputs look like, without their values, for `fxsparse.save`."""
    from fxsparse.report import attach  # which imports what reads inputs

    bare = pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (inputs.args, inputs.kwargs))
    attach(model, REMEMBERED, ExampleInputs(*bare))


def remembered(model: nn.Module, device: torch.device) -> ExampleInputs | None:
    """Return inputs of zeros that look like those that `remember` got last, or None."""
    noted: ExampleInputs | None = model.__dict__.get(REMEMBERED)
    if noted is None:
        return None
    zeros = pytree.tree_map_only(
        Tensor, lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype, device=device), (noted.args, noted.kwargs)
    )
    return ExampleInputs(*zeros)


@contextmanager
def unchanged_state(model: nn.Module) -> Iterator[None]:
    """Put a model's buffers and the caller's random state back afterwards: trial runs must leave no trace."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers and buffer.shape == buffers[name].shape:
                    buffer.copy_(buffers[name])


def _random(shape: tuple[int, ...], model: nn.Module) -> Tensor:
    if min(shape) < 0:
        raise FxsparseError(f"The input shape {shape} has a negative size.")
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator(like.device).manual_seed(0)
    return torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)
