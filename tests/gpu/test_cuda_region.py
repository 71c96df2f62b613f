"""Regions on CUDA: the operator's steps and layouts, and whole small models, against float64."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from models import error_in_float64, masked_dense, random_masks
from region_cases import RELATIVE, Drawn, agrees, batch_inner_net, residual_net
from torch import Tensor, nn

import fxsparse
from fxsparse.graph_module import ConvertedModule
from fxsparse.ops.region import NONE, Add, Average, MaxPool

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact_float32", "poisoned_memory")]
OP = torch.ops.fxsparse.region_batch_inner
SLEEP_CYCLES = 200_000_000  # about 0.1 s


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", list(RELATIVE))
@pytest.mark.parametrize("batch", [1, 3, 8, 12, 64, 100])
@pytest.mark.usefixtures("storage")
def test_every_step(batch: int, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    x = torch.randn(batch, 8, 19, 14, device="cuda", dtype=dtype).contiguous(memory_format=memory_format)
    agrees(batch_inner_net(), x, [12, 11, 9, 8, 3, 2], (8, 3))


@pytest.mark.parametrize("tile_rows", [64, 128])
@pytest.mark.parametrize("dtype", list(RELATIVE))
@pytest.mark.parametrize("channels, density", [(24, 0.3), (200, 0.05), (136, 0.9)])
@pytest.mark.parametrize("batch, height, width", [(1, 9, 14), (5, 11, 9), (12, 8, 8), (64, 21, 6), (256, 18, 17)])
def test_convolutions_pool_by_themselves(
    batch: int, height: int, width: int, channels: int, density: float, dtype: torch.dtype, tile_rows: int
) -> None:
    drawn = Drawn(normed=True)
    drawn.conv(0, (channels, 8, 3, 3), padding=(1, 1, 1, 1), activation="silu")  # 1
    drawn.steps.append(MaxPool(1, (2, 2), (2, 2), (0, 0), (1, 1), False))  # 2
    drawn.conv(2, (channels, channels, 3, 3), density, padding=(2, 1, 0, 2), stride=(1, 2), dilation=(2, 1))  # 3
    drawn.steps.append(MaxPool(3, (2, 2), (2, 2), (0, 0), (1, 1), True))  # 4
    x = torch.randn(batch, 8, height, width, device="cuda", dtype=dtype)
    x[0, :, height // 2, 1] = float("nan")
    tensors = drawn.tiled(x, tile_rows)
    pooled = OP([x], tensors, drawn.program, [2], [], False)[0]
    last = OP([x], tensors, drawn.program, [4], [], False)[0]
    # A result that leaves the region is written before it is pooled.
    one_by_one = OP([x], tensors, drawn.program, [1, 2, 3, 4], [], False)
    # Few images may be summed in another order when they are not pooled.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype] if batch < 8 else 0
    same = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
    torch.testing.assert_close(pooled, one_by_one[1], **same)
    torch.testing.assert_close(last, one_by_one[3], **same)
    assert pooled.isnan().any() and not pooled.isnan().all()
    assert torch.equal(pooled.isnan(), torch.max_pool2d(one_by_one[0], 2).isnan())


@pytest.mark.parametrize("dtype", list(RELATIVE))
@pytest.mark.parametrize("batch, height, width", [(1, 9, 14), (2, 30, 30), (7, 5, 33), (12, 8, 8)])
@pytest.mark.usefixtures("storage")
def test_convolutions_of_every_geometry(batch: int, height: int, width: int, dtype: torch.dtype) -> None:
    drawn = Drawn(normed=True)
    drawn.conv(0, (40, 8, 7, 7), padding=(3, 3, 3, 3), stride=(2, 2), activation="relu")  # 1: reads the input itself
    drawn.conv(1, (72, 40, 1, 1), activation="silu")  # 2
    drawn.conv(2, (72, 36, 3, 3), padding=(2, 2, 2, 2), dilation=(2, 2), groups=2, add=2)  # 3
    drawn.conv(3, (96, 72, 1, 1), stride=(1, 2))  # 4
    drawn.conv(4, (96, 96, 3, 2), padding=(1, 1, 0, 1), add=4, activation="hardswish")  # 5
    drawn.conv(5, (24, 96, 1, 1), padding=(0, 1, 0, 3))  # 6: positions in the padding are the bias
    x = torch.randn(batch, 8, height, width, device="cuda", dtype=dtype)
    agrees(drawn, x, [1, 3, 4, 5, 6], (3,))


def test_few_images_run_as_torch_stores_them() -> None:
    drawn = Drawn(normed=True)
    drawn.conv(0, (256, 64, 1, 1), 0.1)
    drawn.conv(1, (64, 256, 1, 1), 0.1)
    names = {}
    for batch in (7, 8):
        x = torch.randn(batch, 64, 14, 14, device="cuda", dtype=torch.bfloat16)
        agrees(drawn, x, [2])
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            drawn.run_batch_inner([x], [2])
        names[batch] = [event.key for event in profile.key_averages()]
    assert any("plane_conv" in name for name in names[7])
    assert not any("plane_conv" in name for name in names[8])


def test_a_storage_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXSPARSE_CUDA_STORAGE", "plane")
    with pytest.raises(RuntimeError, match="is 'plane', expected 'planes' or 'batch_inner'"):
        OP([torch.randn(1, 8, 4, 4, device="cuda")], [], Add(0, NONE, "none").numbers(), [1], [], False)


def test_odd_rows_that_are_padded_between_steps() -> None:
    """Residual additions, a pooling and a mean of values whose rows have a lane more than torch's."""
    for width in (1, 7, 13):
        drawn = Drawn(normed=True)
        drawn.conv(0, (96, 8, 3, 3), 0.2, padding=(1, 1, 1, 1), activation="relu")  # 1
        drawn.conv(1, (96, 96, 1, 1), 0.1)  # 2
        drawn.conv(2, (96, 96, 3, 3), 0.05, padding=(1, 1, 1, 1), add=1, activation="relu")  # 3
        drawn.steps += [MaxPool(3, (3, 3), (1, 1), (1, 1), (1, 1), False), Add(4, 1, "relu"), Average(5)]  # 4, 5, 6
        x = torch.randn(2, 8, width, width, device="cuda", dtype=torch.bfloat16)
        agrees(drawn, x, [6])
        agrees(drawn, x, [3, 5])


@pytest.mark.usefixtures("storage")
def test_the_steps_of_a_cpu_region() -> None:
    drawn = residual_net()
    drawn.normed = True
    agrees(drawn, torch.randn(9, 8, 23, 14, device="cuda"), [7, 2, 5, 4])


@pytest.mark.parametrize("dtype", list(RELATIVE))
@pytest.mark.parametrize(
    ("channels", "height", "width"), [(3, 7, 5), (8, 1, 1), (64, 14, 14), (40, 9, 31), (130, 3, 3), (16, 33, 65)]
)
@pytest.mark.parametrize("batch", [1, 8, 63, 200])
@pytest.mark.usefixtures("storage")
def test_changes_of_layout_are_exact(batch: int, channels: int, height: int, width: int, dtype: torch.dtype) -> None:
    x = torch.randn(batch, channels, height, width, device="cuda", dtype=dtype)
    program = Add(0, NONE, "none").numbers()
    formats = (torch.contiguous_format, torch.channels_last)
    for memory_format, last in itertools.product(formats, ([], [1])):
        (got,) = OP([x.contiguous(memory_format=memory_format)], [], program, [1], last, False)
        assert torch.equal(got, x)
        assert got.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@pytest.mark.parametrize("dtype", list(RELATIVE))
@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "silu"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.usefixtures("storage")
def test_poolings_of_an_input_are_exact_and_pass_nan(
    dtype: torch.dtype, activation: str, memory_format: torch.memory_format
) -> None:
    x = 4 * torch.randn(20, 24, 13, 11, device="cuda", dtype=dtype).contiguous(memory_format=memory_format)
    x[3, 5, 6, 7] = float("nan")
    pool = MaxPool(1, (3, 2), (2, 1), (1, 1), (1, 2), True)
    active = Add(0, NONE, activation).run([x], []) if activation != "none" else x
    steps = [Add(0, NONE, activation), pool]
    (got,) = OP([x], [], [n for step in steps for n in step.numbers()], [2], [], False)
    wanted = torch.max_pool2d(active, *pool[1:])
    torch.testing.assert_close(got, wanted.contiguous(), equal_nan=True)
    assert bool(wanted.isnan().any())
    (alone,) = OP([x], [], MaxPool(0, *pool[1:]).numbers(), [1], [], False)
    assert torch.equal(alone.nan_to_num(), torch.max_pool2d(x, *pool[1:]).nan_to_num())


@pytest.mark.usefixtures("storage")
def test_an_input_that_is_read_twice_is_moved_once_and_whole() -> None:
    x = torch.randn(10, 16, 8, 8, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    steps = [MaxPool(0, (2, 2), (2, 2), (0, 0), (1, 1), False), Average(0), Add(0, 0, "relu")]
    pooled, mean, twice = OP([x], [], [n for step in steps for n in step.numbers()], [1, 2, 3], [], False)
    assert torch.equal(pooled, torch.max_pool2d(x, 2))
    torch.testing.assert_close(mean, x.float().mean((2, 3), keepdim=True).bfloat16())
    (stays, silu) = OP([x], [], [*Average(0).numbers(), *Add(1, NONE, "silu").numbers()], [1, 2], [], False)
    assert torch.equal(stays, mean)
    torch.testing.assert_close(silu, torch.nn.functional.silu(mean))
    assert torch.equal(twice, torch.relu(x + x).contiguous())


@pytest.mark.usefixtures("storage")
def test_tensors_may_begin_anywhere() -> None:
    drawn = batch_inner_net()
    x = torch.randn(9, 8, 12, 12, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)

    def shifted(tensor: Tensor) -> Tensor:
        moved = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device="cuda")[1:]
        return moved.as_strided(tensor.shape, tensor.stride(), 1).copy_(tensor)

    tensors = drawn.tiled(x)
    (wanted,) = OP([x], tensors, drawn.program, [8], [], False)
    (got,) = OP([shifted(x)], [shifted(tensor) for tensor in tensors], drawn.program, [8], [], False)
    assert torch.equal(got, wanted)


def test_empty_batches_and_refusals() -> None:
    drawn = batch_inner_net()
    x = torch.randn(0, 8, 12, 12, device="cuda")
    assert drawn.run_batch_inner([x], [12])[0].shape == (0, 21, 1, 1)
    x = torch.randn(8, 8, 12, 12, device="cuda")
    with pytest.raises(RuntimeError, match="bfloat16, float16 or float32"):
        drawn.run_batch_inner([x.double()], [12])
    tensors = drawn.tiled(x)
    for at, value, message in [(2, tensors[2][:, :3], "'tiles'"), (0, tensors[0].half(), "'tile_values' has dtype")]:
        wrong = [*tensors[:at], value, *tensors[at + 1 :]]
        with pytest.raises(RuntimeError, match=message):
            OP([x], wrong, drawn.program, [12], [], False)
    with pytest.raises(RuntimeError, match="twice, or an input"):
        OP([x], tensors, drawn.program, [0], [], False)


@pytest.mark.usefixtures("storage")
def test_replays_of_a_graph_are_bit_stable_and_read_new_inputs() -> None:
    drawn = batch_inner_net()
    x = torch.randn(64, 8, 20, 20, device="cuda", dtype=torch.bfloat16)
    tensors = drawn.tiled(x)

    def call() -> Tensor:
        return OP([x], tensors, drawn.program, [8], [], False)[0]

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        wanted = call()
        for _ in range(300):
            out.fill_(float("nan"))
            graph.replay()
            assert torch.equal(out, wanted)


def test_it_runs_on_the_current_stream_and_waits_for_nobody() -> None:
    drawn = batch_inner_net()
    x, fresh = (torch.randn(16, 8, 20, 20, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    tensors, side, done = drawn.tiled(x), torch.cuda.Stream(), torch.cuda.Event()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        OP([x], tensors, drawn.program, [8], [], False)  # fills the stream's memory pool
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP_CYCLES)
        x.copy_(fresh)
        (out,) = OP([x], tensors, drawn.program, [8], [], False)
        done.record()
    assert not done.query(), "the call waited for the device"
    torch.cuda.synchronize()
    assert torch.equal(out, OP([fresh], tensors, drawn.program, [8], [], False)[0])


class Residual(nn.Module):
    """A small residual network: stem, pooling, a block that strides and one that does not, a head."""

    def __init__(self, stem: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, stem, 2, stem // 2, bias=False), nn.BatchNorm2d(64))
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.first = nn.Conv2d(64, 96, 3, 2, 1)
        self.second = nn.Conv2d(96, 96, 3, padding=1)
        self.short = nn.Conv2d(64, 96, 1, 2)
        self.third = nn.Conv2d(96, 96, 3, padding=1)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.stem(x)))
        x = self.relu(self.second(self.relu(self.first(x))) + self.short(x))
        return self.head(self.relu(self.third(x) + x))


def plain() -> nn.Module:
    """Return a small network like VGG."""
    layers: list[nn.Module] = []
    for channels, out in ((3, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 10))


MODELS: dict[str, Callable[[], nn.Module]] = {"plain": plain, "residual": Residual, "large stem": lambda: Residual(7)}


def converted(model: nn.Module, x: Tensor, path: str = "sparse") -> tuple[ConvertedModule, nn.Module]:
    """Return a model on the sparse paths, and the masked dense one."""
    masks = random_masks(model, 0.2)
    settings = fxsparse.Settings(calibrate=False)
    fast = fxsparse.convert(model, masks, example_inputs=(x,), settings=settings)
    fxsparse.set_mode(fast, path)
    assert isinstance(fast, ConvertedModule)
    return fast, masked_dense(model, masks)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", list(RELATIVE))
@pytest.mark.parametrize("batch", [8, 12, 64])
@pytest.mark.parametrize("name", list(MODELS))
def test_whole_models(name: str, batch: int, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    model = MODELS[name]().eval().to("cuda", dtype)
    x = torch.randn(batch, 3, 32, 32, device="cuda", dtype=dtype).contiguous(memory_format=memory_format)
    fast, dense = converted(model, x)
    assert fast.code.count("region_batch_inner.default") or fast.code.count("region_batch_inner_default")
    with torch.no_grad():
        for images in (x, x[:5]):
            assert error_in_float64(fast(images), dense, images) < 16 * torch.finfo(dtype).eps


def test_a_whole_model_is_one_region_whose_mean_leaves_it() -> None:
    x = torch.randn(16, 3, 32, 32, device="cuda", dtype=torch.bfloat16)
    fast, _ = converted(Residual().eval().to("cuda", torch.bfloat16), x)
    calls = [line for line in fast.code.splitlines() if "torch.ops.fxsparse" in line]
    assert len(calls) == 1 and "region_batch_inner" in calls[0]
    behind = fast.code.split("region_batch_inner")[-1]
    assert "torch.squeeze" in behind and "head" not in behind


def test_a_model_calibrates_with_regions_as_replays_of_graphs() -> None:
    model = Residual().eval().to("cuda", torch.bfloat16)
    masks = random_masks(model, 0.1)
    x = torch.randn(64, 3, 64, 64, device="cuda", dtype=torch.bfloat16)
    settings = fxsparse.Settings(deploy="graph", budget_s=6)
    fast = fxsparse.convert(model, masks, example_inputs=(x,), settings=settings)
    with torch.no_grad():
        assert error_in_float64(fast(x), masked_dense(model, masks), x) < 16 * torch.finfo(torch.bfloat16).eps
    again = fxsparse.convert(model, masks, settings=fxsparse.Settings(calibrate=False))
    fxsparse.calibrate(again, (x,), plan=fast.plan, deploy="graph")
    assert [row.path for row in again.report.rows] == [row.path for row in fast.report.rows]
    with torch.no_grad():
        assert torch.equal(again(x), fast(x))


def test_weights_that_change_reach_the_tiles() -> None:
    x = torch.randn(8, 3, 32, 32, device="cuda")
    fast, dense = converted(Residual().eval().cuda(), x)
    halved = {key for key, value in fast.state_dict().items() if "third" in key and value.is_floating_point()}
    state = {key: value * 0.5 if key in halved else value for key, value in fast.state_dict().items()}
    before = fast(x)
    fast.load_state_dict(state)
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if "third" in name:
                parameter.mul_(0.5)
        assert not torch.equal(fast(x), before)
        assert error_in_float64(fast(x), dense, x) < 1e-5


def test_copies_casts_and_moves_keep_their_tiles() -> None:
    x = torch.randn(8, 3, 32, 32, device="cuda")
    fast, dense = converted(Residual().eval().cuda(), x)
    with torch.no_grad():
        wanted = fast(x)
        assert torch.equal(copy.deepcopy(fast)(x), wanted)
        half = copy.deepcopy(fast).half()
        assert error_in_float64(half(x.half()), dense, x) < 1e-2
        back = copy.deepcopy(fast).cpu()
        assert not any("tile" in name for name, _ in back.named_buffers())
        torch.testing.assert_close(back(x.cpu()), wanted.cpu(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(back.cuda()(x), wanted, rtol=1e-4, atol=1e-5)


def test_autocast_runs_a_region_in_its_dtype() -> None:
    x = torch.randn(8, 3, 32, 32, device="cuda")
    fast, dense = converted(Residual().eval().cuda(), x)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        got = fast(x)
    assert got.dtype == torch.bfloat16
    assert error_in_float64(got, dense, x) < 16 * torch.finfo(torch.bfloat16).eps


def test_saving_and_freezing(tmp_path: object) -> None:
    x = torch.randn(8, 3, 32, 32, device="cuda", dtype=torch.bfloat16)
    fast, _ = converted(Residual().eval().to("cuda", torch.bfloat16), x)
    path = f"{tmp_path}/model.fxs"
    with torch.no_grad():
        wanted = fast(x)
        fxsparse.save(fast, path)
        loaded = fxsparse.load(path)
        assert torch.equal(loaded.cuda()(x), wanted)
        assert torch.equal(fxsparse.freeze(fast)(x), wanted)


class WideNet(nn.Module):
    """Two convolutions whose 256 rows share their columns, with a pooling that the first does itself and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(64, 256, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.second = nn.Conv2d(256, 256, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.first(x).relu())
        return (self.second(x) + x).relu()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_many_images_get_tiles_of_128_rows_where_rows_share_columns(dtype: torch.dtype) -> None:
    model = WideNet().eval().to("cuda", dtype)
    masks = {"first": torch.rand(1, 64, 3, 3) < 0.95, "second": torch.rand(1, 256, 3, 3) < 0.5}
    masks = {name: mask.cuda().expand_as(model.get_submodule(name).weight) for name, mask in masks.items()}  # type: ignore[arg-type]
    dense = masked_dense(model, masks)
    for images, wide in ((8, 64), (250, 64 if dtype == torch.float32 else 128)):
        x = torch.randn(images, 64, 16, 16, device="cuda", dtype=dtype)
        fast = fxsparse.convert(model, masks, example_inputs=(x,), settings=fxsparse.Settings(calibrate=False))
        fxsparse.set_mode(fast, "sparse")
        rows = fast.get_buffer("second.weight_tile_rows").numel() // fast.get_buffer("second.weight_tiles").shape[0]
        assert rows == wide
        with torch.no_grad():
            for some in (x, x[:3], torch.cat([x, x])):  # with tiles for the first
                assert error_in_float64(fast(some), dense, some) < 16 * torch.finfo(dtype).eps
