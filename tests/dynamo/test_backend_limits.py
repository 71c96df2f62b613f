"""The backend "fxsparse": what compiles the rest, what stays vanilla and says why, what is kept alive, and options."""

from __future__ import annotations

import gc
import logging
import weakref

import pytest
import torch
import torch.nn.functional as F
from compiling import ESTIMATED, Inner, assert_right, compiled, only_report, pruned_net, sparse_sites
from models import masked_dense, random_masks, small_net
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fxsparse import FxsparseError, Settings, dynamo


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch.compiler.reset()


def test_inductor_compiles_the_rest() -> None:
    model = pruned_net()
    fast = torch.compile(model, backend="fxsparse", options={"settings": ESTIMATED}, dynamic=True, fullgraph=True)
    for batch in (2, 5):
        assert_right(fast, model, torch.randn(batch, 3, 16, 16))
    assert sparse_sites(fast) == [4]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    assert_right(fast, model)
    with torch.no_grad():
        model.block["conv1"].weight.add_(0.1)
    assert_right(fast, model)


def test_inductors_modes_and_options_are_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    handed = []

    def inductor(gm, inputs, config_patches):
        handed.append(config_patches)
        return gm.forward

    inductor._tags = ()
    monkeypatch.setitem(torch._dynamo.backends.registry._COMPILER_FNS, "inductor", inductor)
    model = pruned_net()
    assert_right(torch.compile(model, backend="fxsparse", mode="reduce-overhead"), model)
    torch.compiler.reset()
    options = {"inner_mode": "max-autotune", "inner_options": {"max_autotune": False}, "settings": ESTIMATED}
    assert_right(torch.compile(model, backend="fxsparse", options=options), model)
    assert handed[0] == {"triton.cudagraphs": True}
    assert handed[1]["triton.cudagraphs"] is True
    assert handed[1]["max_autotune"] is False


def test_another_inner_backend_gets_its_options() -> None:
    handed = []

    def inner(gm, inputs, options=None):
        handed.append(options)
        return gm.forward

    model = pruned_net()
    assert_right(compiled(model, inner, inner_options={"level": 3}), model)
    assert handed == [{"level": 3}]


def test_graphs_without_convolutions_or_gain_go_to_the_inner_backend_as_they_are() -> None:
    inner = Inner()
    linear = nn.Linear(3, 4)
    with torch.no_grad():
        compiled(linear, inner)(torch.randn(2, 3))
    assert inner.count == 1
    assert dynamo.reports(linear) == []
    model = small_net()
    fast = compiled(model, inner)
    assert_right(fast, model)
    assert inner.sparse() == [0, 0]
    assert all(row.reason == "no zeros in the weight" for row in only_report(fast).rows)


def test_a_weight_from_the_arguments_stays_vanilla_and_says_why() -> None:
    def conv(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight)

    x, weight = torch.randn(1, 3, 8, 8), torch.zeros(4, 3, 3, 3)
    fast = compiled(conv)
    assert torch.equal(fast(x, weight), conv(x, weight))
    assert "computed from the inputs" in dynamo.reports()[-1].rows[0].reason


class Restless(nn.Module):
    """A weight that is no constant: written to, drawn anew, or made in inference mode."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        with torch.inference_mode(kind == "inference mode"):
            self.conv = nn.Conv2d(3, 8, 3)
            self.conv.weight.data.masked_fill_(torch.rand(8, 3, 3, 3) > 0.05, 0)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "writes into":
            self.conv.weight.view(-1).mul_(2)
        weight = self.conv.weight
        if self.kind == "another one":
            weight = weight * torch.rand_like(weight).round()
        return F.conv2d(x, weight, self.conv.bias)


@pytest.mark.parametrize("kind", ["writes into", "another one", "inference mode"])
def test_weights_that_do_not_stand_still_stay_vanilla_and_say_why(kind: str) -> None:
    model = Restless(kind)
    before = model.conv.weight.detach().clone()
    inner = Inner()
    fast = compiled(model, inner)
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        y = fast(x)
    assert inner.sparse() == [0]
    (row,) = only_report(fast).rows
    assert (row.name, row.path) == ("conv", "vanilla")
    assert kind in row.reason
    if kind == "writes into":
        assert torch.equal(model.conv.weight, before * 2)
        torch.testing.assert_close(y, F.conv2d(x, before * 2, model.conv.bias))


def test_neither_inputs_nor_a_dropped_model_are_kept_alive() -> None:
    model = pruned_net()
    fast = compiled(model)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        fast(x)
    kept = [weakref.ref(x), weakref.ref(model), weakref.ref(model.stem[0].weight)]
    del x
    gc.collect()
    assert kept[0]() is None
    del fast, model
    gc.collect()
    assert [reference() for reference in kept] == [None] * 3


def test_fake_tensors_have_no_zeros_to_look_at() -> None:
    with FakeTensorMode():
        model = small_net().eval()
        fast = compiled(model)
        with torch.no_grad():
            y = fast(torch.randn(2, 3, 16, 16))
    assert isinstance(y, FakeTensor)
    assert y.shape == (2, 5)
    assert "fake tensors" in only_report(fast).rows[0].reason


def test_sizes_without_a_value_are_not_measured() -> None:
    model = pruned_net()

    def both(x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        return model(x), other * 2

    fast = compiled(both, settings=Settings(budget_s=0.2))
    other = torch.randn(5)
    torch._dynamo.decorators.mark_unbacked(other, 0)
    with torch.no_grad():
        assert torch.equal(fast(torch.randn(1, 3, 8, 8), other)[1], other * 2)
    (report,) = dynamo.reports(model)
    assert (report.sparse, report.model_ms) == (4, None)
    assert "not measured" in report.plan_notes[0]


def test_reports_are_logged_and_go_with_the_graphs(caplog: pytest.LogCaptureFixture) -> None:
    model = pruned_net()
    fast = compiled(model)
    with caplog.at_level(logging.INFO, logger="fxsparse"):
        assert_right(fast, model)
    assert "4 of 4 convolutions run sparse" in caplog.text
    assert sparse_sites(pruned_net()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": {}}, "no option 'mask'. Did you mean 'masks'"),
        ({"zzz": 1}, "no option 'zzz'. Known: 'masks', 'inner'"),
        ({"masks": [1]}, "The option 'masks' is a list. Give a mapping"),
        ({"inner": 3}, "The option 'inner' is a int. Give the name"),
        ({"inner": "nonesuch"}, "'nonesuch', which is no backend.*Choose one of"),
        ({"inner": "fxsparse"}, "'fxsparse', which is no backend.*Choose one of"),
        ({"inner_mode": 3}, "The option 'inner_mode' is a int"),
        ({"inner_mode": "nonesuch"}, "'nonesuch', which is no mode of Inductor. Choose one of default"),
        ({"inner": "eager", "inner_mode": "max-autotune"}, "is Inductor's, and the inner backend is 'eager'"),
        ({"inner_options": [1]}, "The option 'inner_options' is a list"),
        ({"inner_options": {"nonesuch": 1}}, "has 'nonesuch', which Inductor does not know"),
        ({"inner_options": {"freezing": True}}, "'freezing' is on: it keeps copies"),
        ({"settings": {}}, "The option 'settings' is a dict. Give a fxsparse.Settings"),
        ({"settings": Settings(capture="export")}, "Dynamo captures the model"),
        ({"masks": {"stem.00": torch.ones(1)}}, "name 'stem.00', which is no weight of the model. Near names: 'stem.0"),
        ({"masks": {"stem.0": torch.ones(1)}}, "Mask 'stem.0' has shape"),
        ({"masks": {"stem.0": 0, "stem.0.weight": 0}}, "name the weight 'stem.0.weight' twice"),
        ({"settings": Settings(include=("nonesuch",))}, "include rule 'nonesuch' matches no convolution"),
    ],
)
def test_wrong_options_are_one_clear_error(options: dict, message: str) -> None:
    fast = torch.compile(small_net(), backend="fxsparse", options=options)
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match=message) as caught:
        fast(torch.randn(1, 3, 8, 8))
    assert isinstance(caught.value.inner_exception, FxsparseError)


def test_options_that_are_no_dict_are_refused() -> None:
    with pytest.raises(FxsparseError, match="The options are a list. Give a dict"):
        dynamo.backend(torch.fx.symbolic_trace(nn.ReLU()), [], options=[1])


def test_a_real_model_end_to_end() -> None:
    models = pytest.importorskip("torchvision.models")
    model = models.resnet18(weights=None).eval()
    masks = {name: mask for name, mask in random_masks(model, 0.1).items() if name != "conv1"}
    fast = compiled(model, "aot_eager", masks=masks)
    x = torch.randn(2, 3, 64, 64)
    assert_right(fast, masked_dense(model, masks), x)
    report = only_report(fast)
    assert len(report.rows) == 20
    assert report.sparse == 19
    assert report.row("conv1").reason == "estimate 1.60x the dense time; not measured"  # may join what follows
