"""The same input gives the same blocks in every process, whatever the hash seed and the number of threads."""

import hashlib
import os
import subprocess
import sys

import pytest

PROGRAM = """
import hashlib, sys, warnings
warnings.simplefilter("ignore")
import numpy as np, torch
from fxsparse.regrouping import Target, regroup, regroup_masks
digest = hashlib.sha256()
def add(result):
    for block in result.blocks:
        digest.update(block.rows.tobytes() + b"|" + block.columns.tobytes())
    digest.update(result.residual_columns.tobytes())
rng = np.random.default_rng(0)
lists = rng.random((9, 600)) < 0.2
sizes = ((48, 0.02),) if sys.argv[1] == "hypergraph" else ((300, 0.1), (96, 0.02), (64, 0.5))
for rows, flips in sizes:
    mask = lists[rng.integers(9, size=rows)] ^ (rng.random((rows, 600)) < flips)
    add(regroup(mask, Target(partitioner=sys.argv[1])))
    weight = rng.standard_normal(mask.shape)
    new = regroup_masks({"b": mask, "a": mask}, Target(partitioner=sys.argv[1]), weights={"a": weight})
    digest.update(b"".join(new[name].numpy().tobytes() for name in new))
print(digest.hexdigest())
"""


def run(partitioner: str, threads: str, hash_seed: str) -> str:
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        environment[name] = threads
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, partitioner],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("partitioner", ["clustering", "hypergraph"])
def test_processes_with_other_hash_seeds_and_thread_counts_agree(partitioner):
    if partitioner == "hypergraph":
        pytest.importorskip("mtkahypar")
    first = run(partitioner, "1", "1")
    assert len(first) == len(hashlib.sha256().hexdigest())
    assert run(partitioner, "2", "77") == first
