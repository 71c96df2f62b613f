"""`python -m benchmarks correctness`."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import correctness


def test_a_few_convolutions_agree_and_threads_are_put_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    result = command.main(["correctness", "--cases", "8", "--seed", "3"])
    assert result["ok"]
    assert torch.get_num_threads() == before
    assert [row["dtype"] for row in result["rows"]] == list(correctness.DTYPES)
    for row in result["rows"]:
        assert 0 < row["median"] <= row["largest"] <= row["allowed"]
        assert row["cases"] == 8
    out = capsys.readouterr().out
    assert "| float32  |" in out
    assert "float16, the largest: Shape(" in out


def test_a_wrong_result_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = correctness.draw(random.Random(1))
    real = torch.ops.fxsparse.conv2d

    def wrong(*arguments: Any) -> torch.Tensor:
        out: torch.Tensor = real(*arguments)
        out.view(-1)[-1] += 1
        return out

    assert correctness.error(shape, torch.float32, torch.Generator().manual_seed(0)) < 1e-5
    monkeypatch.setattr(torch.ops.fxsparse, "conv2d", wrong)
    assert correctness.error(shape, torch.float32, torch.Generator().manual_seed(0)) > 1e-2


def test_every_draw_has_an_output() -> None:
    rng = random.Random(0)
    for shape in (correctness.draw(rng) for _ in range(300)):
        for axis, pads in ((0, shape.padding[:2]), (1, shape.padding[2:])):
            extent = shape.dilation[axis] * (shape.kernel[axis] - 1) + 1
            assert shape.size[axis] + sum(pads) >= extent
            assert shape.mode == "zeros" or max(pads) < shape.size[axis]
        assert shape.out_channels % shape.groups == shape.channels % shape.groups == 0
