"""Interleaved timing: every arm is visited in every round, so that a slow spell of the machine hits all alike.

Arms are compared within rounds (`Timings.ratio`): two arms of one round saw the same machine, two medians may not have.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch

from fxsparse.errors import FxsparseError

Result = TypeVar("Result")
Arm = Callable[[], Any]
Calls = Sequence[tuple[Arm, int, int]]  # what to call, how often before it is timed, and how often in a row then


class Clock(Protocol):
    """Gives the milliseconds of one call, for each of the calls."""

    def __call__(self, calls: Calls) -> list[float]:
        """Call and time."""


_SHORTEST_MS = 1e-6  # stands for a sample in which the clock did not advance, so that ratios exist
_MOST_REPEATS = 1000
_WARM_UP_SHARE = 0.5  # of the budget, for all arms together
_WARM_UP_SAMPLES = 30
_WARM_UP_WINDOW = 3  # samples whose median is compared with that of as many before them
_STILL_FALLS = 0.97  # a later median below this share of the earlier one: the arm is not warm yet
_GRAPH_WARM_UP = 3


@dataclasses.dataclass(frozen=True)
class Timing:
    """The time of one call of one arm, in milliseconds.

    Attributes:
        median_ms: median over the rounds.
        low_ms, high_ms: quartiles.
        ci_low_ms, ci_high_ms: 95 % confidence interval of the median, free of assumptions about the distribution;
            the smallest and largest sample where there are fewer than six rounds, which cannot give 95 %.
        rounds: number of rounds.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    ci_low_ms: float
    ci_high_ms: float
    rounds: int


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How one arm's time relates to another's: above 1, the first is slower.

    Attributes:
        median: of the rounds' ratios.
        low, high: 95 % confidence interval of the median, as in `Timing`.
    """

    median: float
    low: float
    high: float


class Timings(Mapping[str, Timing]):
    """The times of several arms, by name, with the samples that they come from.

    Args:
        samples: by arm, the milliseconds of one call in each round.

    Raises:
        FxsparseError: there is an arm without samples, or arms have unequal numbers of them.
    """

    def __init__(self, samples: Mapping[str, Sequence[float]]) -> None:
        """Keep the samples; the statistics are computed when they are asked for."""
        self._samples = {name: tuple(values) for name, values in samples.items()}
        self._timings: dict[str, Timing] = {}
        counts = {name: len(values) for name, values in self._samples.items()}
        if len(set(counts.values())) > 1 or 0 in counts.values():
            raise FxsparseError(f"The arms have {counts} samples. Give each the same number, at least one.")

    @property
    def samples(self) -> dict[str, tuple[float, ...]]:
        """By arm, the milliseconds of one call in each round."""
        return dict(self._samples)

    def ratio(self, a: str, b: str) -> Ratio:
        """Return the time of arm `a` over that of arm `b`, paired by round.

        Raises:
            KeyError: an arm of this name was not timed.
        """
        ordered = sorted(x / y for x, y in zip(self._samples[a], self._samples[b], strict=True))
        return Ratio(_quantile(ordered, 0.5), *_median_interval(ordered))

    def spread(self, name: str) -> float:
        """Return the distance of the quartiles as a share of the median: large on a noisy machine.

        Raises:
            KeyError: an arm of this name was not timed.
        """
        timing = self[name]
        return (timing.high_ms - timing.low_ms) / timing.median_ms

    def __getitem__(self, name: str) -> Timing:
        """Return the time of an arm."""
        if name not in self._timings:
            ordered = sorted(self._samples[name])
            low, median, high = (_quantile(ordered, share) for share in (0.25, 0.5, 0.75))
            self._timings[name] = Timing(median, low, high, *_median_interval(ordered), len(ordered))
        return self._timings[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the arms' names, in the order in which they were given."""
        return iter(self._samples)

    def __len__(self) -> int:
        """Return the number of arms."""
        return len(self._samples)

    def __repr__(self) -> str:
        """Return the statistics, without the samples."""
        return f"Timings({dict(self)})"


def interleaved(
    arms: Mapping[str, Arm],
    device: torch.device,
    *,
    budget_s: float = 0.15,
    min_rounds: int = 7,
    max_rounds: int = 60,
    sample_ms: float = 0.3,
    cold: bool = True,
    settle_ms: float = 0.0,
    stop: Callable[[Timings], bool] | None = None,
) -> Timings:
    """Time several callables against each other, in inference mode.

    Each arm is called until it is warm. Then every round visits all arms, in an order in which each follows each
    other one equally often.

    Args:
        arms: by name, what to call. What an arm raises is not caught.
        device: where they compute; on CUDA, events on the current stream are used.
        budget_s: wall-clock seconds for the rounds, about: they stop there once there are `min_rounds`. Warming up
            adds at most half as much, or two calls of each arm.
        min_rounds, max_rounds: rounds measured at the least and at the most.
        sample_ms: a sample repeats the call until it lasts about this long, so that the clock's step does not show.
        cold: flush the L2 cache of a CUDA device before each sample, which is then a single call: in a model, other
            layers ran since this one's data was last used. Without effect on other devices.
        settle_ms: before each sample the call is repeated for about this long, once at the least, and not timed: until
            it has forgotten the arm before, whose data is in the caches and whose threads may still spin.
        stop: is asked after each round from `min_rounds` on; True ends the measurement.

    Returns:
        By name, the time of one call; also the samples and their ratios.

    Raises:
        FxsparseError: the numbers of rounds are not 1 <= min_rounds <= max_rounds.
    """
    if not 1 <= min_rounds <= max_rounds:
        raise FxsparseError(
            f"min_rounds={min_rounds}, max_rounds={max_rounds}: 1 <= min_rounds <= max_rounds must hold."
        )
    on_cuda = device.type == "cuda"
    most = 1 if on_cuda and cold else _MOST_REPEATS
    with torch.inference_mode():
        clock = _cuda_clock(device, cold) if on_cuda else _cpu_clock
        share_s = _WARM_UP_SHARE * budget_s / max(len(arms), 1)
        calls = []
        for arm in arms.values():
            call_ms = _warm_up(arm, clock, share_s, sample_ms, most)
            settle = min(math.ceil(settle_ms / call_ms), _MOST_REPEATS)
            calls.append((arm, settle, _repeats(sample_ms, call_ms, most)))
        samples: dict[str, list[float]] = {name: [] for name in arms}
        names = list(arms)
        start = time.perf_counter()
        for i in range(max_rounds):
            turn = order(len(names), i)
            times = clock([calls[k] for k in turn])
            for k, ms in zip(turn, times, strict=True):
                samples[names[k]].append(max(ms, _SHORTEST_MS))
            if i + 1 < min_rounds:
                continue
            if time.perf_counter() - start > budget_s or (stop is not None and stop(Timings(samples))):
                break
    return Timings(samples)


def one_round(arms: Mapping[str, Arm], device: torch.device, index: int, *, cold: bool = True) -> dict[str, float]:
    """Call each of several callables once and time it: for samples that are taken between other work.

    Args:
        arms: by name, what to call. What an arm raises is not caught.
        device: where they compute.
        index: of the round, which rotates the order as in `interleaved`.
        cold: as in `interleaved`.

    Returns:
        By name, milliseconds.
    """
    clock = _cuda_clock(device, cold) if device.type == "cuda" else _cpu_clock
    names = list(arms)
    turn = order(len(names), index)
    times = clock([(arms[names[k]], 0, 1) for k in turn])
    return {names[k]: max(ms, _SHORTEST_MS) for k, ms in zip(turn, times, strict=True)}


def one_call(arm: Callable[[], Result], device: torch.device, *, cold: bool = True) -> tuple[float, Result]:
    """Call something once; return its milliseconds and its result.

    Args:
        arm: what to call. What it raises is not caught.
        device: where it computes.
        cold: as in `interleaved`.
    """
    result = []
    clock = _cuda_clock(device, cold) if device.type == "cuda" else _cpu_clock
    (ms,) = clock([(lambda: result.append(arm()), 0, 1)])
    return max(ms, _SHORTEST_MS), result[0]


def graphed(arm: Arm, device: torch.device) -> Arm:
    """Capture an arm in a CUDA graph, so that its kernels are timed and not their launches.

    Args:
        arm: what to capture, in inference mode. Its inputs are read at their present addresses at each replay. What
            it raises is not caught.
        device: a CUDA device.

    Returns:
        A callable that replays the graph on the current stream; it returns what the arm returned in the capture,
        which each replay overwrites. It keeps the arm, and with it what the arm holds.

    Raises:
        FxsparseError: the device is not a CUDA device.
    """
    if device.type != "cuda":
        raise FxsparseError(f"Only work on a CUDA device can be captured in a graph; this is '{device}'.")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.inference_mode():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_GRAPH_WARM_UP):  # workspaces and lazily chosen kernels cannot be made during a capture
                arm()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph, stream=side):
            out = arm()

    def replay(alive: Arm = arm) -> Any:  # the arm holds its inputs, whose memory the graph reads
        graph.replay()
        return out

    return replay


def _warm_up(arm: Arm, clock: Clock, share_s: float, sample_ms: float, most: int) -> float:
    """Call an arm until its time no longer falls; return the time of one call in milliseconds.

    Its samples grow to `sample_ms`, at most `most` calls, as it gets faster.
    """
    arm()  # allocations, lazily chosen kernels, compilation: says nothing about the calls after it
    times: list[float] = []
    repeats = 1
    start = time.perf_counter()
    while len(times) < _WARM_UP_SAMPLES:
        times += clock([(arm, 0, repeats)])
        repeats = _repeats(sample_ms, max(times[-1], _SHORTEST_MS), most)
        if _is_stable(times) or time.perf_counter() - start > share_s:
            break
    return max(times[-1], _SHORTEST_MS)


def _repeats(sample_ms: float, call_ms: float, most: int) -> int:
    return max(1, min(most, int(sample_ms / call_ms)))


def _is_stable(times: list[float]) -> bool:
    before, last = (sorted(times[-k * _WARM_UP_WINDOW :][:_WARM_UP_WINDOW]) for k in (2, 1))
    return len(times) >= 2 * _WARM_UP_WINDOW and _quantile(last, 0.5) >= _STILL_FALLS * _quantile(before, 0.5)


def order(count: int, index: int) -> list[int]:
    """Return the order of `count` arms in a round: over 2 · count rounds each follows each other equally often.

    This is Williams' design: the rotations of 0, 1, -1, 2, -2, ..., and then the same backwards.
    """
    zigzag = [(i + 1) // 2 if i % 2 else -(i // 2) for i in range(count)]
    order = [(k + index) % count for k in zigzag]
    return order if index // max(count, 1) % 2 == 0 else order[::-1]


def _cpu_clock(calls: Calls) -> list[float]:
    times = []
    for arm, settle, repeats in calls:
        for _ in itertools.repeat(None, settle):
            arm()
        start = time.perf_counter()
        for _ in itertools.repeat(None, repeats):
            arm()
        times.append((time.perf_counter() - start) / repeats * 1e3)
    return times


def _cuda_clock(device: torch.device, cold: bool) -> Clock:
    """Return a clock that enqueues all its calls and waits once, at the end."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(2 * cache if cold else 0, dtype=torch.uint8, device=device)

    def clock(calls: Calls) -> list[float]:
        stream = torch.cuda.current_stream(device)
        spans = []
        for arm, settle, repeats in calls:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in itertools.repeat(None, settle):
                arm()
            if cold:
                flush.zero_()
            start.record(stream)
            for _ in itertools.repeat(None, repeats):
                arm()
            end.record(stream)
            spans.append((start, end, repeats))
        stream.synchronize()
        return [float(start.elapsed_time(end)) / repeats for start, end, repeats in spans]

    return clock


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Return a quantile, interpolated; equal neighbours give exactly their value."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def _median_interval(ordered: Sequence[float]) -> tuple[float, float]:
    cut = _interval_cut(len(ordered))
    return ordered[cut], ordered[-1 - cut]


@functools.cache
def _interval_cut(count: int) -> int:
    """Return how many samples the 95 % interval of the median leaves out at either end.

    The median lies below the k-th smallest of n samples with probability P(Binomial(n, 1/2) < k): the interval leaves
    out as many as keep that at 2.5 % or less.
    """
    cut, outside = 0, 1
    while (outside + math.comb(count, cut + 1)) * 40 <= 2**count:
        cut += 1
        outside += math.comb(count, cut)
    return cut
