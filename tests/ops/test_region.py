"""The operator `region` against float64 convolutions, step by step, and what it refuses."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from region_cases import Drawn, close, residual_net

import fxsparse
from fxsparse.ops.region import ACTIVATIONS, NONE, PADDING_MODES, Add, Average, MaxPool, reference, steps_of

compiled = pytest.mark.skipif(fxsparse.capabilities().cpu == "reference", reason="the compiled operators are not built")


@pytest.fixture
def threads() -> object:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 7, 16])
def test_it_computes_what_its_steps_do(batch: int, count: int, threads: object) -> None:
    threads(count)  # type: ignore[operator]
    drawn, x = residual_net(), torch.randn(batch, 8, 23, 14)
    outputs = [7, 2, 5, 4]
    assert close(drawn.run([x], outputs), drawn.oracle([x], outputs), 1e-5)


@pytest.mark.parametrize(
    ("dtype", "relative"),
    [(torch.float64, 1e-13), (torch.bfloat16, 0.06), (torch.float16, 0.008)],
)
def test_every_dtype(dtype: torch.dtype, relative: float) -> None:
    drawn, x = residual_net(), torch.randn(3, 8, 12, 12).to(dtype)
    drawn.dtype = dtype
    got = drawn.run([x], [7])
    assert got[0].dtype == dtype
    assert close(got, drawn.oracle([x], [7]), relative)


def test_many_small_images_go_through_in_chunks_of_several_sizes() -> None:
    """Large planes are taken one by one, small ones by the dozen, and a value crosses from one to the other."""
    drawn = Drawn()
    drawn.conv(0, (64, 3, 3, 3), padding=(1, 1, 1, 1), activation="relu")
    drawn.conv(1, (64, 64, 3, 3), density=0.1, padding=(1, 1, 1, 1), activation="relu")
    for value in (2, 3, 4):
        drawn.steps.append(MaxPool(value, (2, 2), (2, 2), (0, 0), (1, 1), False))
    drawn.conv(5, (48, 64, 3, 3), density=0.1, padding=(1, 1, 1, 1))
    drawn.conv(6, (48, 48, 3, 3), density=0.1, padding=(1, 1, 1, 1), add=6)
    for batch in (2, 5, 38):
        x = torch.randn(batch, 3, 40, 40)
        assert close(drawn.run([x], [7, 3]), drawn.oracle([x], [7, 3]), 1e-5)


def test_large_planes_behind_small_ones() -> None:
    """As in a decoder: the last convolution reads the first one's result."""
    drawn = Drawn()
    drawn.conv(0, (32, 8, 3, 3), padding=(1, 1, 1, 1))
    drawn.steps.append(MaxPool(1, (4, 4), (4, 4), (0, 0), (1, 1), False))
    drawn.conv(2, (32, 32, 1, 1))
    drawn.conv(1, (32, 32, 3, 3), padding=(1, 1, 1, 1))
    x = torch.randn(6, 8, 64, 64)
    assert close(drawn.run([x], [3, 4]), drawn.oracle([x], [3, 4]), 1e-5)


sizes = st.integers(1, 3)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_random_regions(threads: object, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**20)))
    threads(data.draw(st.sampled_from([1, 2, 3, 5])))  # type: ignore[operator]
    drawn = Drawn()
    batch, height, width = (data.draw(st.integers(1, most)) for most in (5, 20, 20))
    channels = [data.draw(st.sampled_from([4, 8, 20]))]
    x = torch.randn(batch, channels[0], height, width)
    planes = [(height, width)]
    for _ in range(data.draw(st.integers(1, 5))):
        source = data.draw(st.integers(0, len(planes) - 1))
        plane, most = planes[source], max(planes[source])
        if data.draw(st.booleans()):
            groups = data.draw(st.sampled_from([1, 2]))
            out = data.draw(st.sampled_from([4, 16, 34]))
            mode = data.draw(st.sampled_from(PADDING_MODES))
            kernel = tuple(data.draw(st.integers(1, min(3, size))) for size in plane)
            dilation = tuple(
                data.draw(st.integers(1, 2)) if (k - 1) * 2 < s else 1 for k, s in zip(kernel, plane, strict=True)
            )
            pads = [min(data.draw(st.integers(0, 2)), plane[side // 2] - 1) for side in range(4)]
            same = [i for i in range(len(planes)) if planes[i] == plane and channels[i] == out]
            flat = kernel == (1, 1) and not any(pads)
            drawn.conv(
                source,
                (out, channels[source] // groups, *kernel),
                density=data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
                groups=groups,
                padding=tuple(pads),
                dilation=dilation,
                padding_mode=mode,
                stride=(1, 1) if flat else tuple(data.draw(sizes) for _ in range(2)),
                activation=data.draw(st.sampled_from(ACTIVATIONS)),
                biased=data.draw(st.booleans()),
                add=data.draw(st.sampled_from(same)) if same and flat else NONE,
            )
        elif most > 1 and data.draw(st.booleans()):
            kernel = tuple(data.draw(st.integers(1, min(3, size))) for size in plane)
            window = (kernel, (data.draw(sizes), data.draw(sizes)), tuple(k // 2 for k in kernel), (1, 1))
            drawn.steps.append(MaxPool(source, *window, data.draw(st.booleans())))
        else:
            same = [i for i in range(len(planes)) if planes[i] == plane and channels[i] == channels[source]]
            drawn.steps.append(
                Add(source, data.draw(st.sampled_from([NONE, *same])), data.draw(st.sampled_from(ACTIVATIONS)))
            )
        shape = drawn.oracle([x], [len(planes)])[0].shape
        channels.append(shape[1])
        planes.append((shape[2], shape[3]))
    outputs = data.draw(st.lists(st.integers(1, len(planes) - 1), min_size=1, unique=True))
    assert close(drawn.run([x], outputs), drawn.oracle([x], outputs), 2e-5)


@pytest.mark.parametrize(
    ("dtype", "relative"),
    [(torch.float32, 1e-5), (torch.float64, 1e-13), (torch.bfloat16, 0.06), (torch.float16, 0.008)],
)
def test_means_of_planes(dtype: torch.dtype, relative: float, threads: object) -> None:
    """Of a region's own values and of its input, read by a convolution, and as its result."""
    drawn = Drawn()
    drawn.dtype = dtype
    drawn.conv(0, (24, 8, 3, 3), padding=(1, 1, 1, 1))  # 1
    drawn.steps.append(Average(1))  # 2
    drawn.conv(2, (24, 24, 1, 1), activation="silu")  # 3
    drawn.conv(0, (24, 8, 1, 1))  # 4
    drawn.conv(4, (24, 24, 3, 3), padding=(1, 1, 1, 1))  # 5: reads on what is averaged, too
    drawn.steps.append(Average(4))  # 6
    drawn.steps.append(Average(0))  # 7
    drawn.steps.append(Average(3))  # 8: of one pixel
    for count in (1, 2, 3):
        threads(count)  # type: ignore[operator]
        for batch, size in ((1, (7, 7)), (1, (5, 33)), (3, (16, 16)), (8, (1, 2))):
            x = torch.randn(batch, 8, *size).to(dtype)
            outputs = [2, 3, 5, 6, 7, 8]
            assert close(drawn.run([x], outputs), drawn.oracle([x], outputs), relative)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [2, 3, 7, 8, 16, 17, 31, 64, 66])
@pytest.mark.parametrize("ceil", [False, True])
def test_windows_of_two_by_two(width: int, ceil: bool, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 5, width, dtype=dtype)
    drawn = Drawn(steps=[MaxPool(0, (2, 2), (2, 2), (0, 0), (1, 1), ceil)])
    assert torch.equal(drawn.run([x], [1])[0], F.max_pool2d(x, 2, ceil_mode=ceil))
    for place in ((0, 1, 0, 0), (1, 2, 3, width - 1), (1, 0, 2, width // 2)):
        x[place] = float("nan")
    got = drawn.run([x], [1])[0]
    assert torch.equal(got.nan_to_num(7.0), F.max_pool2d(x, 2, ceil_mode=ceil).nan_to_num(7.0))


def test_nan_and_infinity_pass_a_maximum() -> None:
    drawn = Drawn(
        steps=[MaxPool(0, (3, 3), (2, 2), (1, 1), (1, 1), True), MaxPool(0, (2, 2), (3, 3), (1, 1), (1, 1), False)]
    )
    x = torch.randn(2, 3, 9, 11)
    x[0, 0, 3, 3], x[0, 1, 0, 0], x[1, 2, 8, 10] = float("nan"), float("-inf"), float("inf")
    for got, wanted in zip(drawn.run([x], [1, 2]), drawn.oracle([x], [1, 2]), strict=True):
        assert torch.equal(got.double().nan_to_num(7.0), wanted.nan_to_num(7.0))


def test_inputs_of_any_strides_and_one_image() -> None:
    drawn, x = residual_net(), torch.randn(2, 8, 10, 10)
    wanted = drawn.oracle([x], [7])
    assert close(drawn.run([x.to(memory_format=torch.channels_last)], [7]), wanted, 1e-5)
    assert close(drawn.run([x.repeat_interleave(2, 3)[..., ::2]], [7]), wanted, 1e-5)
    assert close(drawn.run([x[0]], [7]), [wanted[0][0]], 1e-5)


def test_no_image() -> None:
    drawn = residual_net()
    (got,) = drawn.run([torch.empty(0, 8, 10, 10)], [5])
    assert got.shape == (0, 32, 3, 3)


def test_several_inputs() -> None:
    drawn = Drawn()
    drawn.conv(0, (8, 4, 1, 1))
    drawn.steps[-1] = drawn.steps[-1]._replace(input=1, add=0)  # type: ignore[call-arg]
    inputs = [torch.randn(3, 8, 5, 5), torch.randn(3, 4, 5, 5)]
    assert close(drawn.run(inputs, [2]), drawn.oracle(inputs, [2]), 1e-5)


def test_programs_are_read_as_they_are_written() -> None:
    drawn = residual_net()
    assert list(steps_of(drawn.program)) == drawn.steps


@compiled
def test_the_kernel_agrees_with_the_reference() -> None:
    drawn, x = residual_net(), torch.randn(2, 8, 10, 10)
    for got, wanted in zip(drawn.run([x], [7, 4]), reference([x], drawn.tensors, drawn.program, [7, 4]), strict=True):
        assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-5)
        assert got.stride() == wanted.stride()


def test_opcheck() -> None:
    drawn, x = residual_net(), torch.randn(2, 8, 10, 10)
    torch.library.opcheck(torch.ops.fxsparse.region.default, ([x], drawn.tensors, drawn.program, [7, 4]))


def test_gradients() -> None:
    drawn, x = residual_net(), torch.randn(2, 8, 6, 6, requires_grad=True)
    values = drawn.tensors[0].requires_grad_()
    first, _ = torch.ops.fxsparse.region([x], drawn.tensors, drawn.program, [7, 4])
    found = torch.autograd.grad(first.square().sum(), (x, values))
    wanted = torch.autograd.grad(reference([x], drawn.tensors, drawn.program, [7])[0].square().sum(), (x, values))
    for g, w in zip(found, wanted, strict=True):
        assert torch.allclose(g, w, rtol=1e-3, atol=1e-3 * float(w.abs().max()))


def test_autocast() -> None:
    drawn, x = residual_net(), torch.randn(2, 8, 10, 10)
    with torch.autocast("cpu", torch.bfloat16):
        (got,) = torch.ops.fxsparse.region([x], drawn.tensors, drawn.program, [7])
    assert got.dtype == torch.bfloat16
    assert close([got], drawn.oracle([x], [7]), 0.06)


def changed(numbers: list[int], *changes: tuple[int, int]) -> list[int]:
    numbers = list(numbers)
    for at, value in changes:
        numbers[at] = value
    return numbers


@compiled
@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, 5, "a step of kind 5"),
        (1, 1, "names the value 1"),
        (1, -1, "names the value -1"),
        (2, 5, "names the value 5"),
        (2, 0, "adds images of 8 x 10 x 10 to such of 16 x 10 x 10"),
        (3, 99, "names tensor 99"),
        (4, -2, "names tensor -2"),
        (6, 4, "'rows' has dtype"),
        (7, 0, "'bias' has shape"),
        (9, 9, "'input' has 8 channels"),
        (12, 0, "'stride'"),
        (14, -1, "'padding'"),
        (20, 3, "'groups' is 3"),
        (21, 4, "padding mode 4"),
        (22, 5, "activation 5"),
        (24, 7, "names the value 7"),
        (25, 0, "'kernel_size'"),
        (25, 30, "covers"),
        (29, 4, "at most half"),
    ],
)
def test_a_wrong_program_is_refused(at: int, value: int, message: str) -> None:
    drawn, x = residual_net(), torch.randn(1, 8, 10, 10)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fxsparse.region([x], drawn.tensors, changed(drawn.program, (at, value)), [7])


@compiled
def test_a_cut_program_and_wrong_arguments_are_refused() -> None:
    drawn, x = residual_net(), torch.randn(1, 8, 10, 10)
    run = torch.ops.fxsparse.region
    for length in itertools.chain(range(1, 23), range(24, 34)):
        with pytest.raises(RuntimeError, match="ends within a step|names"):
            run([x], drawn.tensors, drawn.program[:length], [1])
    for outputs in ([0], [8], [-1], [7, 7]):
        with pytest.raises(RuntimeError, match="The region (gives|names)"):
            run([x], drawn.tensors, drawn.program, outputs)
    with pytest.raises(RuntimeError, match="different numbers of images"):
        run([x, torch.randn(2, 8, 10, 10)], drawn.tensors, drawn.program, [7])
    with pytest.raises(RuntimeError, match="dtype"):
        run([x.double()], drawn.tensors, drawn.program, [7])
    with pytest.raises(RuntimeError, match="expected \\(N, C, H, W\\)"):
        run([x[0, 0]], drawn.tensors, drawn.program, [7])
