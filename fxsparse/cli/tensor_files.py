"""Tensors by name from files: state dicts and masks, in safetensors or as torch.save writes them.

Pickles are read with `weights_only=True`, which builds nothing but tensors and plain containers.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from fxsparse.cli.output import in_one_line
from fxsparse.errors import FxsparseError

_SHOWN = 3
_OURS = "fxsparse"  # in the metadata


def read(path: Path, option: str) -> dict[str, Tensor]:
    """Read a file of tensors by name.

    Args:
        path: a safetensors file, or one that torch.save wrote: a dict of tensors, or one with such a dict under
            "state_dict".
        option: the option that names it, for errors.

    Raises:
        FxsparseError: there is no such file, or it holds something else.
    """
    if not path.is_file():
        raise FxsparseError(f"{option}: there is no file '{path}'.")
    try:
        with path.open("rb") as file:
            is_safetensors = file.read(9)[8:] == b"{"  # the length of a JSON header, and the header
        found = load_file(path) if is_safetensors else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and safetensors have many
        raise FxsparseError(
            f"{option}: '{path}' cannot be read ({in_one_line(error)}). Give a safetensors file, or a state dict "
            "that torch.save wrote."
        ) from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise FxsparseError(f"{option}: '{path}' holds a {type(found).__name__} that is no dict of tensors by name.")
    return dict(found)


def is_converted(path: Path) -> bool:
    """Tell whether a file is one that `fxsparse.save_weights` wrote, by what its header says."""
    try:
        with safe_open(path, framework="pt") as file:
            return _OURS in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def load_weights(path: Path, model: nn.Module) -> dict[str, Tensor] | None:
    """Load a state dict into a model.

    Weights that nn.utils.prune split are put together again where the model has them whole.

    Returns:
        The masks that the file has of such weights, by parameter name; None where it has none.

    Raises:
        FxsparseError: the file cannot be read, or does not fit the model.
    """
    state = read(path, "--weights")
    wanted = model.state_dict()
    masks = {}
    for name in [name[: -len("_orig")] for name in state if name.endswith("_orig")]:
        if name in wanted and f"{name}_mask" in state:
            state[name] = state.pop(f"{name}_orig")
            masks[name] = state.pop(f"{name}_mask")
    problems = {
        "lacks": [name for name in wanted if name not in state],
        "has beyond the model": [name for name in state if name not in wanted],
        "has in another shape": [
            name for name, value in state.items() if name in wanted and value.shape != wanted[name].shape
        ],
    }
    for what, found in problems.items():
        if found:
            shown = ", ".join(f"'{name}'" for name in found[:_SHOWN])
            more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            raise FxsparseError(
                f"--weights: '{path}' does not fit the model: it {what} {shown}{more}. Give the factory the arguments "
                "that the weights were made with."
            )
    model.load_state_dict(state)
    return masks or None
