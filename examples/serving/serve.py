"""Serve a converted model from many processes: every rank the same plan, a stream of requests shared among them.

    torchrun --standalone --nproc-per-node 2 examples/serving/serve.py

Gloo on CPUs, NCCL where there are GPUs (one a rank). See README.md beside this file.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import prune

import fxsparse
from fxsparse.report import graphs_of
from fxsparse.sites import conv_sites

Result = TypeVar("Result")


def example() -> nn.Module:
    """Return a small CNN with 90 % of its convolution weights pruned: the model that is served by default."""
    widths = (3, 64, 64, 128, 128, 256)
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
        layers += [nn.Conv2d(before, after, 3, stride=1 + i % 2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            prune.random_unstructured(module, "weight", amount=0.9)
    return model


def main() -> int:
    """Serve, and return the exit code: the same on every rank."""
    given = _arguments()
    cuda = torch.cuda.is_available()
    local_rank, local_ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    # torchrun leaves one thread to a rank; ranks that share all cores would wait for each other.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(given.threads or max(1, cores // local_ranks))
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=given.timeout_s))
    try:
        model, plan = together(lambda: prepare(given, device), device)
        if plan is not None or given.model is None:  # a saved model brings its plan with it
            batch = next(requests(given, 0, 1)).to(device)
            with torch.no_grad():  # rank 0 measures; with a plan nobody does
                fxsparse.calibrate(model, batch, budget_s=given.budget_s, plan=plan, deterministic=plan is not None)
        check_same(model, device)
        served, seconds, answers = together(lambda: serve(model, given, device), device)
        if given.answers is not None:
            together(lambda: write(given.answers, answers), device)
        report(model, served, seconds, device)
    except Failed:
        return 1
    except Exception as error:  # of calibrate, which tells the other ranks, or of a rank that went away
        print(f"Rank {dist.get_rank()}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        dist.destroy_process_group()
    return 0


def prepare(given: argparse.Namespace, device: torch.device) -> tuple[nn.Module, fxsparse.Plan | None]:
    """Load the converted model, or make one, and read the plan, if one is given; nothing is measured yet."""
    plan = None if given.plan is None else fxsparse.Plan.load(given.plan)
    if given.model is not None:
        return fxsparse.load(given.model, map_location=device), plan
    module, _, factory = given.factory.rpartition(":")
    torch.manual_seed(0)  # for a factory that draws its weights: all ranks serve the same
    model: nn.Module = getattr(importlib.import_module(module), factory)() if module else example()
    return fxsparse.convert(model.eval().to(device)), plan


def check_same(model: nn.Module, device: torch.device) -> None:
    """Refuse to serve where the ranks differ in their plan, in what a convolution runs, or in a weight."""
    plan = getattr(model, "plan", None)
    text = ["" if plan is None else plan.to_json()]
    text += [f"{site.name} {site.path} {site.packing}" for gm in graphs_of(model) for _, site in conv_sites(gm)]
    digest = hashlib.sha256("\n".join(text).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    mine = torch.tensor(list(digest.digest()), dtype=torch.uint8, device=device)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    other = [rank for rank, digest in enumerate(every) if not torch.equal(digest, every[0])]
    if other:
        raise fxsparse.FxsparseError(
            f"Ranks {other} do not have the plan and weights of rank 0. Give all of them the same file, or a factory "
            "that makes the same model everywhere."
        )


def requests(given: argparse.Namespace, rank: int, ranks: int) -> Iterator[Tensor]:
    """Yield the requests of one rank: every `ranks`-th of the stream, which is a seed a request here."""
    for number in range(rank, given.requests, ranks):
        yield torch.randn(given.batch, *given.shape, generator=torch.Generator().manual_seed(number))


def serve(model: nn.Module, given: argparse.Namespace, device: torch.device) -> tuple[int, float, list[Tensor]]:
    """Answer this rank's requests; return the images, the seconds and the answers."""
    batches = list(requests(given, dist.get_rank(), dist.get_world_size()))
    answers = []
    with torch.inference_mode():
        if batches:
            model(batches[0].to(device))  # the first call is slower
        _wait(device)
        begun = time.perf_counter()
        for batch in batches:
            answers.append(model(batch.to(device)).cpu())
        _wait(device)
        seconds = time.perf_counter() - begun
    return sum(len(batch) for batch in batches), seconds, answers


def write(folder: Path, answers: list[Tensor]) -> None:
    """Write this rank's answers."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(answers, folder / f"rank{dist.get_rank()}.pt")


def report(model: nn.Module, served: int, seconds: float, device: torch.device) -> None:
    """Print one table, on rank 0."""
    mine = torch.tensor([served, seconds, torch.get_num_threads()], dtype=torch.float64, device=device)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    if dist.get_rank() != 0:
        return
    sparse = sum(site.path == "sparse" for gm in graphs_of(model) for _, site in conv_sites(gm))
    print(f"{dist.get_backend()}, {len(every)} ranks, the same plan on each, {sparse} convolutions sparse")
    print(f"{'rank':>5} {'threads':>8} {'images':>8} {'seconds':>8} {'images/s':>9}")
    for rank, (images, taken, threads) in enumerate(line.tolist() for line in every):
        print(f"{rank:>5} {threads:>8.0f} {images:>8.0f} {taken:>8.2f} {images / taken:>9.1f}")
    images, slowest = sum(float(line[0]) for line in every), max(float(line[1]) for line in every)
    print(f"{'total':>5} {'':>8} {images:>8.0f} {slowest:>8.2f} {images / slowest:>9.1f}", flush=True)


class Failed(Exception):
    """A rank failed, and all of them know."""


def together(work: Callable[[], Result], device: torch.device) -> Result:
    """Do something without collectives on every rank; where it fails on one, stop on all, and say why on that one.

    Raises:
        Failed: it raised on a rank.
    """
    result: Any = None
    failed = torch.zeros(1, device=device)
    try:
        result = work()
    except Exception as error:  # whatever it is, the other ranks must not wait for this one
        print(f"Rank {dist.get_rank()}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        failed += 1
    dist.all_reduce(failed)
    if failed:
        raise Failed
    answer: Result = result
    return answer


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, help="a file of fxsparse.save, with its plan")
    parser.add_argument(
        "--factory", default="", help="package.module:function of a pruned model (default: a small CNN)"
    )
    parser.add_argument("--plan", type=Path, help="follow this plan instead of measuring on rank 0")
    parser.add_argument("--shape", type=int, nargs="+", default=[3, 64, 64], help="of one image (default: 3 64 64)")
    parser.add_argument("--batch", type=int, default=8, help="images a request (default: 8)")
    parser.add_argument("--requests", type=int, default=200, help="requests in the stream (default: 200)")
    parser.add_argument(
        "--threads", type=int, default=0, help="threads a rank (default: cores / ranks on this machine)"
    )
    parser.add_argument("--budget-s", type=float, default=30.0, help="seconds to calibrate at most (default: 30)")
    parser.add_argument(
        "--timeout-s", type=float, default=600.0, help="how long a rank waits for others (default: 600)"
    )
    parser.add_argument("--answers", type=Path, help="folder to write every rank's answers to")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
