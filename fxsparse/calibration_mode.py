"""The mode CALIBRATION: a forward pre-hook that measures the sites in this mode on the inputs that arrive."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxsparse.inputs import ExampleInputs
from fxsparse.report import graphs_of
from fxsparse.sites import conv_sites, site_of, update

CALIBRATION = "calibration"


class CalibratingHook:
    """Calibrates a model on the first call with each signature of inputs.

    Its state is its own, not a closure's, so that a copy of the model calibrates itself.
    """

    def __init__(self) -> None:
        """Start with no inputs seen."""
        self._seen: set[tuple[Any, ...]] = set()
        self._running = False

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Calibrate the sites in the mode CALIBRATION, unless these inputs did so before."""
        from fxsparse.calibration import calibrate  # which imports the whole compiler

        signature = _signature(args, kwargs)
        nodes = [node for gm in graphs_of(model) for node, site in conv_sites(gm) if site.mode == CALIBRATION]
        if self._running or signature in self._seen or not nodes:
            return
        self._running = True
        try:
            rules = tuple(sorted({site.name for node in nodes if (site := site_of(node)) is not None}))
            calibrate(model, ExampleInputs(args, kwargs), sites=rules)
        finally:
            self._running = False
            for node in nodes:
                site = site_of(node)
                if site is not None and site.mode == site.path:
                    update(node, mode=CALIBRATION)
        self._seen.add(signature)


def follow(model: nn.Module) -> None:
    """Install the hook where a site is in the mode CALIBRATION, and remove it where none is."""
    wanted = any(site.mode == CALIBRATION for gm in graphs_of(model) for _, site in conv_sites(gm))
    installed = [key for key, hook in model._forward_pre_hooks.items() if isinstance(hook, CalibratingHook)]
    if wanted and not installed:
        model.register_forward_pre_hook(CalibratingHook(), with_kwargs=True)
    if not wanted:
        for key in installed:
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)


def _signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Return what tells inputs apart: shapes, dtypes and devices of tensors, and all other values as text."""

    def key(value: Any) -> Any:
        return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else repr(value)

    return tuple((pytree.keystr(path), key(leaf)) for path, leaf in pytree.tree_leaves_with_path((args, kwargs)))
