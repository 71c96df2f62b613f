"""Fake, autograd and autocast of the operator `region`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxsparse.ops.autocast import register_autocast
from fxsparse.ops.region import reference


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    values, tensors, ctx.program, ctx.outputs = inputs
    ctx.count = len(values)
    ctx.save_for_backward(*values, *tensors)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    # What lies between was never kept. Training goes through dense convolutions, so this is for correctness.
    with torch.enable_grad():
        saved = [t.detach().requires_grad_(t.requires_grad) for t in ctx.saved_tensors]
        results = reference(saved[: ctx.count], saved[ctx.count :], ctx.program, ctx.outputs)
        wanted = [t for t in saved if t.requires_grad]
        used = [i for i, grad in enumerate(grads) if grad is not None]
        outputs, seeds = [results[i] for i in used], [grads[i] for i in used]
        found = iter(torch.autograd.grad(outputs, wanted, seeds, allow_unused=True))
    by_tensor = [next(found) if t.requires_grad else None for t in saved]
    return by_tensor[: ctx.count], by_tensor[ctx.count :], None, None


torch.library.register_fake("fxsparse::region", reference)
torch.library.register_autograd("fxsparse::region", _backward, setup_context=_save)
register_autocast("region")
