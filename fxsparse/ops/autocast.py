"""Autocast of the operators.

torch.library.register_autocast casts to one fixed dtype; ours is the dtype of the autocast region that is live.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_library = torch.library.Library("fxsparse", "FRAGMENT")


def register_autocast(name: str, prepare: Callable[..., tuple[Any, ...]] | None = None) -> None:
    """Make an operator compute in the dtype of the autocast region that it is called in.

    Args:
        name: of the operator.
        prepare: given the dtype and the arguments, returns these with what a plain cast would spoil in that dtype.
    """
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _register(name, device_type, key, prepare)


def _register(name: str, device_type: str, key: str, prepare: Callable[..., tuple[Any, ...]] | None) -> None:
    operator = getattr(torch.ops.fxsparse, name).default
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def run(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)

        def cast(value: Tensor) -> Tensor:
            eligible = value.is_floating_point() and value.dtype != torch.float64
            return value.to(dtype) if eligible else value

        if prepare is not None:
            args = prepare(dtype, *args)
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return operator(*pytree.tree_map_only(Tensor, cast, args))

    _library.impl(name, run, key)
