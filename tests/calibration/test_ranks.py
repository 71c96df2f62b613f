"""One plan for all ranks, made on rank 0."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist

from fxsparse.calibration.ranks import share
from fxsparse.errors import FxsparseError
from fxsparse.plan import Plan, PlanEntry, PlanKey, SitePlan

CPU = torch.device("cpu")
KEY = PlanKey("a machine x2 threads", "float32", ((1, 3, 8, 8),), "eager")
PLAN = Plan((PlanEntry(KEY, {"conv": SitePlan("sparse", vanilla_ms=2.0, sparse_ms=1.0, reason="measured")}),))


def test_without_processes_a_plan_is_just_made() -> None:
    assert share(lambda: PLAN, CPU) is PLAN


def _rank(rank: int, folder: Path) -> None:
    """Share a plan, then an error; write what this rank got."""
    dist.init_process_group("gloo", init_method=(folder / "init").as_uri(), rank=rank, world_size=2)

    def produce() -> Plan:
        assert rank == 0, "another rank was asked for the plan"
        return PLAN

    def fail() -> Plan:
        assert rank == 0, "another rank was asked for the plan"
        raise ZeroDivisionError("no times à \ud800")

    got = [share(produce, CPU).to_json()]
    try:
        share(fail, CPU)
    except (ZeroDivisionError, FxsparseError) as error:
        got.append(f"{type(error).__name__}: {error}")
    (folder / f"rank{rank}.json").write_text(json.dumps(got))
    dist.destroy_process_group()


def test_all_ranks_get_the_plan_of_rank_0_or_its_error(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (tmp_path,), nprocs=2)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert Plan.from_json(first[0]) == Plan.from_json(second[0]) == PLAN
    assert first[1] == "ZeroDivisionError: no times à \ud800"
    assert second[1] == "FxsparseError: Rank 0 could not make the plan: ZeroDivisionError: no times à \\ud800"
