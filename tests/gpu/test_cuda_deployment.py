"""Converted models on GPUs as any module is: checkpoints, casts, moves, replicas, threads and processes."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import error_in_float64, masked_dense, random_masks, small_net
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fxsparse
from fxsparse import FxsparseError, Mode, sites
from fxsparse.report import graphs_of

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact_float32")]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")

RUNGS = ("symbolic", "export", "modules")
ROOT = Path(__file__).parents[2]
X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def masked_net(seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a model on the CPU; the masks are the same for every seed."""
    torch.manual_seed(0)
    masks = random_masks(small_net())
    torch.manual_seed(seed)
    return masked_dense(small_net(), masks), masks


def converted(rung: str = "symbolic", device: str = "cuda", seed: int = 0) -> nn.Module:
    model, masks = masked_net(seed)
    chosen = fxsparse.Settings(calibrate=False, capture=rung, cache=False)
    fast = fxsparse.convert(model.to(device), masks, example_inputs=X.to(device), settings=chosen)
    fxsparse.set_mode(fast, Mode.SPARSE)
    return fast


def same_state(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name].cpu(), two[name].cpu()) for name in one)


def passes_test_mode(model: nn.Module, x: Tensor) -> bool:
    with torch.no_grad(), fxsparse.set_mode(model, Mode.TEST):
        model(x)
    return True


@pytest.mark.parametrize("stored_on", ["cpu", "cuda"])
@pytest.mark.parametrize("rung", RUNGS)
def test_dense_checkpoints_load_on_the_gpu_from_either_device(rung: str, stored_on: str) -> None:
    other, _ = masked_net(1)
    fast = converted(rung)
    fast.load_state_dict(other.to(stored_on).state_dict())
    assert {tensor.device.type for tensor in fast.state_dict().values()} == {"cuda"}
    assert passes_test_mode(fast, X.cuda())
    with torch.no_grad():
        assert error_in_float64(fast(X.cuda()).cpu(), other.cpu(), X) < 1e-5
    expected = converted(rung, seed=1)
    for name, tensor in fast.state_dict().items():
        assert torch.allclose(tensor, expected.state_dict()[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rung", RUNGS)
def test_an_assigned_checkpoint_brings_the_model_to_its_device(rung: str) -> None:
    other, _ = masked_net(1)
    fast = converted(rung)
    fast.load_state_dict(other.state_dict(), assign=True)
    if rung == "symbolic":
        assert {tensor.device.type for tensor in fast.state_dict().values()} == {"cpu"}
    fast.cpu()
    assert same_state(fast, converted(rung, "cpu", seed=1))
    assert passes_test_mode(fast, X)


@pytest.mark.parametrize("frozen", [False, True])
def test_state_dicts_go_between_devices_and_hostile_tables_are_refused(frozen: bool) -> None:
    on_cpu, on_gpu = converted(device="cpu"), converted(seed=1)
    if frozen:
        fxsparse.freeze(on_cpu), fxsparse.freeze(on_gpu)
    on_gpu.load_state_dict(on_cpu.state_dict())
    assert same_state(on_cpu, on_gpu)
    state = {name: tensor.clone() for name, tensor in on_gpu.state_dict().items()}
    for table in ("columns", "panels", "rows"):
        broken = {**state, f"block.conv2.weight_{table}": state[f"block.conv2.weight_{table}"].clone()}
        broken[f"block.conv2.weight_{table}"].view(-1)[0] = 2**31 - 1
        for assign in (False, True):
            with pytest.raises(FxsparseError, match="'block.conv2.weight' cannot be used: .*damaged"):
                on_gpu.load_state_dict(broken, assign=assign)
    assert same_state(on_cpu, on_gpu)
    with torch.no_grad():
        assert torch.allclose(on_gpu(X.cuda()).cpu(), on_cpu(X), atol=1e-4)


@pytest.mark.parametrize("rung", RUNGS)
def test_moves_and_casts_keep_packed_and_dense_weights_alike(rung: str) -> None:
    fast = converted(rung, "cpu")
    with torch.no_grad():
        expected = fast(X)
        fast.to("cuda")
        assert torch.allclose(fast(X.cuda()).cpu(), expected, atol=1e-4)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        made = copy.deepcopy(fast).to("cuda", dtype)
        for gm in graphs_of(made):
            for _, site in sites.conv_sites(gm):
                packed = [sites.attribute(gm, name) for name in site.packed_names]
                assert [tensor.dtype for tensor in packed] == [dtype, torch.int32, torch.int64, torch.int64]
                unpacked = torch.ops.fxsparse.unpack(*packed, list(site.weight_shape))
                assert torch.equal(unpacked, sites.attribute(gm, site.weight))
        assert passes_test_mode(made, X.to("cuda", dtype))
        made.to(memory_format=torch.channels_last)
        assert passes_test_mode(made, X.to("cuda", dtype, memory_format=torch.channels_last))
    with torch.no_grad():
        assert torch.equal(fast.to("cpu")(X), expected)


def test_tensors_without_values_never_make_a_kernel_read_out_of_bounds() -> None:
    fast = converted()
    state = {name: tensor.clone() for name, tensor in fast.state_dict().items()}
    with torch.no_grad():
        expected = fast(X.cuda())
        fast.to_empty(device="cuda")(X.cuda())
        fast.to("meta").to_empty(device="cuda")(X.cuda())
        torch.cuda.synchronize()
        fast.load_state_dict(state)
        assert torch.equal(fast(X.cuda()), expected)


@pytest.mark.parametrize("rung", RUNGS)
def test_eight_threads_that_call_one_model_get_what_one_thread_gets(rung: str) -> None:
    fast = converted(rung)
    inputs = [torch.randn(1 + i % 3, 3, 12, 12, device="cuda") for i in range(48)]

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            return fast(x)

    def run_on_a_stream_of_its_own(x: Tensor) -> Tensor:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            out = run(x)
        stream.synchronize()
        return out

    expected = [run(x) for x in inputs]
    torch.cuda.synchronize()
    with ThreadPoolExecutor(8) as pool:
        for call in (run, run_on_a_stream_of_its_own):
            for got, wanted in zip(pool.map(call, inputs), expected, strict=True):
                assert torch.allclose(got, wanted, atol=1e-5)


@two_gpus
@pytest.mark.parametrize("rung", RUNGS)
def test_data_parallel_serves_and_trains_on_two_devices(rung: str) -> None:
    fast = converted(rung)
    parallel = nn.DataParallel(fast, device_ids=[0, 1])
    x = X.cuda()
    with torch.no_grad():
        assert torch.allclose(parallel(x), fast(x), atol=1e-5)
    fast.train()
    if rung != "modules":  # whose batch norms are not folded, and see halves of the batch
        alone = copy.deepcopy(fast)
        parallel(x).square().sum().backward()
        alone(x).square().sum().backward()
        for one, two in zip(fast.parameters(), alone.parameters(), strict=True):
            assert torch.allclose(one.grad, two.grad, rtol=1e-4, atol=1e-4)
    fast.eval()
    assert passes_test_mode(fast, x)


def _rank(rank: int, folder: Path) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=(folder / "init").as_uri(), rank=rank, world_size=2)
    fast = converted(device=f"cuda:{rank}")
    ddp = DistributedDataParallel(fast, device_ids=[rank])
    x = X[rank::2].to(rank)
    ddp.train()
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    nn.functional.cross_entropy(ddp(x), torch.arange(4, device=rank)[rank::2]).backward()
    optimizer.step()
    ddp.eval()
    passes_test_mode(fast, x)
    torch.save({name: tensor.cpu() for name, tensor in fast.state_dict().items()}, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@two_gpus
def test_distributed_data_parallel_trains_over_nccl(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (tmp_path,), nprocs=2)
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert not torch.equal(one["head.weight"], converted(device="cpu").state_dict()["head.weight"])


@two_gpus
def test_two_ranks_serve_over_nccl(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "examples/serving/serve.py"), "--requests", "5", "--batch", "2", "--budget-s", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--answers", str(tmp_path)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    first, _, *rows = done.stdout.splitlines()[-5:]
    assert first.startswith("nccl, 2 ranks, the same plan on each")
    assert [row.split()[0] for row in rows] == ["0", "1", "total"]
    answers = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert [len(found) for found in answers] == [3, 2]
