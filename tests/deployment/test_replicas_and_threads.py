"""Converted models under threads, forks, spawned processes, DataParallel replicas and DistributedDataParallel."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import masked_dense, random_masks, small_net
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fxsparse
from fxsparse import Mode

RUNGS = ("symbolic", "export", "modules")
X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))
TESTS = Path(__file__).parents[1]


def converted(rung: str = "symbolic") -> nn.Module:
    """Return the same model in every process."""
    return copy.deepcopy(_converted(rung))


@functools.cache
def _converted(rung: str) -> nn.Module:
    torch.manual_seed(0)
    model = small_net()
    masks = random_masks(model)
    chosen = fxsparse.Settings(calibrate=False, capture=rung, cache=False)
    fast = fxsparse.convert(masked_dense(model, masks), masks, example_inputs=X, settings=chosen)
    fxsparse.set_mode(fast, Mode.SPARSE)
    return fast


@pytest.mark.parametrize("mode", [Mode.SPARSE, Mode.VANILLA, Mode.TEST])
@pytest.mark.parametrize("rung", RUNGS)
def test_eight_threads_that_call_one_model_get_what_one_thread_gets(rung: str, mode: Mode) -> None:
    fast = converted(rung)
    fxsparse.set_mode(fast, mode)
    inputs = [torch.randn(1 + i % 3, 3, 12, 12) for i in range(48)]

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():  # a setting of each thread
            return fast(x)

    expected = [run(x) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(4):
            assert all(torch.equal(a, b) for a, b in zip(pool.map(run, inputs), expected, strict=True))


def replicate(module: nn.Module, known: dict[nn.Module, nn.Module]) -> nn.Module:
    """Do what torch.nn.parallel.replicate does for one device, which must be a GPU there."""
    if module not in known:
        replica = known[module] = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            setattr(replica, name, replicate(child, known))
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                setattr(
                    replica,
                    name,
                    None if tensor is None else tensor.detach().clone().requires_grad_(tensor.requires_grad),
                )
    return known[module]


@pytest.mark.parametrize("rung", RUNGS)
def test_replicas_for_data_parallel_run_on_tensors_of_their_own(rung: str) -> None:
    fast = converted(rung)
    with torch.no_grad():
        expected = fast(X)
        first, second = (replicate(fast, {}) for _ in range(2))
        for tensor in fast.state_dict().values():
            tensor.zero_()  # no replica reads it
        assert torch.equal(first(X), expected)
        torch.testing.assert_close(second(X[:2]), expected[:2], rtol=1e-5, atol=1e-6)  # sums in another order
    assert not list(first.parameters())
    assert str(first.report) == str(fast.report)


def test_replicas_of_a_training_model_give_gradients() -> None:
    fast = converted().train()
    replica = replicate(fast, {})
    replica(X).sum().backward()
    fast(X).sum().backward()
    for name, parameter in fast.named_parameters():
        owner, _, leaf = name.rpartition(".")
        assert torch.equal(getattr(replica.get_submodule(owner), leaf).grad, parameter.grad)


def _train_on_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=(folder / "init").as_uri(), rank=rank, world_size=2)
    for rung in ("symbolic", "modules"):
        fast = converted(rung)
        ddp = DistributedDataParallel(fast)
        with torch.no_grad():
            served = ddp(X[rank::2])
        ddp.train()
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
        nn.functional.cross_entropy(ddp(X[rank::2]), torch.arange(4)[rank::2]).backward()
        optimizer.step()
        ddp.eval()
        with torch.no_grad(), fxsparse.set_mode(fast, Mode.TEST):
            trained = ddp(X)
        torch.save({"served": served, "trained": trained, "state": fast.state_dict()}, folder / f"{rung}{rank}.pt")
    dist.destroy_process_group()


def test_distributed_data_parallel_serves_and_trains_as_one_process_does(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_train_on_rank, (tmp_path,), nprocs=2)
    for rung in ("symbolic", "modules"):
        ranks = [torch.load(tmp_path / f"{rung}{rank}.pt", weights_only=True) for rank in range(2)]
        alone = converted(rung)
        with torch.no_grad():
            for rank in range(2):
                # Another number of threads sums in another order.
                torch.testing.assert_close(ranks[rank]["served"], alone(X[rank::2]), rtol=1e-5, atol=1e-6)
        assert torch.equal(ranks[0]["trained"], ranks[1]["trained"])
        assert all(torch.equal(tensor, ranks[1]["state"][name]) for name, tensor in ranks[0]["state"].items())
    alone = converted().train()  # no batch norm is left in it, so that two halves of a batch are the batch
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    nn.functional.cross_entropy(alone(X), torch.arange(4)).backward()
    optimizer.step()
    alone.eval()
    state = torch.load(tmp_path / "symbolic0.pt", weights_only=True)["state"]
    assert all(torch.allclose(state[name], tensor, atol=1e-6) for name, tensor in alone.state_dict().items())


def _serve_shared(_: int, state: dict[str, Tensor], rung: str, given: Tensor, out: Tensor) -> None:
    torch.set_num_threads(1)
    fast = converted(rung)
    fast.load_state_dict({name: state[name] for name in fast.state_dict()}, assign=True)
    with torch.no_grad():
        out.copy_(fast(given))
        state["head.bias"].add_(1)
        assert torch.equal(fast.head.bias, state["head.bias"])
        assert all(tensor.is_shared() for tensor in fast.state_dict().values())


def test_a_spawned_process_serves_from_shared_memory() -> None:
    """A model cannot be pickled, but its tensors can be shared: assigned, they are not copied."""
    fast = converted().share_memory()
    bias = fast.head.bias.detach().clone()
    given, out = X.clone().share_memory_(), torch.zeros(4, 5).share_memory_()
    with torch.no_grad():
        expected = fast(X)
    state = {name: tensor.detach() for name, tensor in fast.state_dict().items()}
    torch.multiprocessing.spawn(_serve_shared, (state, "symbolic", given, out), nprocs=1)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)  # another number of threads
    assert torch.equal(fast.head.bias, bias + 1)


FORKED = """
import sys, torch
sys.path[:0] = [{tests!r}, {here!r}]
from test_replicas_and_threads import X, converted

fast = converted()
torch.set_num_threads(2)
inputs = torch.randn(8, 3, 64, 64)
with torch.no_grad():
    expected = fast(inputs)  # starts the pool of threads that a fork does not have

class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 6
    def __getitem__(self, i):
        with torch.no_grad():
            return fast(inputs) if {calls} else inputs[i]

for batch in torch.utils.data.DataLoader(Images(), batch_size=1, num_workers=2, multiprocessing_context="fork"):
    with torch.no_grad():
        assert torch.allclose(batch[0], expected, atol=1e-5) if {calls} else fast(batch).shape == (1, 5)
print("served")
"""


@pytest.mark.parametrize("calls", [True, False])
def test_forked_data_loaders_live_beside_a_model_and_may_call_it(calls: bool) -> None:
    script = FORKED.format(tests=str(TESTS), here=str(TESTS / "deployment"), calls=calls)
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout == "served\n", done.stderr
