"""Regions on tiled weights, as on CUDA: by the operator's reference on the CPU, and what keeps the tiles up to date."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import random_masks
from torch import Tensor, nn

import fxsparse
from fxsparse import tiled_weights
from fxsparse.epilogues import fused
from fxsparse.graph_module import ConvertedModule
from fxsparse.layouts import place
from fxsparse.ops import tile_cache
from fxsparse.plan import Move
from fxsparse.regions import find

pytestmark = pytest.mark.skipif(
    fxsparse.capabilities().cpu == "reference", reason="the compiled operators are not built"
)


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled_weights, "DEVICES", ("cpu",))


class Net(nn.Module):
    """A stem that stays dense, a pooling, a residual block, and a mean of planes."""

    def __init__(self, forward: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 9, padding=4)
        self.pool = nn.MaxPool2d(2)
        self.a = nn.Conv2d(8, 40, 3, padding=1)
        self.b = nn.Conv2d(40, 40, 3, padding=1)
        self.short = nn.Conv2d(8, 40, 1)
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.relu = nn.ReLU(inplace=True)
        self.step = forward

    def forward(self, x: Tensor) -> Tensor:
        if self.step is not None:
            return self.step(self, x)
        x = self.pool(self.relu(self.stem(x)))
        return self.mean(self.relu(self.b(self.relu(self.a(x))) + self.short(x))).flatten(1)


def converted(
    forward: Callable[..., Tensor] | None = None, batch: int = 9, model: nn.Module | None = None
) -> tuple[ConvertedModule, Tensor]:
    """Return a model with a dense stem, the rest forced on the sparse paths, that knows its shapes."""
    model = Net(forward).eval() if model is None else model
    x = torch.randn(batch, 3, 12, 12)
    masks = {name: mask for name, mask in random_masks(model, 0.2).items() if name != "stem"}
    settings = fxsparse.Settings(calibrate=False, exclude=("stem",))
    fast = fxsparse.convert(model, masks, example_inputs=(x,), settings=settings)
    fxsparse.set_mode(fast, "sparse")
    assert isinstance(fast, ConvertedModule)
    return fast, x


def steps(fast: ConvertedModule) -> list[list[str]]:
    """Return the names of each region's nodes."""
    return [[node.name for node in group.nodes] for group in find(fast, fused(fast))]


def close(fast: ConvertedModule, x: Tensor, other: nn.Module | None = None) -> bool:
    """Tell whether a model computes what its dense form, or another model, does."""
    dense = fxsparse.to_dense(fast) if other is None else other
    with torch.no_grad():
        return torch.allclose(fast(x), dense(x), rtol=1e-4, atol=1e-5)


def test_one_region_from_the_pooled_stem_to_the_mean() -> None:
    fast, x = converted()
    (names,) = steps(fast)
    assert names[:2] == ["relu", "pool"] and names[-1] == "mean" and len(names) == 6
    assert fast.code.count("torch.ops.fxsparse.region_batch_inner") == 1
    assert "weight_values" not in fast.code and "weight_tile_values" in fast.code
    assert close(fast, x)


FLATTENS = {
    "module": nn.Flatten(),
    "function": lambda x: torch.flatten(x, 1),
    "method": lambda x: x.flatten(start_dim=1),
}


class Classifier(Net):
    """The same with a linear layer behind it."""

    def __init__(self, flatten: str = "module", classes: int = 5, *, bias: bool = True) -> None:
        super().__init__()
        self.flatten = FLATTENS[flatten]
        self.linear = nn.Linear(40, classes, bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.b(self.relu(self.a(self.pool(self.stem(x))))))
        return self.linear(self.flatten(self.mean(x)))


@pytest.mark.parametrize("flatten", FLATTENS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_classifier_is_the_region_s_last_step(flatten: str, bias: bool) -> None:
    fast, x = converted(model=Classifier(flatten, bias=bias).eval())
    (names,) = steps(fast)
    assert names[-1] == "linear" and names[-2].startswith("flatten")
    assert "linear(" not in fast.code and close(fast, x)
    with torch.no_grad():
        fast.get_submodule("linear").get_parameter("weight").mul_(2)  # it is read where it is, whatever it becomes
    assert close(fast, x)


@pytest.mark.parametrize(("classes", "batch", "inside"), [(64, 9, True), (65, 9, False), (65, 7, True)])
def test_a_large_classifier_of_many_images_stays_outside(classes: int, batch: int, inside: bool) -> None:
    fast, x = converted(model=Classifier(classes=classes).eval(), batch=batch)
    assert ("linear" in steps(fast)[-1]) == inside and close(fast, x)


def test_an_image_without_a_batch_is_refused_as_by_the_layer_itself() -> None:
    fast, x = converted(model=Classifier().eval())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fxsparse.to_dense(fast)(x[0])
    with pytest.raises(IndexError, match="out of range"):
        fast(x[0])


def test_what_reads_a_classifier_runs_behind_the_region() -> None:
    class Behind(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            rows = super().forward(x)
            return torch.cat([rows, F.relu(rows), self.stem(x).mean((1, 2, 3))[:, None]], 1)

    fast, x = converted(model=Behind().eval())
    assert steps(fast)[-1][-1] == "linear" and close(fast, x)


def test_planes_that_others_read_too_leave_besides() -> None:
    class Both(Classifier):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            means = self.mean(self.relu(self.a(self.stem(x))))
            return self.linear(self.flatten(means)), means

    fast, x = converted(model=Both().eval())
    dense = fxsparse.to_dense(fast)
    assert steps(fast)[-1][-1] == "linear"
    with torch.no_grad():
        for got, wanted in zip(fast(x), dense(x), strict=True):
            assert got.shape == wanted.shape and torch.allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_classifiers_that_a_region_cannot_run() -> None:
    class Twice(Classifier):  # others read the rows
        def forward(self, x: Tensor) -> Tensor:
            rows = self.flatten(self.mean(self.relu(self.a(self.stem(x)))))
            return self.linear(rows) + rows.sum(1, keepdim=True)

    class Wide(Classifier):  # planes of more than one pixel
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.flatten(self.relu(self.a(self.stem(x)))))

    class Plane(Classifier):  # rows of an image that nothing flattens
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.relu(self.a(self.stem(x))), self.linear.weight[:, :12].contiguous())

    wide = Wide().eval()
    wide.linear = nn.Linear(40 * 144, 5)
    for model in (Twice().eval(), wide, Plane().eval()):
        fast, x = converted(model=model)
        assert not any("linear" in name for names in steps(fast) for name in names), type(model)
        assert close(fast, x)
    fast, x = converted(model=Classifier().eval())
    fast.get_submodule("linear").register_forward_hook(lambda module, inputs, output: output + 1)
    fast.recompile()
    assert not any("linear" in name for names in steps(fast) for name in names)
    assert close(fast, x)


@pytest.mark.parametrize("batch", [1, 7])
def test_small_batches_run_so_too(batch: int) -> None:
    fast, x = converted(batch=batch)
    assert fast.code.count("torch.ops.fxsparse.region_batch_inner") == 1 and close(fast, x)


def test_other_paddings_stay_as_they_were() -> None:
    model = Net().eval()
    model.a.padding_mode = "reflect"
    fast, x = converted(model=model)
    assert not any("a" in names for names in steps(fast)) and close(fast, x)


def test_one_convolution_is_a_region_of_its_own() -> None:
    fast, x = converted(lambda m, x: torch.tanh(m.a(torch.tanh(m.stem(x)))))
    assert [len(names) for names in steps(fast)] == [1]
    assert close(fast, x)


def test_an_activation_that_falls_is_not_pooled_late() -> None:
    fast, x = converted(lambda m, x: m.b(F.relu(m.a(m.pool(F.silu(m.stem(x)))))))
    assert "silu" not in {name for names in steps(fast) for name in names}
    assert close(fast, x)


def test_an_input_that_is_written_is_not_taken_where_others_read_it() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        value = m.stem(x)
        return m.b(F.relu(m.a(m.pool(m.relu(value))))).flatten(1).sum(1) + value.flatten(1).sum(1)

    fast, x = converted(forward)
    assert not any("relu" in names[:1] for names in steps(fast))
    assert close(fast, x)


def test_a_result_that_is_moved_leaves_in_that_layout() -> None:
    fast, x = converted(lambda m, x: torch.tanh(m.a(m.stem(x))))
    (node,) = [node for node in fast.graph.nodes if node.name.startswith("tanh")]
    assert place(fast, [Move("", str(node.args[0]), "channels_last", (node.name,))]) == []
    fast.recompile()
    assert "[1], [1], " in fast.code  # its number among the region's values, and again: it leaves as channels_last
    with torch.no_grad():
        assert fast(x).is_contiguous(memory_format=torch.channels_last)
    assert close(fast, x)


@pytest.mark.parametrize("made", [Net, Classifier])
def test_it_exports_and_compiles(made: Callable[[], nn.Module]) -> None:
    fast, x = converted(model=made().eval())
    with torch.no_grad():
        wanted = fast(x)
        exported = torch.export.export(fast, (x,), strict=False).module()
        assert torch.equal(exported(x), wanted)
        assert torch.equal(torch.compile(fast, fullgraph=True, backend="aot_eager")(x), wanted)


@pytest.mark.parametrize("made", [Net, Classifier])
def test_tiles_are_not_saved_nor_part_of_the_state(tmp_path: Path, made: Callable[[], nn.Module]) -> None:
    fast, x = converted(model=made().eval())
    assert any("tile" in name for name, _ in fast.named_buffers())
    assert not any("tile" in name for name in fast.state_dict())
    fxsparse.save(fast, tmp_path / "model.fxs")
    loaded = fxsparse.load(tmp_path / "model.fxs")
    assert "region_batch_inner" in loaded.code and close(fast, x, loaded)


def test_gradients_reach_the_parameters_of_a_classifier() -> None:
    fast, x = converted(model=Classifier().eval())
    dense = fxsparse.to_dense(fast)
    for model in (fast, dense):
        model(x).square().sum().backward()
    got, wanted = (model.get_submodule("linear").get_parameter("weight").grad for model in (fast, dense))
    assert got is not None and wanted is not None and torch.allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_copies_and_casts_read_a_classifier_of_their_own() -> None:
    fast, x = converted(model=Classifier().eval())
    other = copy.deepcopy(fast).double()
    with torch.no_grad():
        other.get_submodule("linear").get_parameter("weight").zero_()
        assert torch.equal(other(x.double())[0], other(x.double())[-1]) and close(fast, x)


def test_saved_weights_come_back_without_tiles(tmp_path: Path) -> None:
    fast, x = converted()
    fxsparse.save_weights(fast, tmp_path / "weights.safetensors")
    loaded = fxsparse.load_weights(tmp_path / "weights.safetensors", Net().eval())
    assert "region_batch_inner" in loaded.code
    with torch.no_grad():
        assert torch.equal(loaded(x), fast(x))


@pytest.mark.parametrize("inference", [False, True])
def test_tables_that_are_loaded_make_new_tiles(inference: bool) -> None:
    with torch.inference_mode(inference):
        fast, x = converted()
        state = {name: tensor.clone() for name, tensor in fast.state_dict().items()}
        wanted = fast(x)
        fast.to("meta").to_empty(device="cpu")(x)  # tables of zeros
        fast.load_state_dict(state)
        assert torch.equal(fast(x), wanted)


def test_weights_that_are_loaded_or_trained_reach_the_tiles() -> None:
    fast, x = converted()
    state = {name: 2 * t if t.is_floating_point() else t for name, t in fast.state_dict().items()}
    fast.load_state_dict(state)
    assert close(fast, x)
    fast.load_state_dict({name: t / 2 if t.is_floating_point() else t for name, t in state.items()}, assign=True)
    assert close(fast, x)
    fast.train()
    with torch.no_grad():
        fast.get_parameter("a.weight").mul_(3)
    fast.eval()
    assert "region_batch_inner" in fast.code and close(fast, x)


def test_copies_and_casts_have_tiles_of_their_own() -> None:
    fast, x = converted()
    dense = fxsparse.to_dense(fast)
    other = copy.deepcopy(fast)
    with torch.no_grad():
        fast.get_parameter("a.weight").zero_()
    fxsparse.set_mode(fast, "training")
    fxsparse.set_mode(fast, "sparse")
    assert close(fast, x) and close(other, x, dense)
    half = copy.deepcopy(other).bfloat16()
    assert half.get_buffer("a.weight_tile_values").dtype == torch.bfloat16
    with torch.no_grad():
        assert (half(x.bfloat16()) - dense(x)).norm() < 0.02 * dense(x).norm()
    assert close(half.float(), x)
    assert not any("tile" in name for name, _ in other.double().named_buffers())


def test_freezing_keeps_what_it_computes() -> None:
    fast, x = converted()
    with torch.no_grad():
        wanted = fast(x)
        assert torch.equal(fxsparse.freeze(fast)(x), wanted)


def test_copies_that_share_packed_weights_share_tiles() -> None:
    fast, _ = converted()
    other = copy.copy(fast)
    names = ("a.weight_tile_values", "a.weight_tile_columns")
    assert all(other.get_buffer(name) is fast.get_buffer(name) for name in names)


def test_changed_values_are_seen_when_code_is_generated_again() -> None:
    fast, x = converted()
    with torch.no_grad():
        fast.get_parameter("b.weight").mul_(0.5)
        fast.get_buffer("b.weight_values").mul_(0.5)
    fast.recompile()
    assert close(fast, x)
    values = fast.get_buffer("b.weight_values")
    with torch.no_grad():
        values.mul_(2)
        fast.get_parameter("b.weight").mul_(2)
    tile_cache.refresh(values)
    assert close(fast, x)
