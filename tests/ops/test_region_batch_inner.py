"""The operator `region_batch_inner` on the CPU: its reference against float64, its program, fakes and gradients."""

from __future__ import annotations

import pytest
import torch
from region_cases import batch_inner_net, close, residual_net
from torch import Tensor

from fxsparse.ops.region import NONE, Average, Linear, reference_batch_inner, steps_of

RELATIVE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.06, torch.float16: 0.008}


@pytest.mark.parametrize("dtype", list(RELATIVE))
@pytest.mark.parametrize("batch", [1, 8, 13])
def test_it_computes_what_its_steps_do(batch: int, dtype: torch.dtype) -> None:
    drawn, x = batch_inner_net(), torch.randn(batch, 8, 19, 14).to(dtype)
    drawn.dtype = dtype
    outputs = [12, 11, 8, 3]
    got = drawn.run_batch_inner([x], outputs)
    assert all(g.dtype == dtype and g.is_contiguous() for g in got)
    assert close(got, drawn.oracle([x], outputs), RELATIVE[dtype])


def test_the_steps_of_a_cpu_region_run_too() -> None:
    drawn, x = residual_net(), torch.randn(3, 8, 12, 12)
    assert close(drawn.run_batch_inner([x], [7, 4]), drawn.oracle([x], [7, 4]), 1e-5)


@pytest.mark.parametrize("shape", [(9, 8, 12, 10), (8, 12, 10)])
def test_results_are_stored_as_asked(shape: tuple[int, ...]) -> None:
    drawn, x = batch_inner_net(), torch.randn(shape)
    first, second = drawn.run_batch_inner([x], [8, 3], (3,))
    assert first.is_contiguous() and not second.is_contiguous()
    batched = second if second.dim() == 4 else second[None]
    assert batched.is_contiguous(memory_format=torch.channels_last)
    assert close([first, second], drawn.oracle([x], [8, 3]), 1e-5)


def test_any_strides_come_in() -> None:
    drawn, x = batch_inner_net(), torch.randn(9, 8, 12, 10)
    wanted = drawn.run_batch_inner([x], [12])
    every_second = torch.randn(9, 8, 12, 20)[..., ::2].copy_(x)
    for other in (x.contiguous(memory_format=torch.channels_last), every_second):
        assert torch.equal(drawn.run_batch_inner([other], [12])[0], wanted[0])


def test_the_program_comes_back_as_it_was() -> None:
    drawn = batch_inner_net()
    assert list(steps_of(drawn.program)) == drawn.steps
    assert Average(4).numbers() == [3, 4] and Linear(4, 2, NONE).numbers() == [4, 4, 2, NONE]


@pytest.mark.parametrize("last", [(), (3,)])
def test_opcheck(last: tuple[int, ...]) -> None:
    drawn, x = batch_inner_net(), torch.randn(8, 8, 10, 10)
    arguments = ([x], drawn.tiled(x), drawn.program, [12, 11, 3], list(last), False)
    torch.library.opcheck(
        torch.ops.fxsparse.region_batch_inner.default,
        arguments,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_autocast_casts_tiles_whose_columns_lie_in_another_order() -> None:
    drawn, x = batch_inner_net(), torch.randn(8, 8, 10, 10)
    with torch.autocast("cpu", torch.bfloat16):
        (got,) = drawn.run_batch_inner([x], [12])
    drawn.dtype = torch.bfloat16
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, drawn.run_batch_inner([x.bfloat16()], [12])[0])


def test_gradients_reach_inputs_biases_and_tiles() -> None:
    drawn, x = batch_inner_net(), torch.randn(8, 8, 10, 10, dtype=torch.float64)
    tensors = [t.requires_grad_() if t.is_floating_point() else t for t in drawn.tiled(x)]

    def gradients(run: object) -> list[Tensor]:
        y = x.clone().requires_grad_()
        (result,) = run([y], tensors, drawn.program, [12], [], False)  # type: ignore[operator]
        wanted = [y, *(t for t in tensors if t.is_floating_point())]
        return list(torch.autograd.grad(result.square().sum(), wanted))

    for got, wanted in zip(
        gradients(torch.ops.fxsparse.region_batch_inner), gradients(reference_batch_inner), strict=True
    ):
        assert torch.allclose(got, wanted, rtol=1e-10, atol=1e-12) and bool(wanted.any())


def test_gradients_of_a_compiled_region() -> None:
    drawn, x = batch_inner_net(), torch.randn(8, 8, 10, 10)
    tensors = [t.requires_grad_() if t.is_floating_point() else t for t in drawn.tiled(x)]
    wanted = [t for t in tensors if t.is_floating_point()]

    def loss(x: Tensor) -> Tensor:
        (result,) = torch.ops.fxsparse.region_batch_inner([x], tensors, drawn.program, [12], [], False)
        return result.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(x), wanted)
    torch.testing.assert_close(found, torch.autograd.grad(loss(x), wanted))
    assert any(bool(gradient.any()) for gradient in found)
