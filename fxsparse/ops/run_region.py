"""Fake, autograd and autocast of the operators `region` and `region_batch_inner`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxsparse.ops import batch_inner
from fxsparse.ops.autocast import register_autocast
from fxsparse.ops.region import Conv, fake_batch_inner, reference, reference_batch_inner, steps_of


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    values, tensors, *ctx.numbers = inputs
    ctx.count = len(values)
    ctx.save_for_backward(*values, *tensors)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    # What lies between was never kept. Training goes through dense convolutions, so this is for correctness.
    compute = reference if len(ctx.numbers) == 2 else reference_batch_inner
    with torch.enable_grad():
        saved = [t.detach().requires_grad_(t.requires_grad) for t in ctx.saved_tensors]
        results = compute(saved[: ctx.count], saved[ctx.count :], *ctx.numbers)
        wanted = [t for t in saved if t.requires_grad]
        used = [i for i, grad in enumerate(grads) if grad is not None]
        outputs, seeds = [results[i] for i in used], [grads[i] for i in used]
        found = iter(torch.autograd.grad(outputs, wanted, seeds, allow_unused=True))
    by_tensor = [next(found) if t.requires_grad else None for t in saved]
    # A list without numbers is a structure without leaves.
    rest: list[list[int] | None] = [None if numbers or isinstance(numbers, bool) else [] for numbers in ctx.numbers]
    return by_tensor[: ctx.count], by_tensor[ctx.count :], *rest


def _cast_tiles(
    dtype: torch.dtype, inputs: list[Tensor], tensors: list[Tensor], program: list[int], *rest: Any
) -> tuple[Any, ...]:
    """Return the arguments with their tiled values in another dtype, in whose tiles columns lie in another order."""
    cast = list(tensors)
    for step in steps_of(program):
        if isinstance(step, Conv):
            values, _, tiles, rows = step.packed
            lanes = len(tensors[rows]) // max(len(tensors[tiles]), 1)
            cast[values] = batch_inner.cast_tiles(tensors[values], lanes, dtype)
    return inputs, cast, program, *rest


torch.library.register_fake("fxsparse::region", reference)
torch.library.register_autograd("fxsparse::region", _backward, setup_context=_save)
register_autocast("region")
torch.library.register_fake("fxsparse::region_batch_inner", fake_batch_inner)
torch.library.register_autograd("fxsparse::region_batch_inner", _backward, setup_context=_save)
register_autocast("region_batch_inner", _cast_tiles)
