"""Regions whose threads share every step, and sums that are written over what is added."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_region import Drawn, close
from torch import Tensor

from fxsparse.ops.region import NONE, Add, MaxPool

THREADS = [1, 2, 3, 5]
BATCHES = [1, 2, 3, 5, 7]
AROUND = (1, 1, 1, 1)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def sums(density: float = 0.3) -> Drawn:
    """Return sums over dead shortcuts (4, 7, 8, 9, 11, 14), over one that is read later (6), and over inputs."""
    drawn = Drawn()
    drawn.conv(0, (16, 8, 3, 3), density, padding=AROUND, activation="relu")  # 2
    drawn.conv(2, (24, 16, 1, 1), density, activation="relu6")  # 3
    drawn.conv(3, (16, 24, 1, 1), density, add=2, activation="relu")  # 4, over 2
    drawn.conv(4, (16, 16, 3, 3), density, padding=AROUND)  # 5
    drawn.conv(5, (16, 16, 1, 1), density, add=4)  # 6: 4 is read again
    drawn.conv(5, (16, 16, 1, 1), density, add=6)  # 7, over 6
    drawn.conv(5, (16, 16, 3, 3), density, padding=AROUND, add=7, activation="silu")  # 8, over 7
    drawn.steps.append(Add(8, 4, "relu"))  # 9, over 4
    drawn.steps.append(Add(9, NONE, "hardswish"))  # 10, over 9
    drawn.conv(10, (16, 16, 1, 1), density, add=1)  # 11
    drawn.steps.append(Add(11, 1, "none"))  # 12
    drawn.steps.append(Add(1, NONE, "relu"))  # 13
    drawn.steps.append(Add(1, 13, "none"))  # 14, over 13
    drawn.conv(12, (16, 16, 3, 3), density, padding=AROUND, add=14)  # 15, over 14
    return drawn


def inputs(batch: int, size: tuple[int, int] = (9, 11)) -> list[Tensor]:
    return [torch.randn(batch, 8, *size), torch.randn(batch, 16, *size)]


def agrees(drawn: Drawn, given: list[Tensor], outputs: list[int], relative: float = 1e-5) -> bool:
    """Tell whether a region computes what it should, twice the same, and leaves its inputs alone."""
    before = [x.clone() for x in given]
    got, again = drawn.run(given, outputs), drawn.run(given, outputs)
    assert all(torch.equal(a, b) for a, b in zip(before, given, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    return close(got, drawn.oracle(given, outputs), relative)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("threads", THREADS)
def test_sums_in_place_agree(threads: int, batch: int) -> None:
    torch.set_num_threads(threads)
    drawn = sums()
    for outputs in ([15], [2, 6, 8, 10, 11, 13, 14]) if batch % 2 else ([15], [4, 7, 9, 12]):
        assert agrees(drawn, inputs(batch), outputs), outputs


@pytest.mark.parametrize("density", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("threads", [1, 3])
def test_sums_in_place_of_any_density(threads: int, density: float) -> None:
    torch.set_num_threads(threads)
    drawn = sums(density)
    for batch in (1, 2, 7):
        assert agrees(drawn, inputs(batch), [15])


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (3, 5), (33, 57)])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_sums_in_place_on_planes_of_any_size(threads: int, size: tuple[int, int]) -> None:
    torch.set_num_threads(threads)
    drawn = sums()
    for batch in (1, 3) if size[0] < 33 else (1,):
        assert agrees(drawn, inputs(batch, size), [15, 5])


@pytest.mark.parametrize(
    ("dtype", "relative"), [(torch.float64, 1e-13), (torch.bfloat16, 0.06), (torch.float16, 0.008)]
)
def test_sums_in_place_in_every_dtype(dtype: torch.dtype, relative: float) -> None:
    drawn = sums()
    drawn.dtype = dtype
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        assert agrees(drawn, [x.to(dtype) for x in inputs(3)], [15, 8], relative)


@pytest.mark.parametrize("threads", THREADS)
def test_a_shortcut_that_crosses_a_pooling(threads: int) -> None:
    """Large planes are taken one by one and small ones by the dozen, on both sides of a sum."""
    torch.set_num_threads(threads)
    drawn = Drawn()
    drawn.conv(0, (32, 8, 3, 3), padding=AROUND)  # 1
    drawn.conv(1, (32, 32, 1, 1), activation="relu")  # 2
    drawn.conv(2, (32, 32, 1, 1), add=1, activation="relu")  # 3, over 1
    drawn.steps.append(MaxPool(3, (4, 4), (4, 4), (0, 0), (1, 1), False))  # 4
    drawn.conv(4, (32, 32, 1, 1))  # 5
    drawn.conv(5, (32, 32, 3, 3), padding=AROUND, add=4)  # 6, over 4
    drawn.conv(3, (32, 32, 1, 1), add=3)  # 7: reads what it adds
    drawn.steps.append(Add(6, 6, "none"))  # 8, over 6
    for batch in (1, 3, 10):
        assert agrees(drawn, [torch.randn(batch, 8, 32, 32)], [8, 7])


def test_a_value_added_to_itself() -> None:
    drawn = Drawn()
    drawn.conv(0, (8, 8, 3, 3), padding=AROUND)  # 1
    drawn.steps.append(Add(1, 1, "relu"))  # 2
    drawn.conv(2, (8, 8, 3, 3), padding=AROUND, add=2)  # 3: may not be written over what its window reads
    drawn.conv(3, (8, 8, 1, 1), add=3)  # 4
    for threads in THREADS:
        torch.set_num_threads(threads)
        for batch in (1, 4):
            assert agrees(drawn, [torch.randn(batch, 8, 12, 13)], [4])


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_four_python_threads_at_once(batch: int) -> None:
    torch.set_num_threads(3)
    drawn = sums()
    given = [inputs(batch, (8 + i, 9)) for i in range(4)]

    def repeated(i: int) -> bool:
        return all(agrees(drawn, given[i], [15, 12]) for _ in range(3))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(repeated, range(4)))
