"""Two gloo processes under DistributedDataParallel: the same masks on both, the work of regrouping split."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pruning_nets import images, net
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fxsparse import FxsparseError, Target, pruning
from fxsparse.pruning import ranks, rules

KILL_AT = 3


def _train(rounds: pruning.Rounds, model: nn.Module, kill_at: int | None = None) -> bool:
    """Train each rank on its own images; tell whether the run was killed."""
    done = 0
    for step in rounds:
        wrapped = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        start = step.restore(optimizer=optimizer)
        for epoch in range(start.get("epoch", 0), 2):
            x, y = images(16, seed=int(torch.randint(0, 1000, ())))  # another stream on each rank
            optimizer.zero_grad()
            F.cross_entropy(wrapped(x), y).backward()
            optimizer.step()
            if done == kill_at:
                return True
            done += 1
            step.save({"epoch": epoch + 1}, optimizer=optimizer)
    return False


def _digest(values: dict[str, Tensor]) -> str:
    return json.dumps({name: value.double().flatten().tolist()[::7] for name, value in sorted(values.items())})


def _rank(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=(folder / "init").as_uri(), rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    calls: list[str] = []
    plain = rules.regroup_masks

    def counted(masks: dict[str, Tensor], *args: object, **kwargs: object) -> dict[str, Tensor]:
        calls.extend(masks)
        return plain(masks, *args, **kwargs)  # type: ignore[arg-type]

    rules.regroup_masks = counted  # type: ignore[assignment]
    after = pruning.Regroup(Target(group_rows=8))
    found = {}
    for name, kill_at in (("whole", None), ("killed", KILL_AT)):
        torch.manual_seed(10 + rank)
        model = net()
        file = folder / f"{name}.safetensors"
        rounds = pruning.Rounds(model, pruning.Magnitude(0.5), 2, after=after, file=file)
        if _train(rounds, model, kill_at):
            torch.manual_seed(50 + rank)
            model = net(9)
            rounds = pruning.Rounds(model, pruning.Magnitude(0.5), 2, after=after, file=file)
            _train(rounds, model)
        found[name] = [_digest(rounds.masks), _digest(dict(model.state_dict()))]
        calls_of_run = list(calls)
        found["calls"] = found.get("calls", calls_of_run)
    x, _ = images(8, seed=rank)
    model = net()
    masks = pruning.magnitude_masks(model, 0.3)
    found["refill"] = [_digest(pruning.refill(model, masks, criterion="feature_l2", data=[x]))]
    try:
        ranks.shared_out(masks, lambda part: 1 / 0 if rank else part)  # type: ignore[return-value]
    except (ZeroDivisionError, FxsparseError) as error:
        found["error"] = [type(error).__name__]
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_two_ranks_get_the_same_masks_share_the_regrouping_and_can_be_killed(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (tmp_path,), nprocs=2)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first["whole"] == second["whole"] == first["killed"] == second["killed"]
    assert first["refill"] == second["refill"]
    # Each layer was regrouped once a round, on one of the two.
    assert sorted(first["calls"] + second["calls"]) == sorted(["stem", "body", "last"] * 2)
    assert first["calls"] and second["calls"]
    assert (first["error"], second["error"]) == (["FxsparseError"], ["ZeroDivisionError"])
