"""The timer, on clocks that are made up: nothing here depends on how fast the machine is."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxsparse import timing
from fxsparse.errors import FxsparseError
from fxsparse.timing import Ratio, Timing, Timings, interleaved

CPU = torch.device("cpu")
POSITIVE = st.floats(1e-6, 1e6)


class Clock:
    """A clock that stands still unless an arm moves it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def arm(self, name: str, *ms: float) -> Callable[[], None]:
        """Return an arm whose calls last so long; the last time is that of all further calls."""
        left = itertools.chain(ms[:-1], itertools.repeat(ms[-1]))

        def call() -> None:
            self.calls.append(name)
            self.now += next(left) / 1e3

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_known_samples_give_known_statistics() -> None:
    times = Timings({"a": [5.0, 1.0, 9.0, 3.0, 7.0, 2.0, 8.0, 4.0, 6.0]})
    # Of nine samples, the 2nd to the 8th cover the median with 1 - 2 (1 + 9) / 2^9 = 96.1 %.
    assert times["a"] == Timing(5.0, 3.0, 7.0, 2.0, 8.0, 9)
    assert times.spread("a") == 0.8
    assert times.samples["a"][:2] == (5.0, 1.0)


@pytest.mark.parametrize(
    ("count", "cut"), [(1, 0), (5, 0), (6, 0), (8, 0), (9, 1), (11, 1), (12, 2), (20, 5), (25, 7), (100, 39)]
)
def test_the_interval_leaves_out_what_the_binomial_table_says(count: int, cut: int) -> None:
    times = Timings({"a": [float(i) for i in range(count)]})
    assert (times["a"].ci_low_ms, times["a"].ci_high_ms) == (cut, count - 1 - cut)


@given(st.integers(6, 400))
def test_the_interval_is_the_narrowest_with_95_percent(count: int) -> None:
    cut = int(Timings({"a": [float(i) for i in range(count)]})["a"].ci_low_ms)
    outside = [2 * sum(math.comb(count, i) for i in range(k + 1)) for k in (cut, cut + 1)]
    assert outside[0] / 2**count <= 0.05 < outside[1] / 2**count


@given(st.lists(POSITIVE, min_size=1, max_size=60))
def test_the_interval_contains_the_median_between_the_quartiles(samples: list[float]) -> None:
    times = Timings({"a": samples})
    timed = times["a"]
    assert min(samples) <= timed.ci_low_ms <= timed.median_ms <= timed.ci_high_ms <= max(samples)
    assert min(samples) <= timed.low_ms <= timed.median_ms <= timed.high_ms <= max(samples)
    assert times.spread("a") >= 0
    assert json.loads(json.dumps(dataclasses.asdict(timed))) == dataclasses.asdict(timed)


@given(st.lists(POSITIVE, min_size=1, max_size=60))
def test_the_ratio_of_an_arm_to_itself_is_one(samples: list[float]) -> None:
    assert Timings({"a": samples}).ratio("a", "a") == Ratio(1.0, 1.0, 1.0)


@given(st.lists(st.tuples(POSITIVE, POSITIVE), min_size=1, max_size=60))
def test_the_interval_of_a_ratio_contains_it(pairs: list[tuple[float, float]]) -> None:
    a, b = zip(*pairs, strict=True)
    ratio = Timings({"a": a, "b": b}).ratio("a", "b")
    assert min(x / y for x, y in pairs) <= ratio.low <= ratio.median <= ratio.high <= max(x / y for x, y in pairs)


def test_the_ratio_is_paired_by_round() -> None:
    drifting = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    times = Timings({"a": [2 * ms for ms in drifting], "b": drifting})
    assert times.ratio("a", "b") == Ratio(2.0, 2.0, 2.0)
    assert times["b"].ci_high_ms > times["a"].ci_low_ms  # apart, the two cannot be told from each other


def test_timings_are_a_mapping_in_the_order_given() -> None:
    times = Timings({"b": [1.0], "a": [2.0]})
    assert list(times) == ["b", "a"]
    assert len(times) == 2
    assert dict(times)["a"].median_ms == 2.0
    assert "b" in times
    with pytest.raises(KeyError):
        times["c"]


@pytest.mark.parametrize("samples", [{"a": [1.0], "b": [1.0, 2.0]}, {"a": []}])
def test_arms_without_paired_samples_are_refused(samples: dict[str, list[float]]) -> None:
    with pytest.raises(FxsparseError, match="same number, at least one"):
        Timings(samples)


def test_arms_are_timed_by_the_call(clock: Clock) -> None:
    times = interleaved({"long": clock.arm("long", 4.0), "short": clock.arm("short", 0.01)}, CPU)
    assert times["long"].median_ms == pytest.approx(4.0)
    assert times["short"].median_ms == pytest.approx(0.01)
    assert times.ratio("long", "short").median == pytest.approx(400)


def test_short_arms_are_repeated_until_a_sample_lasts(clock: Clock) -> None:
    interleaved({"a": clock.arm("a", 0.05)}, CPU, min_rounds=3, max_rounds=3, sample_ms=1.0, budget_s=1e-9)
    assert len(clock.calls) == 1 + 1 + 3 * 20  # first call, one to count, and the rounds


def test_a_sample_that_settles_times_none_of_the_calls_before_it(clock: Clock) -> None:
    arm = clock.arm("a", 8.0, 8.0, *(8.0, 1.0) * 3)  # to begin with, to count the repeats, and cold and warm in turn
    times = interleaved({"a": arm}, CPU, min_rounds=3, max_rounds=3, sample_ms=1.0, budget_s=1e-9, settle_ms=1.0)
    assert times.samples["a"] == pytest.approx((1.0, 1.0, 1.0))
    assert len(clock.calls) == 2 + 3 * 2


def test_slow_arms_are_warmed_up_by_two_calls(clock: Clock) -> None:
    interleaved({"a": clock.arm("a", 100.0)}, CPU, min_rounds=3, max_rounds=3)
    assert len(clock.calls) == 2 + 3


def test_a_slow_first_call_does_not_decide_the_repeats(clock: Clock) -> None:
    times = interleaved({"a": clock.arm("a", 30_000.0, 0.1)}, CPU, min_rounds=5, max_rounds=5, sample_ms=1.0)
    assert times["a"].high_ms == pytest.approx(0.1)


def test_warming_up_lasts_while_the_time_falls(clock: Clock) -> None:
    falling = [100 * 0.8**i for i in range(12)]
    times = interleaved({"a": clock.arm("a", *falling, 5.0)}, CPU, min_rounds=3, max_rounds=3, budget_s=60)
    assert times.samples["a"] == pytest.approx((5.0, 5.0, 5.0))
    assert 12 < len(clock.calls) - 3 < 24


def test_warming_up_ends_where_the_time_falls_for_ever(clock: Clock) -> None:
    interleaved(
        {"a": clock.arm("a", *(1000 * 0.9**i for i in range(100)))}, CPU, min_rounds=1, max_rounds=1, budget_s=60
    )
    assert len(clock.calls) <= 1 + 30 + 1


def test_the_budget_ends_the_rounds_but_not_before_the_fewest(clock: Clock) -> None:
    arms = {"a": clock.arm("a", 10.0)}
    assert interleaved(arms, CPU, budget_s=0.205, min_rounds=2)["a"].rounds == 21
    assert interleaved(arms, CPU, budget_s=0.01, min_rounds=7)["a"].rounds == 7
    assert interleaved(arms, CPU, budget_s=100, max_rounds=9)["a"].rounds == 9


def test_stop_is_asked_from_the_fewest_rounds_on(clock: Clock) -> None:
    asked = []

    def stop(times: Timings) -> bool:
        asked.append(times["a"].rounds)
        return times["a"].rounds == 6

    times = interleaved({"a": clock.arm("a", 1.0)}, CPU, budget_s=60, min_rounds=4, stop=stop)
    assert asked == [4, 5, 6]
    assert times["a"].rounds == 6


def test_a_clock_that_does_not_advance_still_gives_ratios(clock: Clock) -> None:
    times = interleaved({"a": clock.arm("a", 0.0), "b": clock.arm("b", 0.0)}, CPU, min_rounds=2, max_rounds=2)
    assert times.ratio("a", "b") == Ratio(1.0, 1.0, 1.0)


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_every_arm_follows_every_other_one_equally_often(count: int, clock: Clock) -> None:
    names = [str(i) for i in range(count)]
    arms = {name: clock.arm(name, 100.0) for name in names}
    rounds = 2 * count
    interleaved(arms, CPU, min_rounds=rounds, max_rounds=rounds, budget_s=1e-9)
    measured = clock.calls[2 * count :]
    visits = [tuple(measured[i : i + count]) for i in range(0, len(measured), count)]
    assert len(visits) == rounds
    assert all(sorted(visit) == names for visit in visits)
    follows = [pair for visit in visits for pair in itertools.pairwise(visit)]
    assert {follows.count(pair) for pair in itertools.permutations(names, 2)} == {2}
    assert {sum(visit[0] == name for visit in visits) for name in names} == {2}


def test_arms_run_in_inference_mode_and_their_errors_come_out() -> None:
    def arm() -> None:
        assert torch.is_inference_mode_enabled()
        raise ZeroDivisionError("the arm's own")

    with pytest.raises(ZeroDivisionError, match="the arm's own"):
        interleaved({"a": arm}, CPU)


def test_no_arms_give_no_times() -> None:
    assert dict(interleaved({}, CPU)) == {}


@pytest.mark.parametrize(("fewest", "most"), [(0, 5), (8, 7)])
def test_numbers_of_rounds_that_cannot_be_are_refused(fewest: int, most: int) -> None:
    with pytest.raises(FxsparseError, match="1 <= min_rounds <= max_rounds"):
        interleaved({"a": lambda: None}, CPU, min_rounds=fewest, max_rounds=most)


def test_a_graph_of_cpu_work_is_refused() -> None:
    with pytest.raises(FxsparseError, match="CUDA"):
        timing.graphed(lambda: None, CPU)


def test_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    interleaved({"a": lambda: None, "b": lambda: None}, CPU, min_rounds=2, max_rounds=2)
    assert torch.equal(torch.get_rng_state(), before)
