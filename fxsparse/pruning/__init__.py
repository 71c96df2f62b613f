"""Pruning that ends in blocks: the loop of Chen et al. (arXiv 2202.04736), and group-column pruning.

`prune` is the whole of it in one call; the rest are its parts, around the user's own training loop.
"""

from __future__ import annotations

from fxsparse.pruning.distillation import Distillation
from fxsparse.pruning.holding import Held, hold
from fxsparse.pruning.layers import kept_share, sparsity
from fxsparse.pruning.magnitude import cubic_share, magnitude_masks, random_masks
from fxsparse.pruning.pruner import prune
from fxsparse.pruning.refill import refill
from fxsparse.pruning.result import Pruned, PruneReport
from fxsparse.pruning.rounds import Round, Rounds
from fxsparse.pruning.rules import Gradual, Magnitude, Random, Refill, Regroup
from fxsparse.pruning.settings import PruneSettings
from fxsparse.pruning.torch_masks import from_torch, make_permanent, to_torch

__all__ = [
    "Distillation",
    "Gradual",
    "Held",
    "Magnitude",
    "PruneReport",
    "PruneSettings",
    "Pruned",
    "Random",
    "Refill",
    "Regroup",
    "Round",
    "Rounds",
    "cubic_share",
    "from_torch",
    "hold",
    "kept_share",
    "magnitude_masks",
    "make_permanent",
    "prune",
    "random_masks",
    "refill",
    "sparsity",
    "to_torch",
]
