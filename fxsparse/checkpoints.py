"""State dicts of other forms of a model, made into what its converted graph loads.

A *dense* checkpoint is the `state_dict` of the model as it was before conversion. `translate` folds its batch norms
again, computes again what was computed at conversion, and hands the weights to `checkpoint_weights`, which masks and
packs them. It works on the dict that `nn.Module.load_state_dict` is about to load, so that torch does all the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxsparse import checkpoint_weights, sites
from fxsparse.checkpoint_weights import DENSE_KEYS, Loading
from fxsparse.errors import FxsparseError
from fxsparse.passes.fold_batch_norm import FOLDED_NORMS, Norm, folded
from fxsparse.passes.fold_constant_weights import COMPUTED_WEIGHTS


def record(gm: GraphModule, keys: Iterable[str], prefix: str) -> None:
    """Keep in a graph's meta which keys a dense checkpoint has.

    Args:
        gm: a graph, before the passes.
        keys: of the masked dense model's `state_dict`.
        prefix: what they begin with for this graph.
    """
    gm.meta[DENSE_KEYS] = [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]


@torch.no_grad()
def translate(
    gm: GraphModule,
    state: MutableMapping[str, Any],
    prefix: str,
    missing: list[str],
    errors: list[str],
    *,
    assign: bool,
) -> None:
    """Make a state dict one that fits a converted graph, whichever form it has.

    Args:
        gm: the graph.
        state: what is loaded; the entries that begin with `prefix` are changed in place, no tensor is.
        prefix: the graph's name in the model that is loaded, with a dot at the end, or "".
        missing: takes the full names of what is missing and is no tensor of the graph.
        errors: takes what does not fit and is no tensor of the graph.
        assign: as in `nn.Module.load_state_dict`.

    Raises:
        FxsparseError: the weights cannot be brought into the graph; nothing of it is loaded then.
    """
    tensors = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    loading = Loading(gm, tensors, prefix, missing, errors, assign)
    _undo_pruning(loading)
    _refuse_reparametrised(loading)
    if not _is_own(loading):
        _fold_again(loading, left=_compute_again(loading))
        _complete(loading)
    checkpoint_weights.refit(loading)
    for key in [key for key in state if key.startswith(prefix)]:
        del state[key]
    state.update({prefix + key: value for key, value in tensors.items()})


def _undo_pruning(loading: Loading) -> None:
    """Make `weight_orig` and `weight_mask` of `nn.utils.prune` the weight that they compute."""
    tensors = loading.tensors
    for key in [key for key in tensors if key.endswith("_orig")]:
        plain = key.removesuffix("_orig")
        if plain in loading.known and plain + "_mask" in tensors and plain not in tensors:
            kept = tensors.pop(plain + "_mask") != 0
            # Not a product: an infinity in a pruned place would become NaN.
            tensors[plain] = torch.where(kept, tensors.pop(key), 0)


def _refuse_reparametrised(loading: Loading) -> None:
    for key in loading.tensors:
        owner, _, rest = ("." + key).partition(".parametrizations.")
        plain = f"{owner}.{rest.split('.')[0]}".lstrip(".") if rest else key.removesuffix("_g").removesuffix("_orig")
        if key != plain and plain in loading.known and plain not in loading.tensors:
            raise FxsparseError(
                f"The checkpoint has '{loading.prefix}{key}' in the place of '{loading.prefix}{plain}': a "
                "reparametrisation, which was made permanent at conversion. Load it into the original model, make it "
                "permanent there (torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm or "
                "remove_spectral_norm), and load that model's state_dict."
            )


def _is_own(loading: Loading) -> bool:
    """Tell whether a state dict is that of a converted model."""
    tensors, dense = loading.tensors, set(loading.dense_keys)
    if any(key in tensors for key in loading.known - dense):
        return True
    # One of a model whose convolutions had biases and no zeros differs from a dense one by the norms alone.
    norms = _norm_keys(loading)
    derived = {name for _, site in sites.conv_sites(loading.gm) for name in checkpoint_weights.derived_names(site)}
    complete = all(key in tensors for key in loading.own - derived)
    return bool(norms) and complete and not any(key in tensors for key in norms)


def _norm_keys(loading: Loading) -> set[str]:
    return {name for fold in loading.gm.meta.get(FOLDED_NORMS, ()) for name in fold["norm"].values() if name}


def _compute_again(loading: Loading) -> set[str]:
    """Evaluate the weights that were computed from others at conversion; name those that cannot be, and stay."""
    left = set()
    computed = loading.gm.meta.get(COMPUTED_WEIGHTS, {})
    tensors = loading.tensors
    for _, site in sites.conv_sites(loading.gm):
        if not site.weight.rstrip("_").endswith(sites.FOLDED) or site.weight in loading.dense_keys:
            continue
        if site.weight not in computed:
            raise FxsparseError(
                f"The weight of '{site.name}' was computed from others at conversion, and how is not known any more: "
                "a file of fxsparse.save does not hold that. Convert the original model with this checkpoint."
            )
        how = computed[site.weight]
        absent = [name for name in how.sources if name not in tensors]
        loading.report_missing(name for name in absent if name not in loading.own)
        if absent or not all(_fits(loading, name) for name in how.sources):
            loading.keep(site.weight)
            left.add(site.weight)
            continue
        for name, kept in how.kept.items():
            tensors[name] = checkpoint_weights.masked_weight(loading, name, tensors[name], kept)
        tensors[site.weight] = how.evaluate(tensors)
    return left


def _fits(loading: Loading, name: str) -> bool:
    """Tell whether a tensor has the shape of the graph's; where it has not, torch reports it."""
    shape = getattr(loading.tensors[name], "shape", None)
    return name not in loading.own or shape == sites.attribute(loading.gm, name).shape


def _fold_again(loading: Loading, left: set[str]) -> None:
    """Fold the batch norms of a dense checkpoint into its convolutions, as at conversion."""
    tensors = loading.tensors
    results: dict[str, Tensor] = {}
    failed: list[str] = []
    for fold in loading.gm.meta.get(FOLDED_NORMS, ()):
        weight, bias, names = fold["weight"], fold["bias"], fold["norm"]
        wanted = [weight, *([bias] if fold["old_bias"] else []), *(name for name in names.values() if name)]
        absent = [name for name in wanted if name not in tensors]
        channels = loading.weight_shapes[weight][0]
        shapes = {name: getattr(tensors[name], "shape", None) for name in wanted if name in tensors}
        wrong = [name for name, shape in shapes.items() if name != weight and shape != (channels,)]
        if absent or wrong or weight in left:
            loading.report_missing(absent)
            loading.errors.extend(
                f"size mismatch for {loading.prefix}{name}: a tensor with shape {shapes[name]} from checkpoint, "
                f"the batch norm that was folded into '{weight}' has {torch.Size([channels])}."
                for name in wrong
            )
            failed += (weight, bias)
        elif shapes[weight] != loading.weight_shapes[weight]:  # torch says so
            failed.append(bias)
        else:
            norm = Norm(**{f: name and tensors[name] for f, name in names.items()}, eps=fold["eps"])
            old_bias = tensors[bias] if fold["old_bias"] else None
            results[weight], results[bias] = folded(tensors[weight], old_bias, norm)
            if loading.assign:
                results.update({name: results[name].to(tensors[weight].dtype) for name in (weight, bias)})
    tensors.update(results)
    for name in failed:
        loading.keep(name)


def _complete(loading: Loading) -> None:
    """Drop what the dense model has and the graph has not, and keep what the graph has besides."""
    dropped = set(loading.dense_keys) - loading.own - set(loading.weight_shapes)
    for key in dropped & loading.tensors.keys():
        del loading.tensors[key]
    derived = {name for _, site in sites.conv_sites(loading.gm) for name in checkpoint_weights.derived_names(site)}
    for key in loading.own - set(loading.dense_keys) - derived - loading.tensors.keys():
        loading.keep(key)
