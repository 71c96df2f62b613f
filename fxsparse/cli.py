"""The command line: `fxsparse demo`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import fxsparse
from fxsparse.errors import FxsparseError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; None takes those of the process.

    Returns:
        The exit code: 0; 1 where the demo's check failed; 2 where the request cannot be carried out.
    """
    arguments = _parser().parse_args(argv)
    try:
        return _demo(arguments)
    except FxsparseError as error:
        if arguments.debug:
            raise
        print(f"fxsparse: error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fxsparse", description="Makes pruned CNNs fast in PyTorch.")
    parser.add_argument("--version", action="version", version=f"fxsparse {fxsparse.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="prune a small CNN on real images, convert it, and print its accuracy and speed",
        description="Trains a small VGG-like net on real handwritten digits, prunes it in rounds with "
        "rewinding, regroups its masks, trains again, converts it and measures everything, on the CPU.",
    )
    demo.add_argument("--data", choices=("auto", "mnist", "digits"), default="auto", help="which images")
    demo.add_argument("--epochs", type=int, default=None, help="epochs of each training, at least 2")
    demo.add_argument("--seed", type=int, default=0, help="seed of the split, the weights and the batches")
    demo.add_argument("--threads", type=int, default=None, help="CPU threads of torch")
    demo.add_argument("--compile", action="store_true", help="time torch.compile too (needs a C++ compiler)")
    demo.add_argument("--quick", action="store_true", help="a tiny net on few images: seconds, poor accuracy")
    demo.add_argument("--json", type=Path, metavar="PATH", help="write all numbers to this file")
    demo.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    from fxsparse.demo.run import Options, run  # trains nets: not for `fxsparse --version`

    target: Path | None = arguments.json
    if target is not None and not target.parent.is_dir():
        raise FxsparseError(f"--json: the folder '{target.parent}' does not exist. Create it first.")
    options = Options(
        data=arguments.data,
        epochs=arguments.epochs,
        seed=arguments.seed,
        threads=arguments.threads,
        compile=arguments.compile,
        quick=arguments.quick,
    )
    result = run(options)
    if target is not None:
        target.write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
    return 0 if result.ok else 1


if __name__ == "__main__":
    sys.exit(main())
