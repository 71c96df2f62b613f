"""Regions in which each thread computes the same rows of every value, and reads its neighbours' around them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from region_cases import Drawn, close

from fxsparse.ops.region import NONE, Add, MaxPool


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def chain(*windows: tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int, int, int]]) -> Drawn:
    """Return convolutions with (kernel, stride, dilation, padding), each behind a 1x1 one and added to its result."""
    drawn, value = Drawn(), 0
    for kernel, stride, dilation, padding in windows:
        drawn.conv(value, (8, 8, *kernel), 0.5, stride=stride, dilation=dilation, padding=padding, activation="relu")
        drawn.conv(value + 1, (8, 8, 1, 1), 0.5, add=value + 1, activation="silu")
        value += 2
    return drawn


def agrees(drawn: Drawn, x: torch.Tensor, outputs: list[int], relative: float = 1e-5) -> bool:
    """Tell whether a region computes what it should, and twice the same."""
    got, again = drawn.run([x], outputs), drawn.run([x], outputs)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    return close(got, drawn.oracle([x], outputs), relative)


SAME = ((3, 3), (1, 1), (1, 1), (1, 1, 1, 1))


@pytest.mark.parametrize("threads", [2, 3, 5])
@pytest.mark.parametrize("height", [1, 2, 3, 4, 5, 6, 9, 10, 11, 15, 16, 29])
def test_any_height(height: int, threads: int) -> None:
    """Planes of fewer rows than two a thread are shared otherwise, and shares are of two sizes."""
    torch.set_num_threads(threads)
    assert agrees(chain(SAME, SAME, SAME), torch.randn(1, 8, height, 7), [6, 2])


@pytest.mark.parametrize("threads", [2, 4])
@pytest.mark.parametrize(
    "window",
    [
        ((1, 1), (2, 2), (1, 1), (0, 0, 0, 0)),
        ((3, 3), (2, 2), (1, 1), (1, 1, 1, 1)),
        ((3, 3), (2, 1), (1, 1), (0, 2, 1, 0)),
        ((2, 3), (3, 2), (1, 2), (1, 0, 2, 2)),
        ((5, 1), (1, 1), (1, 1), (2, 2, 0, 0)),
        ((7, 7), (2, 2), (1, 1), (3, 3, 3, 3)),
        ((3, 3), (1, 1), (5, 3), (5, 5, 3, 3)),
        ((3, 3), (2, 2), (4, 1), (4, 4, 1, 1)),
        ((3, 1), (1, 1), (1, 1), (0, 0, 0, 0)),
        ((3, 3), (1, 1), (1, 1), (4, 4, 4, 4)),
    ],
)
def test_any_window(
    window: tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int, int, int]], threads: int
) -> None:
    torch.set_num_threads(threads)
    drawn = chain(SAME, window, SAME)
    for height in (16, 31, 32):
        assert agrees(drawn, torch.randn(1, 8, height, 18), [6, 3])


@pytest.mark.parametrize(("threads", "dilation"), [(12, 1), (12, 8), (12, 12), (16, 9)])
def test_rows_of_many_neighbours(threads: int, dilation: int) -> None:
    """A dilated window reads more shares than a stripe may: its input is in one piece then."""
    torch.set_num_threads(threads)
    wide = ((3, 3), (1, 1), (dilation, 1), (dilation, dilation, 1, 1))
    assert agrees(chain(SAME, wide, wide, SAME), torch.randn(1, 8, 2 * threads + 1, 6), [8, 4])


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "ceil"),
    [(2, 2, 0, False), (3, 2, 1, False), (3, 1, 1, False), (3, 3, 0, True), (2, 3, 1, True), (3, 2, 0, True)],
)
def test_poolings(kernel: int, stride: int, padding: int, ceil: bool, threads: int) -> None:
    """Windows that keep to a share, and windows that cross into the next one."""
    torch.set_num_threads(threads)
    window = ((kernel, kernel), (stride, stride), (padding, padding), (1, 1), ceil)
    for height in (12, 17, 24):
        drawn = Drawn()
        drawn.conv(0, (8, 4, 3, 3), 0.5, padding=(1, 1, 1, 1))  # 1
        drawn.steps.append(MaxPool(1, *window))  # 2
        drawn.steps.append(Add(2, NONE, "hardswish"))  # 3
        drawn.conv(3, (8, 8, 3, 3), 0.5, padding=(1, 1, 1, 1), add=3)  # 4
        drawn.steps.append(MaxPool(0, *window))  # 5: of an input
        drawn.steps.append(MaxPool(5, (1, 1), (1, 1), (0, 0), (1, 1), False))  # 6: nobody made it in stripes
        assert agrees(drawn, torch.randn(1, 4, height, 9), [4, 6])


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_large_weights_between_small_ones(threads: int) -> None:
    """These are shared out by their rows, so what they read and write is not split."""
    torch.set_num_threads(threads)
    drawn = Drawn()
    drawn.conv(0, (16, 8, 3, 3), 0.2, padding=(1, 1, 1, 1), activation="relu")  # 1, striped
    drawn.conv(1, (192, 16, 3, 3), 1.0, padding=(1, 1, 1, 1))  # 2, by rows
    drawn.conv(2, (16, 192, 1, 1), 0.1, add=1, activation="relu")  # 3, striped, over what is not split
    drawn.steps.append(Add(3, 1, "none"))  # 4
    drawn.conv(4, (16, 16, 3, 3), 0.2, padding=(1, 1, 1, 1))  # 5
    drawn.conv(5, (16, 16, 1, 1), 0.2, add=4)  # 6, in place of 4
    for height in (10, 11):
        assert agrees(drawn, torch.randn(1, 8, height, 10), [6])
        assert agrees(drawn, torch.randn(1, 8, height, 10), [2, 4, 5])


@pytest.mark.parametrize("threads", [2, 3, 5])
@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_depthwise_windows(size: int, stride: int, threads: int) -> None:
    """Their kernel reads rows of up to three shares, 32 planes at a time; channels may have several rows each."""
    torch.set_num_threads(threads)
    around = (size // 2,) * 4
    for height, multiplier in ((2 * threads * stride, 1), (31, 1), (24, 3)):
        drawn = Drawn()
        drawn.conv(0, (40, 8, 1, 1), 0.3, activation="relu")  # 1
        shape = (40 * multiplier, 1, size, size)
        drawn.conv(1, shape, 0.8, groups=40, stride=(stride, stride), padding=around, activation="relu6")  # 2
        drawn.conv(2, (24, 40 * multiplier, 1, 1), 0.1)  # 3
        drawn.conv(3, (24, 1, size, size), 1.0, groups=24, padding=around, add=3)  # 4
        drawn.conv(0, (8, 1, size, size), 1.0, groups=8, stride=(stride, stride), padding=(0, 2, 1, 0))  # 5, an input
        assert agrees(drawn, torch.randn(1, 8, height, 19), [4, 5], 2e-5)


@pytest.mark.parametrize("threads", [2, 3])
def test_what_cannot_be_striped_beside_what_can(threads: int) -> None:
    """Groups, dilated depthwise windows and paddings that repeat the image."""
    torch.set_num_threads(threads)
    around = (1, 1, 1, 1)
    drawn = Drawn()
    drawn.conv(0, (16, 8, 3, 3), 0.3, padding=around)  # 1
    drawn.conv(1, (16, 1, 3, 3), 1.0, groups=16, dilation=(2, 2), padding=(2, 2, 2, 2), activation="relu6")  # 2
    drawn.conv(2, (16, 16, 1, 1), 0.3, add=1)  # 3
    drawn.conv(3, (16, 8, 3, 3), 0.3, groups=2, padding=around)  # 4
    for mode in ("reflect", "replicate", "circular"):
        drawn.conv(len(drawn.steps), (16, 16, 3, 3), 0.3, padding=around, padding_mode=mode)  # 5, 6, 7
    drawn.conv(7, (16, 16, 3, 3), 0.3, padding=around, stride=(2, 2))  # 8
    assert agrees(drawn, torch.randn(1, 8, 13, 12), [8, 3], 2e-5)


@pytest.mark.parametrize("batch", [3, 5])
def test_fewer_images_than_would_give_each_thread_two(batch: int) -> None:
    torch.set_num_threads(4)
    assert agrees(chain(SAME, SAME), torch.randn(batch, 8, 17, 7), [4, 1])


@pytest.mark.parametrize(
    ("dtype", "relative"), [(torch.float64, 1e-13), (torch.bfloat16, 0.06), (torch.float16, 0.008)]
)
def test_every_dtype(dtype: torch.dtype, relative: float) -> None:
    torch.set_num_threads(3)
    drawn = chain(SAME, ((3, 3), (2, 2), (1, 1), (1, 1, 1, 1)), SAME)
    drawn.dtype = dtype
    x = torch.randn(1, 8, 25, 9).to(dtype)
    assert agrees(drawn, x, [6, 3], relative)
