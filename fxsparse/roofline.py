"""What a device can do at best: the time below which no kernel for a given amount of work will get.

Arithmetic is bounded by the best large matrix product, traffic by the best bandwidth at the size of the working set:
a small layer stays in a cache and would beat a bound made of the memory's bandwidth.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxsparse import timing
from fxsparse.errors import FxsparseError

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_KIB, _MIB = 1 << 10, 1 << 20
_CPU_WORKING_SETS = (256 * _KIB, 2 * _MIB, 16 * _MIB, 128 * _MIB)
_CUDA_WORKING_SETS = (2 * _MIB, 16 * _MIB, 128 * _MIB, 1024 * _MIB)
_CPU_PRODUCTS = (256, 512, 1024, 2048)  # sides of square matrices
_CUDA_PRODUCTS = (1024, 2048, 4096, 8192)
_LONGEST_PRODUCT_MS = 40.0  # a larger product is left out, which only matters where the dtype has no fast one
_GRAPHED_COPIES = 16


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The two ceilings of a device, for one dtype.

    Attributes:
        flops_per_s: floating-point operations a second; a multiply-add counts as two.
        bandwidth: (bytes of the working set, bytes a second), by ascending size; what is read and what is written
            both count.
    """

    flops_per_s: float
    bandwidth: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        """Check the values."""
        sizes = [size for size, _ in self.bandwidth]
        rates = [self.flops_per_s, *(rate for _, rate in self.bandwidth)]
        if not sizes or sizes != sorted(set(sizes)) or not all(0 < rate < math.inf for rate in rates):
            raise FxsparseError(
                f"{self!r} is not a roofline: give at least one working-set size, ascending, and positive rates."
            )

    def bound_ms(self, macs: int, nbytes: int) -> float:
        """Return the least time for some work, in milliseconds.

        Args:
            macs: multiply-adds. An algorithm that does with fewer of them (Winograd's) is not bound by this.
            nbytes: bytes moved at the least: inputs and weights read once, outputs written once.
        """
        return max(2 * macs / self.flops_per_s, nbytes / self._bandwidth_at(nbytes)) * 1e3

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"flops_per_s": self.flops_per_s, "bandwidth": [list(pair) for pair in self.bandwidth]}

    def _bandwidth_at(self, nbytes: int) -> float:
        """Return a bandwidth that a working set of this size will not exceed.

        That is the one of the next smaller measured size, as bandwidth falls with size; where it was measured to
        rise, small copies were slow for other reasons (the cost of a call), and the best of the larger sizes stands.
        """
        smaller = [i for i, (size, _) in enumerate(self.bandwidth) if size <= nbytes]
        return max(rate for _, rate in self.bandwidth[smaller[-1] if smaller else 0 :])


def measure(device: torch.device, dtype: torch.dtype) -> Roofline:
    """Measure a device, once per process, dtype and number of threads; it takes about half a second.

    Random state is left alone.

    Args:
        device: CPU or CUDA.
        dtype: float32, float64, bfloat16 or float16.

    Raises:
        FxsparseError: the dtype is another one.
    """
    if dtype not in _DTYPES:
        raise FxsparseError(f"There is no roofline for {dtype}. Choose one of {', '.join(map(str, _DTYPES))}.")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _measure(device, dtype, torch.get_num_threads())


@functools.cache
def _measure(device: torch.device, dtype: torch.dtype, threads: int) -> Roofline:
    sizes = _CUDA_WORKING_SETS if device.type == "cuda" else _CPU_WORKING_SETS
    with torch.inference_mode():
        return Roofline(_flops_per_s(device, dtype), tuple((size, _bandwidth(device, size)) for size in sizes))


def _flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    best = 0.0
    for side in _CUDA_PRODUCTS if device.type == "cuda" else _CPU_PRODUCTS:
        # Not zeros, on which a chip may run faster, and not random, which would move the caller's random state.
        matrix = torch.linspace(-1, 1, side * side, device=device).reshape(side, side).to(dtype)
        ms = _best_ms(_products(matrix), device, budget_s=0.03)
        best = max(best, 2 * side**3 / (ms / 1e3))
        if 8 * ms > _LONGEST_PRODUCT_MS:
            break
    return best


def _products(matrix: Tensor) -> dict[str, Callable[[], Any]]:
    """Return ways to multiply a square matrix by itself."""
    arms: dict[str, Callable[[], Any]] = {"product": lambda: torch.mm(matrix, matrix)}
    if matrix.is_cuda:
        # By default, torch lets convolutions use TF32 and products not; the faster of the two is the ceiling.
        pixels, weight = matrix.t()[None, :, :, None], matrix[:, :, None, None]
        arms["1x1 convolution"] = lambda: F.conv2d(pixels, weight)
    return arms


def _bandwidth(device: torch.device, working_set: int) -> float:
    """Return the bytes a second of a copy, or of reading alone where that is faster."""
    count = working_set // 2 // torch.float32.itemsize
    source, target = (torch.linspace(-1, 1, count, device=device) for _ in range(2))
    if device.type == "cuda":  # a small copy takes less time than its launch
        copies = timing.graphed(lambda: [target.copy_(source) for _ in range(_GRAPHED_COPIES)], device)
        return 2 * source.nbytes * _GRAPHED_COPIES / (_best_ms({"copies": copies}, device, budget_s=0.03) / 1e3)
    arms = {"copy": lambda: target.copy_(source), "read": lambda: torch.dot(source, target)}
    return 2 * source.nbytes / (_best_ms(arms, device, budget_s=0.03) / 1e3)


def _best_ms(arms: dict[str, Callable[[], Any]], device: torch.device, *, budget_s: float) -> float:
    """Return the shortest sample of any arm: noise only ever adds time."""
    times = timing.interleaved(arms, device, budget_s=budget_s, min_rounds=3, cold=False)
    return min(min(samples) for samples in times.samples.values())
