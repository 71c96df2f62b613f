"""Find the model that a command names, with its weights, masks and inputs, and bring it to where it runs."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxsparse
from fxsparse import names
from fxsparse.arms import with_layout
from fxsparse.cli import tensor_files
from fxsparse.cli.output import in_one_line, on_terminal
from fxsparse.errors import FxsparseError
from fxsparse.inputs import ExampleInputs
from fxsparse.magnitude import magnitude_masks
from fxsparse.masks import bake

_FACTORY = re.compile(r"(?P<module>[A-Za-z_][\w.]*):(?P<attribute>[A-Za-z_][\w.]*)")
# What only says something about a model that is yet to be converted, and about one that a factory makes.
_OF_CONVERSION = ("masks", "prune", "include", "exclude", "capture", "regroup")
_OF_FACTORIES = ("args", "kwargs", "weights")


@dataclasses.dataclass(frozen=True)
class Subject:
    """The model that a command works on.

    Attributes:
        model: in evaluation mode, on its device and in its dtype.
        saved: whether it was converted before and comes from a file.
        masks: for `fxsparse.convert`; None where they are in the model, or it is converted.
        inputs: of one call, or None where no shape was given.
        notes: what the user should know, one sentence each.
    """

    model: nn.Module
    saved: bool
    masks: dict[str, Tensor] | None
    inputs: ExampleInputs | None
    notes: tuple[str, ...] = ()


@contextlib.contextmanager
def surroundings(arguments: argparse.Namespace) -> Iterator[None]:
    """Set the number of threads, and let factories be imported from the current folder; put both back."""
    threads, path = torch.get_num_threads(), list(sys.path)
    sys.path.insert(0, str(Path.cwd()))
    importlib.invalidate_caches()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        sys.path[:] = path


def subject(arguments: argparse.Namespace, *, takes_saved: bool = False) -> Subject:
    """Return the model that the options of `arguments.add_model` and `add_inputs` name.

    Args:
        arguments: of the command.
        takes_saved: whether the command is for saved models too.

    Raises:
        FxsparseError: there is no such model, file or device, or they do not fit together.
    """
    device = _device(arguments.device)
    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    saved = _is_file(arguments.model)
    masks: dict[str, Tensor] | None = None
    notes: list[str] = []
    if saved:
        if not takes_saved:
            raise FxsparseError(
                f"'{arguments.model}' is a file, and this command takes package.module:factory. See what a saved model "
                "is with 'fxsparse info', and measure it for other inputs with 'fxsparse calibrate'."
            )
        _refuse(arguments, (*_OF_FACTORIES, *_OF_CONVERSION))
        model = fxsparse.load(arguments.model, map_location=device).eval()
        model.to(dtype=dtype)  # the layouts of its weights are the plan's
    else:
        model = _made(arguments).eval()
        model.to(device=device, dtype=dtype)
        if arguments.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        saved = takes_saved and arguments.weights is not None and tensor_files.is_converted(arguments.weights)
        if saved:
            _refuse(arguments, _OF_CONVERSION)
            model = fxsparse.load_weights(arguments.weights, model)
        else:
            masks, notes = _masks(arguments, model)
    if not saved and arguments.regroup:
        masks, note = _regrouped(model, masks)
        notes.append(note)
    return Subject(model, saved, masks, _inputs(arguments, model), tuple(notes))


def _refuse(arguments: argparse.Namespace, options: tuple[str, ...]) -> None:
    """Refuse options that a converted model has no use for."""
    given = [name for name in options if getattr(arguments, name, None)]
    if given:
        raise FxsparseError(
            f"--{given[0]} is for models that are yet to be made or converted; this one is saved with all of that. "
            "Leave it out."
        )


def _is_file(name: str) -> bool:
    if Path(name).is_file():
        return True
    if _FACTORY.fullmatch(name):
        return False
    raise FxsparseError(f"'{name}' is no model: neither a file that exists, nor of the form package.module:factory.")


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise FxsparseError("--device cuda: torch finds no CUDA device here. See 'fxsparse env', or take cpu.")
    return torch.device(name)


def _made(arguments: argparse.Namespace) -> nn.Module:
    """Call the factory and load the weights."""
    spec = _FACTORY.fullmatch(arguments.model)
    assert spec is not None
    args, kwargs = arguments.args or [], arguments.kwargs or {}
    factory = _attribute(spec["module"], spec["attribute"])
    if isinstance(factory, nn.Module):
        if args or kwargs:
            raise FxsparseError(f"'{arguments.model}' is a model, not a factory. Leave --args and --kwargs out.")
        model: Any = factory
    else:
        if not callable(factory):
            raise FxsparseError(
                f"'{arguments.model}' is a {type(factory).__name__}, which cannot be called. Name a function or "
                "class that returns an nn.Module."
            )
        try:
            model = factory(*args, **kwargs)
        except Exception as error:
            raise FxsparseError(
                f"The factory '{arguments.model}' raised {in_one_line(error)}. Check --args and --kwargs; --debug "
                "shows the traceback."
            ) from error
    if not isinstance(model, nn.Module):
        raise FxsparseError(f"The factory '{arguments.model}' returned a {type(model).__name__}, not an nn.Module.")
    return model


def _attribute(module_name: str, path: str) -> Any:
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        parts = module_name.split(".")
        ancestors = {".".join(parts[: i + 1]) for i in range(len(parts))}
        if isinstance(error, ModuleNotFoundError) and error.name in ancestors:
            raise FxsparseError(
                f"There is no module '{error.name}', in the current folder or installed. Run the command where it can "
                "be imported."
            ) from error
        raise FxsparseError(
            f"Importing '{module_name}' raised {in_one_line(error)}. --debug shows the traceback."
        ) from error
    for leaf in path.split("."):
        if not hasattr(found, leaf):
            known = [name for name, value in vars(found).items() if callable(value) and not name.startswith("_")]
            raise FxsparseError(f"'{module_name}' has no '{path}'. {names.near(leaf, known)}")
        found = getattr(found, leaf)
    return found


def _masks(arguments: argparse.Namespace, model: nn.Module) -> tuple[dict[str, Tensor] | None, list[str]]:
    """Load the weights, and return the masks with what there is to say on them."""
    masks = None
    if arguments.weights is not None:
        masks = tensor_files.load_weights(arguments.weights, model)
    if arguments.masks is not None:
        return tensor_files.read(arguments.masks, "--masks"), []
    if arguments.prune is not None:
        note = (
            f"--prune {arguments.prune:g} is for trying out: it took the smallest weights of every nn.Conv2d without "
            "training, so the model's answers are worth nothing. Its speed is that of a model pruned so."
        )
        return magnitude_masks(model, 1 - arguments.prune), [note]
    return masks, []


def _regrouped(model: nn.Module, masks: dict[str, Tensor] | None) -> tuple[dict[str, Tensor], str]:
    """Return regrouped masks of every pruned `nn.Conv2d`, and what there is to say on them."""
    baked = bake(model, masks)
    convs = {name: m for name, m in baked.model.named_modules() if isinstance(m, nn.Conv2d)}
    before = {name: conv.weight != 0 for name, conv in convs.items()}
    before |= {name: baked.masks[f"{name}.weight"].kept for name in convs if f"{name}.weight" in baked.masks}
    before = {name: kept for name, kept in before.items() if not kept.all()}
    if not before:
        raise FxsparseError("--regroup: no weight is pruned. Give --masks, --prune, or a pruned model.")
    after = fxsparse.regroup_masks(
        before,
        weights={name: convs[name].weight.detach() for name in before},
        groups={name: convs[name].groups for name in before},
        progress=on_terminal(),
    )
    both = sum(int((before[name] & after[name]).sum()) for name in before)
    share = both / max(sum(int(kept.sum()) for kept in before.values()), 1)
    return after, (
        f"--regroup is for trying out: the blocks keep {share:.0%} of the weights that were kept, and others instead. "
        "Train the model again under regrouped masks (fxsparse.regroup_masks) before you use it."
    )


def _inputs(arguments: argparse.Namespace, model: nn.Module) -> ExampleInputs | None:
    """Draw inputs of the shapes given, and see that the model takes them."""
    if not arguments.input:
        return None
    like = next((p for p in (*model.parameters(), *model.buffers()) if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(shape, generator=generator).to(like) for shape in arguments.input)
    inputs = ExampleInputs(tuple(drawn), {})
    if arguments.channels_last:
        inputs = with_layout(inputs, torch.channels_last)
    try:
        with torch.inference_mode():
            inputs.run(model)
    except Exception as error:
        shapes = " ".join(f"--input {'x'.join(map(str, shape))}" for shape in arguments.input)
        raise FxsparseError(
            f"The model does not run on {shapes} ({in_one_line(error)}). Give the shapes that it takes."
        ) from error
    return inputs
