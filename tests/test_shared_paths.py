"""The code of a converted graph looks each module up once."""

from __future__ import annotations

import copy

import torch
from models import random_masks, small_net
from torch import Tensor, nn
from torch.fx import symbolic_trace

import fxsparse
from fxsparse import shared_paths


class Nested(nn.Module):
    """Names that are no identifiers, one that looks like code, and a call between two reads of one module."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"self": nn.Sequential(nn.Linear(4, 4), nn.ReLU())})
        self.a = nn.Sequential(nn.Sequential(nn.Linear(4, 4)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a[0][0].weight @ x.T
        return self.block["self"](self.a(x)) + y.T * self.a[0][0].bias


def installed(model: nn.Module) -> torch.fx.GraphModule:
    gm = symbolic_trace(model)
    shared_paths.install(gm)
    gm.recompile()
    return gm


def test_the_result_is_the_same_and_no_path_has_two_steps() -> None:
    model = Nested()
    gm, x = installed(model), torch.randn(3, 4)
    assert torch.equal(gm(x), model(x))
    assert "getattr(getattr(" not in gm.code
    assert gm.code.count("self._modules['a']") == gm.code.count("self._modules['block']") == 1


def test_buffers_come_from_their_dict_and_parameters_as_attributes() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.BatchNorm1d(4)
            self.register_buffer("shift", torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.inner.running_var + self.inner.weight + self.shift

    model = Both()
    gm, x = installed(model), torch.randn(3, 4)
    assert gm.code.count("['running_var']") == gm.code.count("['shift']") == 1
    assert "['weight']" not in gm.code
    assert torch.equal(gm(x), model(x))
    gm.inner.running_var = torch.full((4,), 3.0)  # another tensor under the same name
    model.inner.running_var = torch.full((4,), 3.0)
    assert torch.equal(gm(x), model(x))


def test_installing_twice_and_recompiling_change_nothing() -> None:
    model = Nested()
    gm = installed(model)
    code = gm.code
    shared_paths.install(gm)
    gm.recompile()
    assert gm.code == code


def test_an_earlier_transformer_still_runs() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
    gm = symbolic_trace(model)
    gm.graph.on_generate_code(lambda _: lambda body: ["mark = 'self.0.weight'\n", *body])
    shared_paths.install(gm)
    gm.recompile()
    assert "mark = 'self.0.weight'" in gm.code
    x = torch.randn(1, 2)
    assert torch.equal(gm(x), model(x))


def test_a_converted_model_and_its_copies_follow_their_own_tensors() -> None:
    model = small_net()
    fast = fxsparse.convert(model, random_masks(model), settings=fxsparse.Settings(calibrate=False))
    assert "getattr(getattr(" not in fast.code
    other, x = copy.deepcopy(fast), torch.randn(1, 3, 8, 8)
    assert other.code == fast.code
    with torch.no_grad():
        before = fast(x)
        for buffer in other.buffers():
            if buffer.is_floating_point():
                buffer.zero_()
        assert torch.equal(fast(x), before)
        assert not torch.equal(other(x), before)
        assert fast.double()(x.double()).dtype == torch.float64
