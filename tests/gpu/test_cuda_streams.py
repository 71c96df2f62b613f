"""The CUDA kernels on side streams, on two streams at once and in CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from drawn import Drawn

pytestmark = pytest.mark.gpu
OPS = torch.ops.fxsparse
SLEEP_CYCLES = 200_000_000  # about 0.1 s


def _warm_up(stream: torch.cuda.Stream, call: Callable[[], object]) -> None:
    """Fill the stream's memory pool: a first allocation may wait for the device."""
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()


def test_the_kernel_waits_for_the_stream_it_is_called_on() -> None:
    case = Drawn(add=True)
    fresh = case.draw(*case.input.shape, seed=7)
    side = torch.cuda.Stream()
    done = torch.cuda.Event()

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        values = OPS.repack(case.weight, *case.tables(), case.packed.values.numel())
        return case.run(), OPS.unpack(values, *case.tables(), case.weight_shape)

    _warm_up(side, call)
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP_CYCLES)
        case.input.copy_(fresh)
        out, weight = call()
        done.record()
    assert not done.query(), "the calls waited for the device"
    done.wait()
    out.record_stream(torch.cuda.current_stream())
    case.check(out, fresh)
    assert torch.equal(weight, case.weight)


def test_work_on_the_default_stream_does_not_delay_a_side_stream() -> None:
    case = Drawn()
    side = torch.cuda.Stream()
    _warm_up(side, case.run)
    asleep, done = torch.cuda.Event(), torch.cuda.Event()
    torch.cuda._sleep(10 * SLEEP_CYCLES)
    asleep.record()
    with torch.cuda.stream(side):
        out = case.run()
        done.record()
    done.synchronize()
    assert not asleep.query(), "the kernel ran on the default stream"
    torch.cuda.synchronize()
    case.check(out)


def test_two_streams_at_once_do_not_disturb_each_other() -> None:
    cases = [Drawn(seed=seed, size=(40, 40), activation="relu", add=True) for seed in (0, 1)]
    expected = [case.run() for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    outs: list[list[torch.Tensor]] = [[], []]
    for _ in range(20):
        for stream, case, out in zip(streams, cases, outs, strict=True):
            with torch.cuda.stream(stream):
                out.append(OPS.conv2d(**case.arguments()))
    torch.cuda.synchronize()
    for out, want in zip(outs, expected, strict=True):
        assert all(torch.equal(got, want) for got in out)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_a_captured_graph_replays_bit_equal(mode: str, channels_last: bool) -> None:
    case = Drawn(mode=mode, activation="silu", add=True)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    static = case.input.clone(memory_format=memory_format)

    def forward() -> tuple[torch.Tensor, torch.Tensor]:
        values = OPS.repack(case.weight, *case.tables(), case.packed.values.numel())
        return OPS.conv2d(**case.arguments(input=static, values=values)), OPS.unpack(
            values, *case.tables(), case.weight_shape
        )

    _warm_up(torch.cuda.Stream(), forward)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, weight = forward()
    for replay in range(50):
        fresh = case.draw(*static.shape, seed=100 + replay)
        static.copy_(fresh)
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, OPS.conv2d(**case.arguments(input=fresh)))
        assert torch.equal(weight, case.weight)
    case.check(out, fresh)
