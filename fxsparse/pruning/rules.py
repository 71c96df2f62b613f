"""What prunes a little more in each round, and what is made of a round's masks afterwards."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from fxsparse.errors import FxsparseError
from fxsparse.pruning import ranks
from fxsparse.pruning.holding import hold
from fxsparse.pruning.layers import Masks, conv_layers, dense_masks, kept_share, weight_of
from fxsparse.pruning.magnitude import SCOPES, cubic_share, magnitude_masks, random_masks
from fxsparse.pruning.refill import refill
from fxsparse.regrouping import Target, regroup_masks


class Rule(Protocol):
    """Chooses the masks of a round. Its `repr` goes into checkpoints: a run goes on only under the same rule."""

    def masks(self, model: nn.Module, masks: Masks, number: int) -> Masks:
        """Return the masks of round `number` (from 1 on) from the trained model and the masks of the round before."""
        ...


class After(Protocol):
    """Makes other masks of those that a rule chose, before the weights are rewound."""

    def masks(self, model: nn.Module, masks: Masks) -> Masks:
        """Return the new masks; the model has the weights that the round before was trained to."""
        ...


@dataclasses.dataclass(frozen=True)
class Magnitude:
    """Prune a share of the remaining weights, the smallest.

    Attributes:
        rate: share of the remaining weights to prune in each round, in (0, 1).
        scope: "global" or "layer", as in `magnitude_masks`.
    """

    rate: float = 0.2
    scope: str = "global"

    def __post_init__(self) -> None:
        """Check the values."""
        _check(self.rate, self.scope)

    def masks(self, model: nn.Module, masks: Masks, number: int) -> Masks:
        """Return the masks of the next round."""
        keep = kept_share(masks) * (1 - self.rate)
        exact = [f"re:{re.escape(name)}" for name in masks]
        return magnitude_masks(model, keep, scope=self.scope, masks=masks, include=exact)


@dataclasses.dataclass(frozen=True)
class Random:
    """Prune a share of the remaining weights at random; attributes as `Magnitude`, and the seed of the draws."""

    rate: float = 0.2
    scope: str = "global"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        _check(self.rate, self.scope)

    def masks(self, model: nn.Module, masks: Masks, number: int) -> Masks:
        """Return the masks of the next round."""
        keep = kept_share(masks) * (1 - self.rate)
        exact = [f"re:{re.escape(name)}" for name in masks]
        seed = self.seed + number
        return random_masks(model, keep, scope=self.scope, seed=seed, masks=masks, include=exact)


@dataclasses.dataclass(frozen=True)
class Regroup:
    """Replace each mask by the union of dense blocks of its area (`fxsparse.regroup_masks`).

    Under torch.distributed each rank regroups a part of the layers, and all get the same masks.

    Attributes:
        target: of the regrouping; None takes `Target()`.
        by: what ranks the columns of a block: "energy" (|w|^2 of the trained weights) or "count" (kept weights, as in
            the paper).
    """

    target: Target | None = None
    by: str = "energy"

    def __post_init__(self) -> None:
        """Check the values."""
        if self.by not in ("energy", "count"):
            raise FxsparseError(f"by='{self.by}' is not known. Choose 'energy' or 'count'.")

    def masks(self, model: nn.Module, masks: Masks) -> Masks:
        """Return the regrouped masks."""
        modules = dict(model.named_modules())
        groups = {n: m.groups for n, m in modules.items() if n in masks and isinstance(m, nn.Conv2d)}

        def work(part: Masks) -> Masks:
            if not part:
                return {}
            weights = {name: weight_of(model, name).detach() for name in part} if self.by == "energy" else None
            mine = {name: groups[name] for name in part if name in groups}
            return regroup_masks(part, self.target, weights=weights, groups=mine)

        return ranks.shared_out(masks, work)


@dataclasses.dataclass(frozen=True)
class Refill:
    """Replace each mask by whole channels; attributes as the arguments of `refill`."""

    criterion: str = "weight_l1"
    extra: float = 0.0
    data: Iterable[Any] | None = dataclasses.field(default=None, repr=False)
    loss: Callable[[nn.Module, Any], Tensor] | None = dataclasses.field(default=None, repr=False)

    def masks(self, model: nn.Module, masks: Masks) -> Masks:
        """Return the refilled masks."""
        return refill(model, masks, criterion=self.criterion, extra=self.extra, data=self.data, loss=self.loss)


class Gradual:
    """Magnitude pruning that grows while the model is trained, by the cubic schedule.

        gradual = Gradual(model, final=0.1, steps=1000)
        for step in range(...):
            ...; optimizer.step()
            gradual.step(step)

    Attributes:
        masks: of now, by module name.
    """

    def __init__(
        self,
        model: nn.Module,
        final: float,
        steps: int,
        *,
        every: int = 50,
        scope: str = "global",
        include: tuple[str, ...] = ("*",),
        exclude: tuple[str, ...] = (),
    ) -> None:
        """Hold masks that keep everything.

        Args:
            model: changed in place.
            final: share to keep at the end.
            steps: number of the step that reaches it.
            every: steps between two prunings.
            scope, include, exclude: as in `magnitude_masks`.

        Raises:
            FxsparseError: a value cannot be.
        """
        if steps < 1 or every < 1:
            raise FxsparseError(f"steps={steps}, every={every}: both are numbers of steps. Give at least 1.")
        cubic_share(0, final)  # refuses what is no share
        self._model, self._final, self._steps, self._every = model, final, steps, every
        self._options: dict[str, Any] = {"scope": scope, "include": include, "exclude": exclude}
        self._held = hold(model, dense_masks(conv_layers(model, include, exclude)))

    @property
    def masks(self) -> Masks:
        """The masks of now."""
        return self._held.masks

    def step(self, step: int) -> bool:
        """Prune, if it is time; call it after every optimizer step with its number from 0 on. Return whether it was."""
        if step > self._steps or (step % self._every and step != self._steps):
            return False
        chosen = magnitude_masks(
            self._model, cubic_share(step / self._steps, self._final), masks=self.masks, **self._options
        )
        self._replace(ranks.from_first(chosen))
        return True

    def release(self) -> None:
        """Stop holding the masks; pruned weights are zero."""
        self._held.release()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the masks, for a checkpoint."""
        return dict(self.masks)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the masks of a checkpoint."""
        self._replace(dict(state))

    def _replace(self, masks: Masks) -> None:
        self._held.release()
        self._held = hold(self._model, masks)


def _check(rate: float, scope: str) -> None:
    if isinstance(rate, bool) or not 0 < rate < 1:
        raise FxsparseError(f"rate={rate!r} is no share. Give the share of the weights to prune a round, in (0, 1).")
    if scope not in SCOPES:
        raise FxsparseError(f"scope='{scope}' is not known. Choose one of {', '.join(SCOPES)}.")
