"""Regroup the pruned weights of a convolution into dense blocks and residual weights.

``regroup`` keeps every weight; ``regroup_masks`` makes new masks of blocks alone, to be trained again.
"""

from __future__ import annotations

from fxsparse.regrouping.lossless import regroup
from fxsparse.regrouping.lossy import regroup_masks
from fxsparse.regrouping.regrouping import Block, Regrouping
from fxsparse.regrouping.target import Target

__all__ = ["Block", "Regrouping", "Target", "regroup", "regroup_masks"]
