"""Masks that hold while a model is trained, whatever the optimizer does.

The weights stay plain parameters under their names: state dicts, DistributedDataParallel and optimizers see nothing
new. Three hooks keep the pruned ones at zero. Gradients are masked, so that momentum gathers nothing there and gradient
norms are those of the kept weights; after every step of any `torch.optim.Optimizer` the weights are masked again, since
velocity from before the pruning, or an update that does not come from gradients, would bring them back; and so they are
before every forward, for optimizers of other kinds and for state dicts that are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fxsparse.pruning.layers import Masks, checked, weight_of


class Held:
    """Masks that are held on a model. Use as a context manager, or call `release`.

    Attributes:
        masks: by module name, bool tensors on the weights' devices.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Any]) -> None:
        """Check the masks, write them into the weights, and put the hooks in place."""
        self.masks: Masks = checked(model, masks)
        self._weights = {name: weight_of(model, name) for name in self.masks}
        self._by_id = {id(weight): name for name, weight in self._weights.items()}
        self._handles: list[Any] = []
        modules = dict(model.named_modules())
        for name, weight in self._weights.items():
            pruned = ~self.masks[name]
            if weight.requires_grad:
                self._handles.append(weight.register_hook(lambda grad, pruned=pruned: grad.masked_fill(pruned, 0)))
            owner = modules[name] if name in modules else modules[name.rpartition(".")[0]]
            self._handles.append(owner.register_forward_pre_hook(self._before_forward(name)))
        self._handles.append(register_optimizer_step_post_hook(self._after_step))
        self.apply()

    def apply(self) -> None:
        """Set the pruned weights to zero."""
        for name, weight in self._weights.items():
            _zero(weight, self.masks[name])

    def release(self) -> None:
        """Take the hooks away; the weights stay as they are, the pruned ones zero."""
        self.apply()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Held:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release."""
        self.release()

    def _before_forward(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            if not torch.compiler.is_compiling():  # the other two hooks do it there, outside of the compiled code
                _zero(self._weights[name], self.masks[name])

        return hook

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = self._by_id.get(id(parameter))
                if name is not None:
                    _zero(parameter, self.masks[name])


def hold(model: nn.Module, masks: Mapping[str, Any]) -> Held:
    """Write masks into a model's weights and keep the pruned ones at zero while it is trained.

        with fxsparse.pruning.hold(model, masks):
            train(model)

    Args:
        model: any module, also one that DistributedDataParallel will wrap; changed in place.
        masks: by module or parameter name: tensors of the weights' shapes, or block lists, as for `fxsparse.convert`.

    Returns:
        A context manager; without `with`, the masks hold until `release` is called.

    Raises:
        FxsparseError: a mask does not fit the model, or keeps nothing.
    """
    return Held(model, masks)


def _zero(weight: Tensor, mask: Tensor) -> None:
    # Through .data: a weight that a forward has saved for its backward may be written to, since nothing changes there.
    weight.data.masked_fill_(~mask, 0)
