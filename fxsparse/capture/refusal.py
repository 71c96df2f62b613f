"""What makes a capture rung refuse, and the checks that find it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxsparse.errors import FxsparseError
from fxsparse.inputs import ExampleInputs, unchanged_state

_HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}


class Refusal(Exception):
    """A rung cannot capture this model without losing something; the message is the reason for the report."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, shortened."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "no message"


def refuse_hooks(model: nn.Module) -> None:
    """Refuse a model with hooks: a graph would drop them, or run their side effects once, at trace time."""
    for path, module in model.named_modules():
        for attr, kind in _HOOKS.items():
            for hook in getattr(module, attr, {}).values():
                name = getattr(hook, "__qualname__", type(hook).__qualname__)
                raise Refusal(f"module '{path}' ({type(module).__name__}) has the {kind} '{name}'")


def refuse_different_outputs(model: nn.Module, captured: nn.Module, inputs: ExampleInputs | None) -> None:
    """Refuse a capture that does not compute what the model computes on the example inputs.

    A trace can bake in a random draw, a branch or a Python side effect; running both finds it.
    """
    if inputs is None:
        return
    with torch.no_grad():
        try:
            expected = _run(model, inputs)
        except Exception as error:  # the user's code may raise anything
            raise FxsparseError(
                f"The model does not run on the example inputs: {type(error).__name__}: {first_line(error)}"
            ) from error
        try:
            got = _run(captured, inputs)
        except Exception as error:
            raise Refusal(f"the captured graph does not run: {type(error).__name__}: {first_line(error)}") from error
    wanted, found = ([v for v in pytree.tree_leaves(out) if isinstance(v, Tensor)] for out in (expected, got))
    if len(wanted) != len(found):
        raise Refusal(f"the captured graph returns {len(found)} tensors, the model {len(wanted)}")
    for i, (a, b) in enumerate(zip(wanted, found, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise Refusal(
                f"output {i} of the captured graph is {b.dtype} {tuple(b.shape)}, the model's is "
                f"{a.dtype} {tuple(a.shape)}"
            )
        if not _same(a, b):
            worst = (a.double() - b.double()).abs().max().item()
            raise Refusal(
                f"output {i} of the captured graph differs from the model's by {worst:.3g}: the model has behaviour "
                "that tracing does not see (randomness, Python state or side effects)"
            )


def _same(a: Tensor, b: Tensor) -> bool:
    """The same kernels ran on the same data: only their own rounding between two runs may differ."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    tolerance = 16 * torch.finfo(a.dtype).eps
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * _scale(a), equal_nan=True)


def _scale(a: Tensor) -> float:
    finite = a[a.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 1.0


def _run(model: nn.Module, inputs: ExampleInputs) -> Any:
    # Fresh inputs: a model may write to them in place.
    fresh = ExampleInputs(*pytree.tree_map_only(Tensor, torch.clone, (inputs.args, inputs.kwargs)))
    with unchanged_state(model):
        return fresh.run(model)
