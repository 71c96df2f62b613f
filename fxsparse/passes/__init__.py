"""The passes, in the order in which they run. Each is one file; its function is named as the file."""

from fxsparse.passes.base import Pass
from fxsparse.passes.fold_batch_norm import fold_batch_norm
from fxsparse.passes.fold_constant_weights import fold_constant_weights
from fxsparse.passes.lower_to_sparse import lower_to_sparse
from fxsparse.passes.normalize_convs import normalize_convs
from fxsparse.passes.regroup_weights import regroup_weights

PASSES: tuple[Pass, ...] = (
    fold_constant_weights,
    normalize_convs,
    fold_batch_norm,
    regroup_weights,
    lower_to_sparse,
)
