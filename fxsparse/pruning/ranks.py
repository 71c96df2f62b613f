"""Pruning under torch.distributed: every rank gets the same masks, and the work of regrouping is shared out.

Without an initialised process group, or with one rank, everything here does the work alone. Tensors and JSON go between
the ranks, no pickle.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fxsparse.errors import FxsparseError
from fxsparse.pruning.layers import Masks


def is_alone() -> bool:
    """Tell whether there is no other rank."""
    return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


def rank() -> int:
    """Return this process's rank, 0 where it is alone."""
    return 0 if is_alone() else dist.get_rank()


def wait() -> None:
    """Wait for all ranks."""
    if not is_alone():
        dist.barrier()


def add_up(values: Mapping[str, Tensor]) -> None:
    """Sum tensors over the ranks, in place."""
    if is_alone():
        return
    for tensor in values.values():
        there = tensor.to(_device())
        dist.all_reduce(there)
        tensor.copy_(there)


def from_first(masks: Masks) -> Masks:
    """Return rank 0's masks on every rank: weights that differ by a bit could otherwise make other masks."""
    return masks if is_alone() else {name: _sent(mask, 0) for name, mask in masks.items()}


def shared_out(masks: Mapping[str, Tensor], work: Callable[[Masks], Masks]) -> Masks:
    """Do a piece of work on masks, each layer on one rank, and give every rank all of the results.

    Args:
        masks: the same names on every rank; layers go to the ranks by size, largest first to the one with least.
        work: makes new masks of the shapes of those given.

    Raises:
        FxsparseError: the work raised on some rank; there, its own exception is raised.
    """
    if is_alone():
        return work(dict(masks))
    loads = [0] * dist.get_world_size()
    owners = {}
    for name in sorted(masks, key=lambda name: (-masks[name].numel(), name)):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += masks[name].numel()
    mine: Masks = {}
    failure: Exception | None = None
    try:
        mine = work({name: mask for name, mask in masks.items() if owners[name] == dist.get_rank()})
    except Exception as error:  # the other ranks must not wait for ever
        failure = error
    failed = torch.tensor([0 if failure is None else 1], device=_device())
    dist.all_reduce(failed)
    if failure is not None:
        raise failure
    if int(failed):
        raise FxsparseError("Another rank could not do its part of the work; its error is in its own output.")
    return {name: _sent(mine.get(name, mask), owners[name]) for name, mask in masks.items()}


def from_first_json(make: Callable[[], Any]) -> Any:
    """Make JSON values on rank 0 and give them to every rank.

    Raises:
        FxsparseError: `make` raised on rank 0; there, its own exception is raised.
    """
    if is_alone():
        return make()
    text = b""
    failure: Exception | None = None
    if rank() == 0:
        try:
            text = json.dumps(make()).encode()
        except Exception as error:
            failure = error
    size = torch.tensor([-1 if failure else len(text)], device=_device())
    dist.broadcast(size, src=0)
    if failure is not None:
        raise failure
    if int(size) < 0:
        raise FxsparseError("Rank 0 could not do its part of the work; its error is in its own output.")
    content = torch.empty(int(size), dtype=torch.uint8)
    if rank() == 0:
        content = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    content = content.to(_device())
    dist.broadcast(content, src=0)
    return json.loads(bytes(content.cpu().numpy()))


def gathered_json(value: Any) -> list[Any]:
    """Return JSON values of every rank, in their order, on every rank."""
    if is_alone():
        return [value]
    text = json.dumps(value).encode()
    count = dist.get_world_size()
    sizes = torch.zeros(count, dtype=torch.int64, device=_device())
    sizes[dist.get_rank()] = len(text)
    dist.all_reduce(sizes)
    longest = int(sizes.max())
    mine = torch.zeros(longest, dtype=torch.uint8)
    mine[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    every = [torch.zeros(longest, dtype=torch.uint8, device=_device()) for _ in range(count)]
    dist.all_gather(every, mine.to(_device()))
    texts = [bytes(part[: int(size)].cpu().numpy()) for part, size in zip(every, sizes, strict=True)]
    return [json.loads(part) for part in texts]


def _sent(mask: Tensor, source: int) -> Tensor:
    there = mask.to(device=_device(), dtype=torch.uint8, copy=True).contiguous()
    dist.broadcast(there, src=source)
    return (there != 0).to(mask.device)


def _device() -> torch.device:
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
