"""One plan for all ranks of torch.distributed, passed on as JSON: no pickle."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from fxsparse.errors import FxsparseError
from fxsparse.plan import Plan


def share(produce: Callable[[], Plan], device: torch.device) -> Plan:
    """Make a plan on rank 0 and give it to all ranks: each would measure something else, and decide otherwise.

    Every rank of the default process group must call this. Without torch.distributed, it calls `produce`.

    Args:
        produce: makes the plan; is called on rank 0 only, while the other ranks wait.
        device: this rank's device, used to pass the plan on where the backend is NCCL.

    Raises:
        FxsparseError: `produce` raised on rank 0; there, its own exception is raised.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return produce()
    over = torch.device("cpu")
    if dist.get_backend() == "nccl":
        over = device if device.type == "cuda" else torch.device("cuda", torch.cuda.current_device())
    if dist.get_rank() != 0:
        ok, text = _receive(over)
        if not ok:
            raise FxsparseError(f"Rank 0 could not make the plan: {text}")
        return Plan.from_json(text, "The plan from rank 0")
    try:
        plan = produce()
        text = plan.to_json()
    except Exception as error:  # whatever it is, the other ranks must not wait for ever
        _send(False, f"{type(error).__name__}: {error}", over)
        raise
    _send(True, text, over)
    return plan


def _send(ok: bool, text: str, over: torch.device) -> None:
    content = text.encode("utf-8", "backslashreplace")
    dist.broadcast(torch.tensor([ok, len(content)], dtype=torch.int64, device=over), src=0)
    dist.broadcast(torch.frombuffer(bytearray(content), dtype=torch.uint8).to(over), src=0)


def _receive(over: torch.device) -> tuple[bool, str]:
    header = torch.empty(2, dtype=torch.int64, device=over)
    dist.broadcast(header, src=0)
    ok, length = header.tolist()
    content = torch.empty(length, dtype=torch.uint8, device=over)
    dist.broadcast(content, src=0)
    return bool(ok), bytes(content.cpu().numpy()).decode("utf-8")
