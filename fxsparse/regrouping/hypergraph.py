"""Partition rows with Mt-KaHyPar: rows are vertices, columns hyperedges, the objective is km1.

The method of Rumi et al. (PACT 2020) and Chen et al. (2022, arXiv 2202.04736), who used hMETIS. Needs the
optional package mtkahypar (MIT). The deterministic preset gives the same parts in every process.
"""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

import numpy as np

from fxsparse.errors import FxsparseError
from fxsparse.regrouping.assignment import assign
from fxsparse.regrouping.partition import group_sizes
from fxsparse.regrouping.weight_matrix import BoolArray, IntArray

IMBALANCE = 0.03


@functools.cache
def mtkahypar() -> tuple[Any, Any]:
    """Return the module mtkahypar and its process-wide initializer, which may be made only once.

    Raises:
        FxsparseError: the package is not installed.
    """
    try:
        module = importlib.import_module("mtkahypar")
    except ImportError as error:
        raise FxsparseError(
            "Target.partitioner 'hypergraph' needs the package mtkahypar, which cannot be imported "
            f"({error}). Run `pip install fxsparse[hypergraph]`, or use partitioner='clustering'."
        ) from error
    return module, module.initialize(os.cpu_count() or 1)


def partition_hypergraph(matrix: BoolArray, group_rows: int, seed: int) -> IntArray:
    """Group rows so that each column touches few groups.

    Mt-KaHyPar bounds the largest part only; rows over a group's size move to the groups that share most
    columns with them.

    Args:
        matrix: the mask of the rows to group, [n, K], no empty row, n > group_rows.
        group_rows: rows of one group; the last group takes what is left.
        seed: the seed.

    Returns:
        int64 [n], labels 0 to k - 1.

    Raises:
        FxsparseError: mtkahypar is not installed.
    """
    module, initializer = mtkahypar()
    sizes = group_sizes(matrix.shape[0], group_rows)
    pins = matrix.sum(axis=0)
    columns, rows = np.nonzero(matrix.T[pins > 1])
    edges = [edge.tolist() for edge in np.split(rows, np.flatnonzero(np.diff(columns)) + 1) if edge.size]
    if not edges:
        return np.repeat(np.arange(sizes.size), sizes)
    context = initializer.context_from_preset(module.PresetType.DETERMINISTIC)
    context.set_partitioning_parameters(sizes.size, IMBALANCE, module.Objective.KM1)
    context.logging = False
    module.set_seed(seed)
    hypergraph = initializer.create_hypergraph(context, matrix.shape[0], len(edges), edges)
    parts = np.asarray(hypergraph.partition(context).get_partition(), dtype=np.int64)
    by_size = np.argsort(-np.bincount(parts, minlength=sizes.size), kind="stable")
    number = np.empty_like(by_size)
    number[by_size] = np.arange(by_size.size)
    parts = number[parts]
    member = np.zeros((matrix.shape[0], sizes.size), dtype=np.float32)
    member[np.arange(parts.size), parts] = 1
    kept = matrix.astype(np.float32)
    shared = (kept @ (member.T @ kept).T).astype(np.float64)
    shared[np.arange(parts.size), parts] += 2 * shared.max() + 1  # a row leaves its part only for want of room
    return assign(shared, sizes, swap_rounds=0)
