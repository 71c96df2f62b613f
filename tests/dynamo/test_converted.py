"""torch.compile of a converted model: one graph, right in every mode, and never the code of another mode."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo
from models import error_in_float64, masked_dense, random_masks, small_net
from programs import sparse_calls
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fxsparse
from fxsparse import Settings, layouts, sites
from fxsparse.graph_module import ConvertedModule
from fxsparse.plan import Move
from fxsparse.report import graphs_of

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch.compiler.reset()


class Branching(nn.Module):
    """Only the rung `modules` takes it, and Dynamo breaks its graph in two."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        torch._dynamo.graph_break()
        return self.second(torch.relu(y))


def converted(rung: str = "symbolic") -> tuple[nn.Module, nn.Module]:
    """Return a converted model, with every site sparse, and the oracle."""
    model = small_net()
    masks = random_masks(model)
    x = torch.randn(2, 3, 16, 16)
    gm = fxsparse.convert(model, masks, example_inputs=x, settings=Settings(capture=rung, calibrate=False))
    fxsparse.set_mode(gm, "sparse")
    return gm, masked_dense(model, masks)


@pytest.mark.parametrize(
    ("rung", "layout"),
    [
        ("symbolic", torch.contiguous_format),
        ("symbolic", torch.channels_last),
        ("export", torch.channels_last),
        ("modules", torch.contiguous_format),
    ],
)
@torch.no_grad()
def test_one_graph_serves_every_batch_and_each_mode_gets_its_own(rung: str, layout: torch.memory_format) -> None:
    gm, dense = converted(rung)
    # Not dynamic=True, under which numbers such as eps become inputs and the compilation starts over.
    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(gm, backend=counter, fullgraph=True)
    compiled = 0
    for mode in ("sparse", "vanilla", "sparse"):
        fxsparse.set_mode(gm, mode)
        for batch in (2, 4, 7):
            x = torch.randn(batch, 3, 16, 16).to(memory_format=layout)
            torch._dynamo.mark_dynamic(x, 0)
            y = fast(x)
            assert torch.equal(y, gm(x))
            assert y.stride() == gm(x).stride()
            assert error_in_float64(y, dense, x) < TOLERANCE
        assert counter.frame_count == compiled + 1
        compiled = counter.frame_count
        assert sparse_calls(counter.graphs[-1].graph) == (4 if mode == "sparse" else 0)


@torch.no_grad()
def test_a_batch_of_one_costs_one_compilation_more_and_no_other_size_any() -> None:
    gm, dense = converted()
    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(gm, backend=counter, fullgraph=True)
    for batch in (4, 7, 9, 1, 12, 1, 5):
        x = torch.randn(batch, 3, 16, 16)
        assert error_in_float64(fast(x), dense, x) < TOLERANCE
    assert counter.frame_count == 3  # batch 4, then any batch, then batch 1, which torch never makes dynamic


@pytest.mark.parametrize("rung", ["symbolic", "modules"])
def test_explain_finds_no_graph_break(rung: str) -> None:
    gm, _ = converted(rung)
    found = torch._dynamo.explain(gm)(torch.randn(2, 3, 16, 16))
    assert (found.graph_count, found.graph_break_count) == (1, 0)


@torch.no_grad()
def test_a_graph_break_of_the_users_own_code_is_the_only_one() -> None:
    model = Branching().eval()
    masks = random_masks(model)
    gm = fxsparse.convert(model, masks, settings=Settings(capture="modules"))
    fxsparse.set_mode(gm, "sparse")
    counter = CompileCounterWithBackend("eager")
    fast = torch.compile(gm, backend=counter)
    x = torch.randn(2, 3, 8, 8)
    assert error_in_float64(fast(x), masked_dense(model, masks), x) < TOLERANCE
    assert counter.frame_count == 2
    assert torch._dynamo.explain(gm)(x).graph_break_count == 1


@torch.no_grad()
def test_one_site_of_many_changes_its_mode_inside_a_model() -> None:
    gm, _ = converted("modules")
    counter = CompileCounterWithBackend("eager")
    fast = torch.compile(gm, backend=counter, fullgraph=True)
    x = torch.randn(2, 3, 16, 16)
    fast(x)
    with fxsparse.set_mode(gm, "vanilla", sites="block.short"):
        fast(x)
        assert sparse_calls(counter.graphs[-1].graph) == 3
    fast(x)
    assert counter.frame_count <= 3
    assert sparse_calls(counter.graphs[0].graph) == 4


def test_recompiling_keeps_the_class_and_copies_their_own() -> None:
    gm, _ = converted()
    before = type(gm)
    other = copy.deepcopy(gm)
    gm.recompile()
    assert type(gm) is not before
    assert type(gm).__name__ == "SmallNet"
    assert type(gm).__mro__[1] is ConvertedModule
    assert type(other) is not type(gm)
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(gm(x), other(x))
    assert torch.equal(copy.deepcopy(gm)(x), other(x))


@pytest.mark.parametrize("rung", ["symbolic", "modules"])
def test_training_learns_as_in_eager_mode_and_evaluation_sees_the_new_weights(rung: str) -> None:
    gm, _ = converted(rung)
    other = copy.deepcopy(gm)
    fast = torch.compile(gm, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        before = fast(x)
    for model, call in ((gm, fast), (other, other)):
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            call(x).square().sum().backward()
            optimizer.step()
        model.eval()
    for (name, a), (_, b) in zip(gm.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")
    for graph in graphs_of(gm):
        for _, site in sites.conv_sites(graph):
            assert not sites.attribute(graph, site.weight)[~sites.attribute(graph, site.mask)].any()
    with torch.no_grad():
        after = fast(x)
        assert not torch.allclose(after, before)
        assert torch.equal(after, gm(x))


@pytest.mark.parametrize("context", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_inference_mode_and_autocast(context) -> None:
    gm, dense = converted()
    fast = torch.compile(gm, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        plain = fast(x)
        with context():
            y, expected = fast(x), gm(x)
        assert (y.dtype, y.stride()) == (expected.dtype, expected.stride())
        assert torch.equal(y, expected)
        assert error_in_float64(y.clone(), dense, x) < (TOLERANCE if y.dtype == torch.float32 else 0.05)
        assert torch.equal(fast(x), plain)


@torch.no_grad()
def test_moves_of_the_plan_compile_and_keep_the_strides() -> None:
    gm, dense = converted()
    fxsparse.set_mode(gm, "vanilla")
    (graph,) = graphs_of(gm)
    x = next(node.name for node in graph.graph.nodes if node.op == "placeholder")
    stem, short = (next(n for n, s in sites.conv_sites(graph) if s.name == name) for name in ("stem.0", "block.short"))
    site = sites.site_of(stem)
    assert site is not None
    moves = [Move("", x, "channels_last", (stem.name,)), layouts.move_of_weight("", site, "channels_last")]
    assert not layouts.place(graph, moves)
    sites.set_path(graph, short, "sparse")  # the operator takes channels_last
    graph.recompile()
    fast = torch.compile(gm, backend="aot_eager", fullgraph=True)
    data = torch.randn(3, 3, 16, 16)
    y = fast(data)
    assert torch.equal(y, gm(data))
    assert y.stride() == gm(data).stride()
    assert error_in_float64(y, dense, data) < TOLERANCE


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_inductor_agrees(mode: str | None) -> None:
    gm, dense = converted()
    fast = torch.compile(gm, fullgraph=True, mode=mode, dynamic=True)
    with torch.no_grad():
        for batch in (2, 5):
            x = torch.randn(batch, 3, 16, 16).to(memory_format=torch.channels_last)
            assert error_in_float64(fast(x).clone(), dense, x) < TOLERANCE
