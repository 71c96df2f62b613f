"""`conv2d_planes` on CUDA: every tile against float64, layouts, streams, graphs, hostile tables."""

from __future__ import annotations

import itertools
from typing import Any

import hostile_tables
import pytest
import test_cuda_tiled
import torch
from drawn import Drawn, random_case
from test_cuda_tiled import DTYPES, HALVES, OPTIONS, _check
from torch import Tensor

pytestmark = pytest.mark.gpu
OP = torch.ops.fxsparse.conv2d_planes
TILES = ((0, 0, 0), *itertools.product((32, 64), (8, 16), (1, 2, 4, 8)))


def _arguments(case: Drawn, rows: int = 64, **changes: Any) -> dict[str, Any]:
    return test_cuda_tiled._arguments(case, rows, **{"input": case.input, "add": case.added} | changes)


def _run(arguments: dict[str, Any]) -> Tensor:
    poison = torch.full((1 << 20,), float("nan"), device="cuda")
    del poison  # what the output's memory holds, if the allocator reuses it
    return OP(**arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [64, 128])
def test_every_option_and_tile_agrees_with_float64(dtype: torch.dtype | str, rows: int) -> None:
    for options in OPTIONS.values():
        case = Drawn(dtype=dtype, **options)
        arguments = _arguments(case, rows)
        for tile in TILES:
            _check(case, _run(arguments | {"tile": tile}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(24))
def test_random_calls_agree_with_float64(seed: int, dtype: torch.dtype | str) -> None:
    case, rng = random_case(seed, dtype, (1, 2, 5, 7))
    arguments = _arguments(case)
    for tile in (TILES[0], TILES[1 + rng.integers(len(TILES) - 1)]):
        _check(case, _run(arguments | {"tile": tile}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_of_any_strides(dtype: torch.dtype | str) -> None:
    case = Drawn(dtype=dtype, batch=3, add=True, size=(12, 18))
    last = torch.channels_last
    ways = {
        "channels_last": lambda t: t.contiguous(memory_format=last),
        "rows of a larger image": lambda t: torch.nn.functional.pad(t, (1, 4, 2, 3))[:, :, 2:-3, 1:-4],
        "every other channel": lambda t: t.repeat_interleave(2, 1)[:, ::2],
        "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        "an odd address": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    }
    for name, way in ways.items():
        got = _run(_arguments(case, input=way(case.input), add=way(case.added)))
        _check(case, got)
        layout = last if name == "channels_last" else torch.contiguous_format
        assert got.is_contiguous(memory_format=layout), name
    one = case.input[:1].expand(3, -1, -1, -1)
    _check(case, _run(_arguments(case, input=one)), one)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "silu", "hardswish"])
def test_nan_passes_through_every_activation(activation: str, dtype: torch.dtype | str) -> None:
    case = Drawn(dtype=dtype, batch=2, activation=activation, add=True)
    case.added.fill_(float("nan"))
    for tile in TILES:
        assert _run(_arguments(case, tile=tile)).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns_that_nobody_kept_do_not_spread_nan(dtype: torch.dtype | str) -> None:
    options = {"in_channels": 256, "out_channels": 8, "kernel": (1, 1), "padding": (0, 0, 0, 0), "residual": 0.02}
    case = Drawn(dtype=dtype, batch=1, blocks=0.0, **options)
    unread = ~(case.weight != 0).any(0)[:, 0, 0]
    assert unread.any()
    with_nan = case.input.clone()
    with_nan[:, unread] = float("nan")
    for tile in TILES:
        _check(case, _run(_arguments(case, input=with_nan, tile=tile)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_streams_at_once_do_not_disturb_each_other(dtype: torch.dtype | str) -> None:
    cases = [Drawn(dtype=dtype, batch=4, seed=seed, size=(30, 30), activation="relu", add=True) for seed in (0, 1)]
    arguments = [_arguments(case) for case in cases]
    expected = [OP(**own) for own in arguments]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    outs: list[list[Tensor]] = [[], []]
    for _ in range(20):
        for stream, own, out in zip(streams, arguments, outs, strict=True):
            with torch.cuda.stream(stream):
                out.append(OP(**own, overlap=True))
    torch.cuda.synchronize()
    for out, want in zip(outs, expected, strict=True):
        assert all(torch.equal(got, want) for got in out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", [(0, 0, 0), (32, 8, 8), (64, 16, 1)], ids=str)
def test_a_chain_in_a_graph_replays_a_thousand_times_bit_equal(tile: tuple[int, ...], dtype: torch.dtype | str) -> None:
    """A chain whose launches overlap, several deep: each reads what the one before wrote, in memory used again."""
    options = {"in_channels": 96, "out_channels": 96, "size": (8, 8), "blocks": 0.2, "activation": "relu"}
    case = Drawn(dtype=dtype, batch=1, bias=True, **options)
    arguments = _arguments(case, tile=tile, overlap=True)
    arguments["tile_values"] = arguments["tile_values"] * 0.05  # so that nothing overflows

    def chain() -> Tensor:
        value = arguments["input"]
        for _ in range(8):
            value = OP(**arguments | {"input": value, "add": value})
            value = OP(**arguments | {"input": value, "add": None})
        return value

    wanted = chain()
    alone = arguments["input"]
    for _ in range(8):
        for add in (True, False):
            alone = OP(**arguments | {"input": alone, "add": alone if add else None, "overlap": False})
            torch.cuda.synchronize()
    assert torch.equal(alone, wanted) and wanted.isfinite().all() and wanted.any()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain()
    for _ in range(1000):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, wanted)


def test_bad_arguments_are_refused() -> None:
    case = Drawn(dtype=torch.bfloat16, batch=1)
    for tile in ((16, 8, 1), (32, 4, 1), (32, 8, 3), (32, 8)):
        with pytest.raises(RuntimeError, match="'tile' is"):
            OP(**_arguments(case, tile=tile))
    with pytest.raises(RuntimeError, match="bfloat16, float16 or float32"):
        OP(**_arguments(case, input=case.input.double()))
    with pytest.raises(RuntimeError, match="'add' has shape"):
        OP(**_arguments(case, add=case.input))
    large = torch.empty(1, 24, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="has more than 2"):
        OP(**_arguments(case, input=large))


def test_tables_that_point_outside_stop_the_kernel() -> None:
    calls = [("bfloat16", {}, True), ("float32", {}, False), ("float32", {"allow_tf32": True}, False)]
    for damage, text in hostile_tables.outputs("test_cuda_planes", 1, calls).items():
        assert "REFUSED" in text and "illegal memory access" not in text, f"{damage}: {text}"
