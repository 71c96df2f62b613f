"""The command line: `fxsparse demo | prune | convert | explain | calibrate | bench | info | env`."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

import fxsparse
from fxsparse.cli import bench, calibrate, convert, demo, env, explain, info, output, prune
from fxsparse.errors import FxsparseError

COMMANDS = (demo, prune, convert, explain, calibrate, bench, info, env)

_EPILOG = """\
exit codes:
  0  done
  1  a check failed: outputs disagree
  2  the request cannot be carried out (wrong options, files, models)
  3  an unexpected error: a bug in the model's code or in fxsparse
  130  interrupted; 141  the reader of the output went away

examples:
  fxsparse explain torchvision.models:resnet50 --prune 0.9 --input 1x3x224x224
  fxsparse convert nets:build --kwargs '{"classes": 10}' --weights pruned.safetensors \\
      --input 8x3x32x32 --output fast.pt2
  fxsparse bench fast.pt2 --input 8x3x32x32
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; None takes those of the process.

    Returns:
        The exit code, as `fxsparse --help` lists them.

    Raises:
        SystemExit: argparse refuses the arguments (2), or has printed the help or the version (0).
    """
    arguments = _parser().parse_args(argv)
    with output.logging_to_stderr(arguments.verbose):
        try:
            with output.stdout_for_result(arguments.json):
                outcome: output.Outcome = arguments.run(arguments)
            outcome.show(as_json=arguments.json)
            return outcome.code
        except BrokenPipeError:
            # Python flushes stdout once more at exit, which would fail again and print a traceback.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return output.BROKEN_PIPE
        except KeyboardInterrupt:
            print("fxsparse: interrupted", file=sys.stderr)
            return output.INTERRUPTED
        except Exception as error:  # whatever a user's model raises: one line, not a traceback
            if arguments.debug:
                traceback.print_exc()
            if isinstance(error, FxsparseError):
                output.complain(str(error))
                return output.BAD_REQUEST
            output.complain(
                f"{output.in_one_line(error)}\nThis was not expected. Run the command again with --debug for the "
                "traceback, and add what 'fxsparse env' prints to a bug report."
            )
            return output.UNEXPECTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fxsparse",
        description="Makes pruned CNNs fast in PyTorch.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fxsparse {fxsparse.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        name = module.__name__.rpartition(".")[2]
        sub = commands.add_parser(
            name,
            allow_abbrev=False,
            help=module.HELP,
            description=module.__doc__,
            epilog=module.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
        common = sub.add_argument_group("output")
        common.add_argument("--json", action="store_true", help="print the result as JSON on stdout, and nothing else")
        common.add_argument("--verbose", action="store_true", help="log what happens to stderr")
        common.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(run=module.run)
    return parser
