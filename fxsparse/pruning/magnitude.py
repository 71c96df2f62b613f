"""Unstructured pruning: the smallest weights, of all layers together or of each, or as a control random ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fxsparse.errors import FxsparseError
from fxsparse.pruning.layers import Masks, checked, conv_layers

SCOPES = ("global", "layer")


def magnitude_masks(
    model: nn.Module,
    keep: float,
    *,
    scope: str = "global",
    masks: Mapping[str, Tensor] | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> Masks:
    """Return masks that keep the largest weights of the convolutions.

    Args:
        model: not changed.
        keep: share of the weights to keep, in (0, 1]; each layer keeps at least one.
        scope: "global" compares the weights of all layers, "layer" those of each.
        masks: what is pruned already stays so; by module name.
        include, exclude: names of the layers, as in `fxsparse.Settings`; the others are in no mask.

    Raises:
        FxsparseError: an argument cannot be.
    """
    layers = conv_layers(model, include, exclude)
    return _largest(layers, {n: layer.weight.detach().abs() for n, layer in layers.items()}, keep, scope, model, masks)


def random_masks(
    model: nn.Module,
    keep: float,
    *,
    scope: str = "global",
    seed: int = 0,
    masks: Mapping[str, Tensor] | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> Masks:
    """Return masks that keep weights drawn at random: the control of an experiment. Arguments as `magnitude_masks`."""
    layers = conv_layers(model, include, exclude)
    generator = torch.Generator().manual_seed(seed)
    scores = {
        name: torch.rand(layer.weight.shape, generator=generator).to(layer.weight.device)
        for name, layer in layers.items()
    }
    return _largest(layers, scores, keep, scope, model, masks)


def cubic_share(progress: float, final: float, initial: float = 1.0) -> float:
    """Return the share to keep at a point of a gradual schedule (Zhu & Gupta 2017, arXiv 1710.01878).

    Args:
        progress: how much of the schedule is done, 0 to 1; more or less is cut.
        final: share to keep at the end.
        initial: share to keep at the start.
    """
    _check_share("final", final)
    _check_share("initial", initial)
    done = min(max(progress, 0.0), 1.0)
    return final + (initial - final) * (1 - done) ** 3


def _check_share(name: str, share: float) -> None:
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not (math.isfinite(share) and 0 < share <= 1):
        raise FxsparseError(f"{name}={share!r} is no share. Give the share of the weights to keep, in (0, 1].")


def _largest(
    layers: Mapping[str, nn.Conv2d],
    scores: Mapping[str, Tensor],
    keep: float,
    scope: str,
    model: nn.Module,
    masks: Mapping[str, Tensor] | None,
) -> Masks:
    """Return the best `keep` of the weights, of all layers or of each; equal scores go to the earlier weight."""
    _check_share("keep", keep)
    if scope not in SCOPES:
        raise FxsparseError(f"scope='{scope}' is not known. Choose one of {', '.join(SCOPES)}.")
    alive = {name: ~torch.isnan(score) for name, score in scores.items()}
    for name, mask in checked(model, masks or {}).items():
        if name in alive:
            alive[name] &= mask
    flat = {name: torch.where(alive[name], score, -1.0).flatten() for name, score in scores.items()}
    chosen = {}
    if scope == "layer":
        for name, score in flat.items():
            chosen[name] = _top(score, max(1, round(keep * score.numel())))
    else:
        every = torch.cat([score.cpu() for score in flat.values()])
        taken = _top(every, max(1, round(keep * every.numel())))
        for name, part in zip(flat, torch.split(taken, [score.numel() for score in flat.values()]), strict=True):
            best = _top(flat[name], 1).cpu()  # no layer is emptied
            chosen[name] = part | best if not bool(part.any()) else part
    return {
        name: chosen[name].to(layers[name].weight.device).reshape(layers[name].weight.shape) & alive[name]
        for name in layers
    }


def _top(scores: Tensor, count: int) -> Tensor:
    taken = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    taken[scores.argsort(descending=True, stable=True)[:count]] = True
    return taken
