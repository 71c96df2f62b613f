"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fxsparse.plan import DEPLOYMENTS
from fxsparse.settings import CAPTURES, Settings

DTYPES = ("float32", "float64", "bfloat16", "float16")
DEVICES = ("cpu", "cuda")


def add_model(parser: argparse.ArgumentParser, *, kinds: str = "package.module:factory", masks: bool = True) -> None:
    """Declare the model, its weights and masks.

    Args:
        parser: the command's.
        kinds: what the help says a model is.
        masks: whether the command takes masks.
    """
    group = parser.add_argument_group("model")
    group.add_argument("model", metavar="MODEL", help=kinds)
    group.add_argument("--args", type=_json(list), metavar="JSON", help="arguments of the factory: '[10]'")
    group.add_argument("--kwargs", type=_json(dict), metavar="JSON", help="of the factory: '{\"num_classes\": 10}'")
    group.add_argument(
        "--weights", type=Path, metavar="FILE", help="a state dict: safetensors, or written by torch.save"
    )
    if masks:
        _add_masks(group.add_mutually_exclusive_group())
    else:
        parser.set_defaults(masks=None, prune=None)


def _add_masks(group: Any) -> None:
    group.add_argument(
        "--masks",
        type=Path,
        metavar="FILE",
        help="masks by module name; without, those of nn.utils.prune or the zeros of the weights",
    )
    group.add_argument(
        "--prune",
        type=_share,
        metavar="SHARE",
        help="for trying out: prune this share of every nn.Conv2d by magnitude, without training",
    )


def add_inputs(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Declare the inputs, and where the model runs."""
    group = parser.add_argument_group("inputs")
    group.add_argument(
        "--input",
        type=_shape,
        action="append",
        required=required,
        metavar="SHAPE",
        help="shape of an input, as in 1x3x224x224; once for each positional argument; random values",
    )
    group.add_argument("--dtype", choices=DTYPES, help="of the model and its inputs (default: the model's own)")
    group.add_argument("--device", choices=DEVICES, default="cpu", help="where to run (default: cpu)")
    group.add_argument("--threads", type=_count, metavar="N", help="CPU threads of torch")
    group.add_argument("--channels-last", action="store_true", help="run the model and its inputs in channels_last")


def add_settings(parser: argparse.ArgumentParser, *, measures: bool) -> None:
    """Declare what a user can choose about a conversion.

    Args:
        parser: the command's.
        measures: whether the command measures anything.
    """
    group = parser.add_argument_group("conversion")
    group.add_argument(
        "--include", action="append", metavar="RULE", help="convolutions to convert: name, glob or re:pattern"
    )
    group.add_argument("--exclude", action="append", metavar="RULE", help="convolutions to leave dense")
    group.add_argument("--capture", choices=CAPTURES, help="rung of the capture ladder (default: auto)")
    group.add_argument(
        "--regroup",
        action="store_true",
        help="for trying out: replace the masks by blocks of the same size, which changes what is computed",
    )
    if measures:
        add_measuring(group)


def add_measuring(group: Any) -> None:
    """Declare how a calibration measures, in a parser or a group of its options."""
    default = Settings()
    group.add_argument("--budget", type=float, metavar="S", help="seconds for calibration, about")
    group.add_argument(
        "--margin", type=float, metavar="M", help=f"share by which sparse must win (default: {default.margin})"
    )
    group.add_argument("--deploy", choices=DEPLOYMENTS, help=f"how the model will run (default: {default.deploy})")


def settings_of(arguments: argparse.Namespace, **more: Any) -> Settings:
    """Return the settings that the options of `add_settings` ask for; others keep their defaults.

    Raises:
        FxsparseError: a value cannot be.
    """
    given = {
        "include": arguments.include and tuple(arguments.include),
        "exclude": arguments.exclude and tuple(arguments.exclude),
        "capture": arguments.capture,
        "budget_s": getattr(arguments, "budget", None),
        "margin": getattr(arguments, "margin", None),
        "deploy": getattr(arguments, "deploy", None),
    }
    return Settings(**{name: value for name, value in given.items() if value is not None}, **more)


def _json(kind: type) -> Callable[[str], Any]:
    """Return a reader of JSON of one type."""
    name, example = ("array", "[1, 2]") if kind is list else ("object", '{"name": 1}')

    def read(text: str) -> Any:
        try:
            value = json.loads(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error}). Write it as '{example}'.") from None
        if not isinstance(value, kind):
            raise argparse.ArgumentTypeError(f"{text!r} is no JSON {name}. Write it as '{example}'.")
        return value

    return read


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no shape. Write it as 1x3x224x224.")
    return tuple(map(int, text.split("x")))


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share to prune. Give a number between 0 and 1: 0.9.")
    return share


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,5}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of threads. Give at least 1.")
    return int(text)
