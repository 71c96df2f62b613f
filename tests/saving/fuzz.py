"""Load thousands of damaged files: `python tests/saving/fuzz.py --files 5000 --seed 0` prints what each kind gave.

Every file is loaded, and called if it loads, in a worker process, so that a crash is seen; a file that takes too long
is a hang, memory is limited, and a canary file shows whether code of a file ran. "Another program" loads, but does not
take the inputs, or gives outputs of another shape: a changed stride is as good as the one that was saved.
"""

from __future__ import annotations

import argparse
import random
import resource
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from archives import SHAPE, tiny_net
from mutations import OF_MODELS, OF_WEIGHTS, Base, Draw, Mutation, bases
from tabulate import tabulate

import fxsparse

OUTCOMES = ("refused", "loaded", "another program", "wrong", "crash", "hang")
GOOD = ("refused", "loaded", "another program")
_SECONDS = 30
_BYTES = 16 << 30  # of addresses; torch alone takes several GiB


class Result(dict[str, "Counter[str]"]):
    """By kind of damage, how often each outcome came; `ran` says whether a file ran code, `peak` the memory taken."""

    ran = False
    peak = 0

    def total(self, outcome: str) -> int:
        return sum(counts[outcome] for counts in self.values())

    def __str__(self) -> str:
        rows = [(kind, counts.total(), *(counts[outcome] for outcome in OUTCOMES)) for kind, counts in self.items()]
        rows.append(("all", sum(c.total() for c in self.values()), *(self.total(outcome) for outcome in OUTCOMES)))
        return tabulate(rows, headers=("kind", "files", *OUTCOMES))


def run(files: int, seed: int, folder: Path) -> Result:
    """Write damaged files and load them.

    Args:
        files: how many, over all kinds.
        seed: of everything that is drawn.
        folder: for the files.
    """
    canary = folder / "canary"
    kinds: list[tuple[str, Mutation, list[Base]]] = []
    made = bases(folder)
    for mutations, what in ((OF_MODELS, "model"), (OF_WEIGHTS, "weights")):
        kinds += [(kind, change, [base for base in made if base.kind == what]) for kind, change in mutations.items()]
    result = Result()
    written = []
    for number in range(files):
        kind, change, of = kinds[number % len(kinds)]
        draw = Draw(random.Random(f"{seed} {number}"), folder, canary)
        base = of[number // len(kinds) % len(of)]
        path = folder / f"{number}.{base.kind}"
        content = change(base, draw)
        while content == base.content:
            content = change(base, draw)
        path.write_bytes(content)
        written.append((kind, path))
    for (kind, path), outcome in zip(written, _outcomes([path for _, path in written], result), strict=True):
        result.setdefault(kind, Counter())[outcome] += 1
        if outcome in GOOD:
            path.unlink()
    result.ran = canary.exists()
    return result


def _outcomes(paths: list[Path], result: Result) -> Iterator[str]:
    """Yield what each file gave, in order; a worker that dies is replaced."""
    done = 0
    while done < len(paths):
        listing = paths[0].with_name("files.txt")
        listing.write_text("\n".join(map(str, paths[done:])))
        command = [sys.executable, __file__, "--worker", str(listing)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
            assert worker.stdout is not None
            for line in worker.stdout:
                if line.startswith("peak "):
                    result.peak = max(result.peak, int(line.split()[1]))
                    continue
                done += 1
                yield line.strip()
            code = worker.wait()
        if done < len(paths):
            done += 1
            yield "hang" if code == -signal.SIGALRM else "crash"


def _work(listing: Path) -> None:
    """Load the files of a list, and print what each gives."""
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.manual_seed(0)
    x = torch.randn(SHAPE)
    for path in map(Path, listing.read_text().splitlines()):
        signal.alarm(_SECONDS)  # ends this process
        print(_outcome(path, x), flush=True)
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10, flush=True)


def _outcome(path: Path, x: torch.Tensor) -> str:
    try:
        model = fxsparse.load_weights(path, tiny_net()) if path.suffix == ".weights" else fxsparse.load(path)
    except fxsparse.FxsparseError:
        return "refused"
    except BaseException as error:
        print(path, repr(error), file=sys.stderr)
        return "wrong"
    try:
        with torch.no_grad():
            same = model(x).shape == (len(x), 4)
    except Exception:  # it does not take these inputs, or gives something else
        same = False
    return "loaded" if same else "another program"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a folder for the files that gave something bad")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        _work(arguments.worker)
        return
    with tempfile.TemporaryDirectory() as temporary:
        result = run(arguments.files, arguments.seed, arguments.keep or Path(temporary))
    print(result)
    print(f"Code of a file ran: {'YES' if result.ran else 'no'}. Peak memory of a worker: {result.peak / 1e6:.0f} MB.")
    sys.exit(result.ran or any(result.total(outcome) for outcome in set(OUTCOMES) - set(GOOD)))


if __name__ == "__main__":
    main()
