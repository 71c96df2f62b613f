"""What each capture rung refuses, by name, and that the next one takes over."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from models import error_in_float64, small_net
from torch import Tensor, nn

import fxsparse
from fxsparse.capture import capture
from fxsparse.capture.exported import capture_exported
from fxsparse.capture.refusal import Refusal
from fxsparse.capture.symbolic import capture_symbolic
from fxsparse.inputs import ExampleInputs


def inputs(*shape: int) -> ExampleInputs:
    return ExampleInputs((torch.randn(*shape),), {})


class WithDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.conv(x), 0.5, training=self.training)


@pytest.mark.parametrize("rung", [capture_symbolic, capture_exported])
@pytest.mark.parametrize(
    ("register", "kind"),
    [
        (lambda m, f: m.register_forward_hook(f), "forward hook"),
        (lambda m, f: m.register_forward_pre_hook(f), "forward pre-hook"),
        (lambda m, f: m.register_full_backward_hook(f), "backward hook"),
        (lambda m, f: m.register_full_backward_pre_hook(f), "backward pre-hook"),
    ],
)
def test_graph_rungs_refuse_hooks_by_module_and_name(rung, register, kind) -> None:
    def my_hook(*args: object) -> None: ...

    model = small_net()
    register(model.stem[0], my_hook)
    with pytest.raises(Refusal, match=rf"module 'stem.0' \(Conv2d\) has the {kind} '.*my_hook'"):
        rung(model, inputs(1, 3, 8, 8))


def test_symbolic_refuses_control_flow_on_data() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(Refusal, match=r"symbolic tracing failed at test_refusals.py:\d+: TraceError"):
        capture_symbolic(Branch().eval(), None)


def test_symbolic_refuses_training_behaviour_that_it_would_bake_in() -> None:
    with pytest.raises(Refusal, match=r"training mode and its behaviour there is baked.*dropout"):
        capture_symbolic(WithDropout().train(), None)


def test_symbolic_refuses_a_submodule_in_training_mode_inside_an_evaluating_model() -> None:
    model = nn.Sequential(WithDropout()).eval()
    model[0].train()
    with pytest.raises(Refusal, match="behaviour there is baked"):
        capture_symbolic(model, None)


def test_symbolic_notes_a_behaviour_that_only_training_has() -> None:
    _, _, notes = capture_symbolic(WithDropout().eval(), None)
    assert notes == ["The graph holds the behaviour in evaluation mode only (first at 'dropout')."]


def test_symbolic_keeps_a_training_mode_model_whose_modules_stay_live() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    gm, _, notes = capture_symbolic(model, None)
    assert notes == []
    assert gm.get_submodule("2").training


def test_training_flags_are_put_back_after_looking_for_differences() -> None:
    model = WithDropout().eval()
    model.conv.train()
    capture_symbolic(model, None)
    assert (model.training, model.conv.training) == (False, True)


def test_symbolic_refuses_a_random_draw_that_it_would_bake_in() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand(3, 1, 1)

    model = Noisy().eval()
    with pytest.raises(Refusal, match=r"output 0 .* differs from the model's by"):
        capture_symbolic(model, inputs(2, 3, 4, 4))


def test_symbolic_refuses_python_state_that_changes_between_calls() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * self.calls

    with pytest.raises(Refusal, match="tracing does not see"):
        capture_symbolic(Counting().eval(), inputs(2, 3, 4, 4))


def test_checking_a_capture_leaves_buffers_and_random_state_alone() -> None:
    class Buffered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add_(1)
            return x + 0 * self.seen

    model, example = Buffered().eval(), inputs(2, 3, 4, 4)
    state = torch.get_rng_state()
    gm, _, _ = capture_symbolic(model, example)
    assert model.seen.item() == 0
    assert torch.equal(torch.get_rng_state(), state)
    example.run(gm)
    assert gm.seen.item() == 1


def test_export_refuses_without_example_inputs() -> None:
    with pytest.raises(Refusal, match="needs example inputs, and none were given"):
        capture_exported(small_net(), None)


def test_export_refuses_a_module_in_training_mode_by_name() -> None:
    model = small_net()
    model.stem[1].train()
    with pytest.raises(Refusal, match=r"module 'stem.1' \(BatchNorm2d\) is in training mode"):
        capture_exported(model, inputs(1, 3, 8, 8))


def test_export_refuses_what_torch_export_cannot_do_and_says_its_error() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(Refusal, match=r"torch.export failed: \w+: .+"):
        capture_exported(Branch().eval(), inputs(1, 3, 8, 8))


def test_export_takes_over_where_python_asks_for_a_shape() -> None:
    class Shapes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[-1] > 4:
                x = F.avg_pool2d(x, 2)
            return self.conv(x)

    model, x = Shapes().eval(), torch.randn(1, 4, 8, 8)
    mask = torch.rand(8, 4, 3, 3) < 0.1
    settings = fxsparse.Settings(calibrate=False)
    fast = fxsparse.convert(model, {"conv": mask}, example_inputs=x, settings=settings)
    assert fast.report.rung == "export"
    assert "TraceError" in fast.report.refused["symbolic"]
    assert fast.report.row("conv").path == "sparse"
    dense = copy.deepcopy(model)
    dense.conv.weight.data.masked_fill_(~mask, 0)
    for batch in (1, 2, 5):  # exported from a batch of one, it serves every batch
        y = torch.randn(batch, 4, 8, 8)
        with torch.no_grad():
            assert error_in_float64(fast(y), dense, y) < 1e-6


def test_a_rung_asked_for_by_name_raises_its_reason() -> None:
    with pytest.raises(fxsparse.FxsparseError, match="export: torch.export needs example inputs"):
        capture(small_net(), None, "export")


def test_a_single_convolution_converts_as_a_model() -> None:
    conv = nn.Conv2d(8, 16, 3).eval()
    mask = torch.rand_like(conv.weight) < 0.2
    x = torch.randn(2, 8, 9, 9)
    fast = fxsparse.convert(conv, {"weight": mask})
    dense = copy.deepcopy(conv)
    dense.weight.data.masked_fill_(~mask, 0)
    with torch.no_grad():
        assert error_in_float64(fast(x), dense, x) < 1e-6
    with pytest.raises(fxsparse.FxsparseError, match="no module to swap it in"):
        capture(conv, None, "modules")


def test_keyword_inputs_and_structured_outputs_capture() -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, image: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
            return {"features": self.conv(image) * scale}

    model = Keywords().eval()
    mask = torch.rand_like(model.conv.weight) < 0.3
    x = torch.randn(2, 3, 8, 8)
    for rung in ("symbolic", "export", "modules"):
        settings = fxsparse.Settings(calibrate=rung != "export", capture=rung)
        fast = fxsparse.convert(model, {"conv": mask}, example_inputs={"image": x}, settings=settings)
        with torch.no_grad():
            got = fast(image=x)["features"]
        assert torch.allclose(got, F.conv2d(x, model.conv.weight * mask, model.conv.bias), atol=1e-5)


class Shapes(nn.Module):
    """Asks for a shape in Python and casts, so that only export captures it as a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 20, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] > 4:
            x = F.avg_pool2d(x, 2)
        standard = (self.conv.weight - self.conv.weight.mean()) * 2
        return F.conv2d(self.conv(x.to(x.dtype)), standard.transpose(0, 1)).float()


def test_an_exported_model_trains_evaluates_autocasts_and_has_its_weights_folded() -> None:
    model, x = Shapes().eval(), torch.randn(2, 4, 8, 8)
    settings = fxsparse.Settings(calibrate=False, capture="export")
    fast = fxsparse.convert(model, {"conv": torch.rand(20, 4, 3, 3) < 0.1}, example_inputs=x, settings=settings)
    assert [row.reason for row in fast.report.rows if row.path == "vanilla"] == ["no zeros in the weight"]
    fast.train()
    fast.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert fast(x).isfinite().all()


def test_a_refusal_of_tracing_names_the_line_of_the_users_code() -> None:
    with pytest.raises(Refusal, match=r"symbolic tracing failed at test_refusals.py:\d+: TraceError"):
        capture_symbolic(Shapes().eval(), None)
