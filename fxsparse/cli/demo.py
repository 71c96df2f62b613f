"""Prune a small CNN on real images, convert it, and print its accuracy and speed.

Trains a small VGG-like net on real handwritten digits, prunes it in rounds with rewinding, regroups its masks, trains
again, converts it and measures everything, on the CPU.
"""

from __future__ import annotations

import argparse

from fxsparse.cli.output import CHECK_FAILED, OK, Outcome

HELP = "prune a small CNN on real images, convert it, and print its accuracy and speed"
EPILOG = """\
examples:
  fxsparse demo
  fxsparse demo --quick --json > numbers.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--data", choices=("auto", "mnist", "digits"), default="auto", help="which images")
    parser.add_argument("--epochs", type=int, default=None, help="epochs of each training, at least 2")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split, the weights and the batches")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads of torch")
    parser.add_argument("--compile", action="store_true", help="time torch.compile too (needs a C++ compiler)")
    parser.add_argument("--quick", action="store_true", help="a tiny net on few images: seconds, poor accuracy")


def run(arguments: argparse.Namespace) -> Outcome:
    """Run the demo, which prints as it goes."""
    from fxsparse.demo import run as demo  # brings data sets and training: not for the other commands

    result = demo.run(
        demo.Options(
            data=arguments.data,
            epochs=arguments.epochs,
            seed=arguments.seed,
            threads=arguments.threads,
            compile=arguments.compile,
            quick=arguments.quick,
        )
    )
    return Outcome(result.to_dict(), code=OK if result.ok else CHECK_FAILED)
