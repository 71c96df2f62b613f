"""Linear layers behind planes of one pixel, as steps of regions on CUDA, against float64."""

from __future__ import annotations

import pytest
import torch
from region_cases import RELATIVE, Drawn, agrees

from fxsparse.ops.region import NONE, Add, Average

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact_float32", "poisoned_memory")]
OP = torch.ops.fxsparse.region_batch_inner


@pytest.mark.parametrize("dtype", list(RELATIVE))
@pytest.mark.parametrize("batch", [1, 7, 8, 9, 100])
@pytest.mark.parametrize(
    "channels, outputs", [(1, 1), (15, 16), (64, 10), (513, 17), (512, 64), (2048, 1000), (130, 300)]
)
@pytest.mark.usefixtures("storage")
def test_linear_layers(channels: int, outputs: int, batch: int, dtype: torch.dtype) -> None:
    drawn = Drawn(normed=True)
    drawn.steps.append(Average(0))  # 1
    drawn.linear(1, outputs, channels, biased=outputs % 2 == 0)  # 2
    drawn.steps.append(Add(2, NONE, "silu"))  # 3: a step behind it reads what it gives
    drawn.linear(3, 5, outputs)  # 4
    x = torch.randn(batch, channels, 3, 5, device="cuda", dtype=dtype)
    agrees(drawn, x, [4])
    agrees(drawn, x, [2, 3])


def test_linear_layers_that_are_refused() -> None:
    drawn = Drawn()
    drawn.linear(0, 4, 16)
    x = torch.randn(2, 16, 1, 1, device="cuda")
    weight, bias = drawn.tiled(x)
    for images, tensors, message in (
        (x.expand(2, 16, 2, 1), [weight, bias], "planes of 2 x 1, expected one pixel"),
        (x, [weight[:, 1:], bias], "expected .any, 16."),
        (x, [weight.half(), bias], "'the weight of a linear layer' has dtype"),
        (x, [weight, bias[1:]], "'bias' has shape"),
        (x, [weight], "names tensor 1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            OP([images], tensors, drawn.program, [1], [], False)
    with pytest.raises(RuntimeError, match="CUDA's regions have only"):
        torch.ops.fxsparse.region([x.cpu()], [weight.cpu(), bias.cpu()], drawn.program, [1])
