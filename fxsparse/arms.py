"""What to time against what: the ways in which a user would run a model without fxsparse, and through torch.compile.

Batch norms are folded by torch's own fuser, so that fxsparse does not win by folding.
"""

from __future__ import annotations

import copy
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.utils import _pytree as pytree

from fxsparse.inputs import ExampleInputs

Arm = Callable[[], Any]


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """Return a copy of a model in eval mode, its batch norms folded into its convolutions as anybody would deploy it.

    What `torch.fx.symbolic_trace` raises where it cannot trace the model is not caught.
    """
    folded: nn.Module = fuse(model)
    return folded


def channels_last(model: nn.Module) -> nn.Module:
    """Return a copy of a model in the memory format in which its dense convolutions and poolings often are fastest."""
    copied = copy.deepcopy(model)
    return copied.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def with_layout(inputs: ExampleInputs, layout: torch.memory_format) -> ExampleInputs:
    """Return inputs whose 4-D tensors have a memory format."""

    def arranged(value: Any) -> Any:
        return value.contiguous(memory_format=layout) if isinstance(value, Tensor) and value.dim() == 4 else value

    return ExampleInputs(*pytree.tree_map(arranged, (inputs.args, inputs.kwargs)))


def dense_arms(model: nn.Module, inputs: ExampleInputs) -> dict[str, Arm]:
    """Return the eager ways to run a dense model: as it is and in channels_last, each on inputs of its layout.

    Args:
        model: in evaluation mode, its batch norms folded.
        inputs: of the calls.
    """
    first = with_layout(inputs, torch.contiguous_format)
    last = with_layout(inputs, torch.channels_last)
    return {
        "dense eager": partial(first.run, model),
        "dense channels_last": partial(last.run, channels_last(model)),
    }


def compiled(model: nn.Module, inputs: ExampleInputs, *, limit_s: int | None = None) -> Arm:
    """Compile a copy of a model with torch.compile, its weights frozen, and call it once.

    What the compiler raises is not caught. Call the arm in inference mode, as `timing.interleaved` does: anything
    else compiles again.

    Args:
        model: in evaluation mode.
        inputs: of the calls.
        limit_s: seconds until TimeoutError is raised, where the platform and the thread allow it; None for no limit.
    """
    module: Any = torch.compile(copy.deepcopy(model), dynamic=False)
    # Dynamo wants freezing on while it traces: `options=` comes too late for it.
    frozen = torch._inductor.config.patch(freezing=True)
    with _limit(limit_s), frozen, torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inputs.run(module)
    return partial(inputs.run, module)


def compiled_or_reason(model: nn.Module, inputs: ExampleInputs, limit_s: int) -> tuple[Arm | None, str]:
    """Compile as `compiled` does; where that fails or takes too long, return None and a sentence that says why."""
    try:
        return compiled(model, inputs, limit_s=limit_s), ""
    except Exception as error:  # whatever the compiler stack raises, the others can be timed without it
        lines = str(error).splitlines() or [""]
        return None, f"torch.compile is left out: {type(error).__name__}: {lines[0]}"


@contextmanager
def _limit(seconds: int | None) -> Iterator[None]:
    """Raise TimeoutError in the body after some time, where the platform and the thread allow it."""
    possible = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if seconds is None or not possible:
        yield
        return

    rang = False

    def ring(number: int, frame: FrameType | None) -> None:
        nonlocal rang
        rang = True
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except Exception as error:
        if not rang:
            raise
        raise TimeoutError(f"it took over {seconds} s") from error  # the compiler may have made another error of it
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
