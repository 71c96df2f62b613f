"""What a user can choose about a conversion, in one frozen, JSON-able record."""

from __future__ import annotations

import dataclasses
from typing import Any

from fxsparse.errors import FxsparseError
from fxsparse.plan import DEPLOYMENTS
from fxsparse.regrouping import Target

CAPTURES = ("auto", "symbolic", "export", "modules")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The choices of one conversion.

    Attributes:
        include: names of convolutions to convert: exact, glob (`layer3.*`) or regular expression (`re:layer[34]`).
        exclude: names to leave dense, in the same forms; wins over `include`.
        capture: the rung of the capture ladder: "auto" tries "symbolic", "export" and "modules" in this order.
        fold_batch_norm: fold eval-mode batch norms into the convolutions before them.
        target: the prices and sizes that the regrouping aims at; None takes `Target()`, measured on AVX-512.
        calibrate: measure every site on the example inputs; False follows the cost model's estimate instead.
        margin: share by which sparse must be faster than vanilla, measured, to be kept.
        budget_s: seconds for measuring, about; None takes what `fxsparse.calibrate` finds enough.
        deploy: how the model will run: "eager", "compiled" or "graph" (see `fxsparse.calibrate`).
        cache: keep regroupings on disk and reuse them (see `fxsparse.regroup`).
        progress: show progress bars.
    """

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    capture: str = "auto"
    fold_batch_norm: bool = True
    target: Target | None = None
    calibrate: bool = True
    margin: float = 0.05
    budget_s: float | None = None
    deploy: str = "eager"
    cache: bool = True
    progress: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        if self.capture not in CAPTURES:
            raise FxsparseError(
                f"capture='{self.capture}' is not a rung of the capture ladder. Choose one of {', '.join(CAPTURES)}."
            )
        if not 0 <= self.margin < 1:
            raise FxsparseError(f"margin={self.margin} is outside [0, 1). It is a share: 0.05 asks for 5 %.")
        if self.budget_s is not None and not self.budget_s > 0:
            raise FxsparseError(f"budget_s={self.budget_s} is no time. Give seconds above 0, or None.")
        if self.deploy not in DEPLOYMENTS:
            raise FxsparseError(f"deploy='{self.deploy}' is not known. Choose one of {', '.join(DEPLOYMENTS)}.")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        return dataclasses.asdict(self)
