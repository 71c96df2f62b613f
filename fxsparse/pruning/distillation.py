"""A loss that makes a pruned classifier answer as its dense self does; it needs no labels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxsparse.errors import FxsparseError


class Distillation:
    """The loss of Hinton et al. (arXiv 1503.02531) against a teacher, usually the dense model before its pruning.

    It may stand alone, on unlabelled inputs, or be added to the user's own loss.
    """

    def __init__(self, teacher: nn.Module, temperature: float = 2.0) -> None:
        """Keep the teacher, in eval mode; it is never trained.

        Args:
            teacher: gives logits [N, classes, ...]. The model itself, not a copy: if the pruned model is the same
                object, copy it first.
            temperature: divides all logits before the softmax: above 1 it shows what the teacher thinks of the other
                classes, too.

        Raises:
            FxsparseError: the temperature is not above 0.
        """
        if not temperature > 0:
            raise FxsparseError(f"temperature={temperature} is not above 0. 1 keeps the logits; 2 to 4 are usual.")
        self.teacher = teacher.eval()
        self.temperature = temperature

    def __call__(self, logits: Tensor, *inputs: Any) -> Tensor:
        """Return the mean divergence of the answers, times the temperature's square.

        Args:
            logits: what the pruned model gave for the inputs, [N, classes, ...].
            inputs: the teacher's arguments.

        Returns:
            A scalar that gradients flow through to `logits` alone. With the square, gradients keep their size whatever
            the temperature.

        Raises:
            FxsparseError: the teacher gives something else than a tensor like `logits`, or these have no classes.
        """
        with torch.no_grad():
            wanted = self.teacher(*inputs)
        if not isinstance(wanted, Tensor) or wanted.shape != logits.shape or logits.dim() < 2:
            found = tuple(wanted.shape) if isinstance(wanted, Tensor) else type(wanted).__name__
            raise FxsparseError(
                f"The teacher gives {found}, the pruned model {tuple(logits.shape)}. Both must give logits of one "
                "shape, (N, classes, ...): wrap a model that gives something else in a module that returns them."
            )
        scale = 1 / self.temperature
        divergence = F.kl_div(
            F.log_softmax(logits * scale, 1), F.log_softmax(wanted * scale, 1), reduction="sum", log_target=True
        )
        return divergence * self.temperature**2 * (logits.shape[1] / max(logits.numel(), 1))
