"""The parameters and buffers of a saved model: aliases for the copy that is exported, and tensors under two names."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.errors import FxsparseError


def alias(tensor: Tensor) -> Tensor:
    """Return another tensor object on the same memory, or on a copy where the memory holds more than the tensor.

    Raises:
        FxsparseError: it is a tensor of a special class.
    """
    if type(tensor) not in (Tensor, nn.Parameter):
        raise FxsparseError(
            f"A tensor of the model is a {type(tensor).__name__}: only plain tensors can be saved without pickle. "
            "Convert it to a plain tensor first."
        )
    plain = tensor.detach()
    if plain.untyped_storage().nbytes() != plain.numel() * plain.element_size():
        plain = plain.clone()  # torch.export.save writes whole storages
    return nn.Parameter(plain, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else plain


def tied(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Return the names of tensors that are the same one, together."""
    groups: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
            groups.setdefault((isinstance(tensor, nn.Parameter), *place), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def retie(tensors: MutableMapping[str, Tensor], groups: list[list[str]]) -> None:
    """Make the tensors that `tied` found one object again, after each was moved alone."""
    for first, *others in groups:
        for name in others:
            tensors[name] = tensors[first]


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model; the CPU where it has no tensors.

    Raises:
        FxsparseError: it is on several devices.
    """
    # A CPU scalar works with tensors of any device, and so may stay there.
    devices = sorted({str(tensor.device) for tensor in (*model.parameters(), *model.buffers()) if tensor.dim()})
    if len(devices) > 1:
        raise FxsparseError(f"The model is on {' and '.join(devices)}. Move it to one device before you save it.")
    return torch.device(devices[0] if devices else "cpu")
