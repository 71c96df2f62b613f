"""Interleaved timing: every arm is visited in every round, so that a slow spell of the machine hits all alike."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Timing:
    """The time of one call of one arm.

    Attributes:
        median_ms: median over the rounds, in milliseconds.
        low_ms, high_ms: quartiles.
        rounds: number of rounds.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    rounds: int


def interleaved(
    arms: Mapping[str, Callable[[], Any]],
    device: torch.device,
    *,
    budget_s: float = 0.15,
    min_rounds: int = 7,
    max_rounds: int = 60,
    sample_ms: float = 0.3,
) -> dict[str, Timing]:
    """Time several callables against each other.

    Args:
        arms: by name, what to call.
        device: where they compute; on CUDA, events on the current stream are used.
        budget_s: wall-clock time to spend, about; the rounds stop there once there are `min_rounds`.
        min_rounds, max_rounds: rounds measured at the least and at the most; odd rounds visit the arms in
            reverse order.
        sample_ms: a sample repeats the call until it lasts about this long, so that the clock's step does not show.

    Returns:
        By name, the time of one call.
    """
    clock = _cuda_clock if device.type == "cuda" else _cpu_clock
    with torch.inference_mode():
        repeats = {}
        for name, arm in arms.items():
            arm()  # first call: allocations, lazily chosen kernels
            once = clock(arm, 1, device)
            repeats[name] = max(1, min(1000, int(sample_ms / max(once, 1e-6))))
            clock(arm, repeats[name], device)
        samples: dict[str, list[float]] = {name: [] for name in arms}
        start = time.perf_counter()
        for i in range(max_rounds):
            order = list(arms.items())
            for name, arm in order if i % 2 == 0 else reversed(order):
                samples[name].append(clock(arm, repeats[name], device))
            if i + 1 >= min_rounds and time.perf_counter() - start > budget_s:
                break
    return {name: _summary(values) for name, values in samples.items()}


def _summary(values: list[float]) -> Timing:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, low, high, len(values))


def _cpu_clock(arm: Callable[[], Any], repeats: int, device: torch.device) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        arm()
    return (time.perf_counter() - start) / repeats * 1e3


def _cuda_clock(arm: Callable[[], Any], repeats: int, device: torch.device) -> float:
    stream = torch.cuda.current_stream(device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record(stream)
    for _ in range(repeats):
        arm()
    end.record(stream)
    end.synchronize()
    return float(start.elapsed_time(end)) / repeats
