"""examples/serving: two ranks of torchrun serve one stream of requests, with one plan, and stop together."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import error_in_float64, masked_dense, random_masks, small_net

import fxsparse

ROOT = Path(__file__).parents[2]
FACTORIES = """
import os, torch
from models import masked_dense, random_masks, small_net

def pruned():
    torch.manual_seed(0)
    model = small_net()
    return masked_dense(model, random_masks(model))

def broken():
    if os.environ["RANK"] == "1":
        raise OSError("no such weights")
    return pruned()

def different():
    model = pruned()
    model.head.bias.data += int(os.environ["RANK"])
    return model
"""


def serve(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "factories.py").write_text(FACTORIES)
    path = os.pathsep.join([str(folder), str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "examples/serving/serve.py"), "--shape", "3", "12", "12", "--batch", "2", *arguments]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)


def _agree(folder: Path) -> bool:
    """Tell whether the answers to a stream of five requests are those of the dense model."""
    torch.manual_seed(0)
    model = small_net()
    dense = masked_dense(model, random_masks(model))
    ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert [len(answers) for answers in ranks] == [3, 2]
    for number in range(5):
        x = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(number))
        if error_in_float64(ranks[number % 2][number // 2], dense, x) > 1e-5:
            return False
    return True


def test_two_ranks_share_the_requests_and_rank_0_prints_one_table(tmp_path: Path) -> None:
    answers = ["--answers", str(tmp_path / "answers")]
    done = serve(tmp_path, "--factory", "factories:pruned", "--requests", "5", "--budget-s", "0.5", *answers)
    assert done.returncode == 0, done.stderr
    first, header, *rows = done.stdout.splitlines()
    assert re.fullmatch(r"gloo, 2 ranks, the same plan on each, \d convolutions sparse", first)
    assert header.split() == ["rank", "threads", "images", "seconds", "images/s"]
    assert [row.split()[0] for row in rows] == ["0", "1", "total"]
    assert [row.split()[-3] for row in rows] == ["6", "4", "10"]
    assert _agree(tmp_path / "answers")


def test_a_saved_model_is_served_with_its_plan(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = small_net()
    masks = random_masks(model)
    settings = fxsparse.Settings(budget_s=0.2)
    fast = fxsparse.convert(model, masks, example_inputs=torch.randn(2, 3, 12, 12), settings=settings)
    fxsparse.save(fast, tmp_path / "model.pt2")
    done = serve(
        tmp_path, "--model", str(tmp_path / "model.pt2"), "--requests", "5", "--answers", str(tmp_path / "answers")
    )
    assert done.returncode == 0, done.stderr
    assert f"the same plan on each, {fast.report.sparse} convolutions sparse" in done.stdout
    assert _agree(tmp_path / "answers")


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("broken", "Rank 1: OSError: no such weights"),
        ("different", "Rank 0: FxsparseError: Ranks [1] do not have the plan and weights of rank 0"),
    ],
)
def test_all_ranks_stop_where_one_cannot_serve(tmp_path: Path, factory: str, said: str) -> None:
    done = serve(tmp_path, "--factory", f"factories:{factory}", "--requests", "5", "--budget-s", "0.2")
    assert done.returncode == 1
    assert said in done.stderr
    assert "images/s" not in done.stdout
