"""Converting small models, and comparing and loading their state dicts."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

import fxsparse
from fxsparse import Mode

RUNGS = ("symbolic", "export", "modules")
X = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def converted(model: nn.Module, masks: object, rung: str = "symbolic", **options: object) -> nn.Module:
    chosen = fxsparse.Settings(calibrate=False, capture=rung, cache=False, **options)
    return fxsparse.convert(model, masks, example_inputs=X, settings=chosen)


def same_state(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) and one[k].dtype == two[k].dtype for k in one)


def loads_silently(model: nn.Module, state: dict[str, Tensor], **options: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert str(model.load_state_dict(state, **options)) == "<All keys matched successfully>"


def passes_test_mode(model: nn.Module) -> bool:
    with torch.no_grad(), fxsparse.set_mode(model, Mode.TEST):
        dtype = next(model.parameters()).dtype
        model(X.to(dtype))
    return True


def sparse(model: nn.Module) -> nn.Module:
    fxsparse.set_mode(model, Mode.SPARSE)
    return model
