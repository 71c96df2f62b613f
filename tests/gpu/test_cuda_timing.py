"""The timer and the roofline on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fxsparse import plan, roofline
from fxsparse.timing import graphed, interleaved

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
SLEEP_CYCLES = 2_000_000  # about a millisecond


def test_events_measure_the_device_and_not_the_launch() -> None:
    arms = {
        "once": lambda: torch.cuda._sleep(SLEEP_CYCLES),
        "thrice": lambda: torch.cuda._sleep(3 * SLEEP_CYCLES),
    }
    times = interleaved(arms, CUDA)
    assert times["once"].median_ms > 0.2
    assert times.ratio("thrice", "once").median == pytest.approx(3, rel=0.2)


def test_samples_are_enqueued_without_waiting_within_a_round() -> None:
    waited = []
    done = torch.cuda.Event()

    def first() -> None:
        torch.cuda._sleep(50 * SLEEP_CYCLES)
        done.record()

    interleaved({"first": first, "second": lambda: waited.append(done.query())}, CUDA, min_rounds=3, max_rounds=3)
    # Warming up waits after every call, and in half of the rounds the second arm is the one that comes first.
    assert not all(waited), "each sample waited for the one before"


def test_a_flushed_cache_is_slower_than_a_warm_one() -> None:
    cache = torch.cuda.get_device_properties(CUDA).L2_cache_size
    data = torch.rand(cache // 4 // 4, device=CUDA)  # a quarter of the cache, and as much for the result
    out = torch.empty_like(data)
    arms = {"add": graphed(lambda: torch.add(data, 1, out=out), CUDA)}
    cold, warm = (  # samples of one call each, so that both have the same overhead
        interleaved(arms, CUDA, sample_ms=0, cold=value)["add"].median_ms for value in (True, False)
    )
    assert cold > warm


def test_a_graphed_arm_agrees_with_the_eager_one_on_new_values() -> None:
    x = torch.randn(2, 8, 16, 16, device=CUDA)
    weight = torch.randn(8, 8, 3, 3, device=CUDA)

    def arm() -> torch.Tensor:
        return torch.relu(torch.conv2d(x, weight, padding=1))

    replay = graphed(arm, CUDA)
    for _ in range(2):
        x.normal_()
        torch.testing.assert_close(replay(), arm(), rtol=1e-2, atol=1e-2)  # TF32
    times = interleaved({"eager": arm, "graphed": replay}, CUDA)
    assert times["graphed"].median_ms > 0


def test_a_replay_keeps_the_inputs_that_nobody_else_holds() -> None:
    def captured(value: float) -> Callable[[], torch.Tensor]:
        x = torch.full((1 << 24,), value, device=CUDA)
        return graphed(lambda: x + 1, CUDA)

    replays = [captured(float(k)) for k in range(4)]
    torch.cuda.empty_cache()
    assert [float(replay().mean()) for replay in replays] == [1.0, 2.0, 3.0, 4.0]


def test_an_error_of_an_arm_comes_out_of_the_capture() -> None:
    def arm() -> None:
        raise ZeroDivisionError("the arm's own")

    with pytest.raises(ZeroDivisionError, match="the arm's own"):
        graphed(arm, CUDA)
    assert not torch.cuda.is_current_stream_capturing()


def test_timing_follows_the_current_stream() -> None:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        times = interleaved({"a": lambda: torch.cuda._sleep(SLEEP_CYCLES)}, CUDA, min_rounds=3, max_rounds=3)
    assert times["a"].median_ms > 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_roofline_makes_sense_and_leaves_random_state_alone(dtype: torch.dtype) -> None:
    before = torch.cuda.get_rng_state()
    line = roofline.measure(CUDA, dtype)
    assert roofline.measure(torch.device("cuda", torch.cuda.current_device()), dtype) is line
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert line.flops_per_s > 1e11
    assert all(rate > 1e10 for _, rate in line.bandwidth)


def test_the_device_has_its_own_name() -> None:
    assert plan.device_name(CUDA) == torch.cuda.get_device_name()
    assert plan.environment(CUDA)["device"] == torch.cuda.get_device_name()
