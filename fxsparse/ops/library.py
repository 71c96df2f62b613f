"""Loads the extension libraries, or stands in for them with the pure-torch reference implementation."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fxsparse.ops import batch_inner, reference, region, table_check

log = logging.getLogger(__name__)

_HERE = Path(__file__).parent.parent
_BUILD_HINT = (
    "Build it with 'pip install --no-build-isolation .' (needs g++) in a checkout of fxsparse, or install a wheel."
)

# The source of the schemas is csrc/bind_*.cpp; these define the operators only where that is not built.
SCHEMAS = {
    "conv2d": (
        "(Tensor input, Tensor values, Tensor columns, Tensor panels, Tensor rows, Tensor? bias, "
        "int[] weight_shape, int[] stride, int[] padding, int[] dilation, int groups, "
        'str padding_mode="zeros", str activation="none", Tensor? add=None) -> Tensor'
    ),
    "conv2d_batch_inner": (
        "(Tensor input, Tensor tile_values, Tensor tile_columns, Tensor tiles, Tensor tile_rows, Tensor? bias, "
        "int[] weight_shape, int[] stride, int[] padding, int[] dilation, int groups, "
        'str activation="none", Tensor? add=None, str kernel="auto", bool overlap=True, '
        "bool allow_tf32=False) -> Tensor"
    ),
    "conv2d_planes": (
        "(Tensor input, Tensor tile_values, Tensor tile_columns, Tensor tiles, Tensor tile_rows, Tensor? bias, "
        "int[] weight_shape, int[] stride, int[] padding, int[] dilation, int groups, "
        'str activation="none", Tensor? add=None, int[] tile=[0, 0, 0], bool overlap=False, '
        "bool allow_tf32=False) -> Tensor"
    ),
    "region": "(Tensor[] inputs, Tensor[] tensors, int[] program, int[] outputs) -> Tensor[]",
    "region_batch_inner": (
        "(Tensor[] inputs, Tensor[] tensors, int[] program, int[] outputs, int[] channels_last, "
        "bool allow_tf32) -> Tensor[]"
    ),
    "unpack": "(Tensor values, Tensor columns, Tensor panels, Tensor rows, int[] weight_shape) -> Tensor",
    "repack": "(Tensor weight, Tensor columns, Tensor panels, Tensor rows, int values) -> Tensor",
    "validate": "(Tensor columns, Tensor panels, Tensor rows, int values, int[] weight_shape, int groups) -> ()",
}
_REFERENCE: dict[str, Callable[..., Tensor | list[Tensor] | None]] = {
    "conv2d": reference.conv2d,
    "conv2d_batch_inner": batch_inner.conv2d_batch_inner,
    "conv2d_planes": batch_inner.conv2d_planes,
    "region": region.reference,
    "region_batch_inner": region.reference_batch_inner,
    "unpack": reference.unpack,
    "repack": reference.repack,
    "validate": table_check.validate,
}


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """What this installation can run.

    Attributes:
        cpu: the instruction set of the CPU kernels in use ("avx512", "avx2", "baseline"), or "reference" where the
            extension is not there.
        cuda: True if the CUDA kernels are loaded (they load without a GPU too).
        cpu_error: why the CPU library is not loaded, or None.
        cuda_error: why the CUDA library is not loaded, or None.
        libraries: paths of the libraries that are loaded, the one that defines the operators first; programs without
            Python load them in this order (see `examples/cpp`).
    """

    cpu: str
    cuda: bool
    cpu_error: str | None
    cuda_error: str | None
    libraries: tuple[str, ...]


_errors: dict[str, str | None] = {"_C": None, "_C_cuda": None}
_fragment: torch.library.Library | None = None


def load() -> None:
    """Load both libraries and register the reference where there is no compiled kernel. Called once, at import."""
    global _fragment
    _errors["_C"] = _load_library("_C")
    _fragment = torch.library.Library("fxsparse", "FRAGMENT")
    if _errors["_C"] is None:
        _errors["_C_cuda"] = _load_library("_C_cuda")
    else:
        _errors["_C_cuda"] = "needs the CPU library, which defines the operators"
        for name, schema in SCHEMAS.items():
            _fragment.define(name + schema)
        warnings.warn(
            f"The compiled operators of fxsparse are not available ({_errors['_C']}); a pure-torch reference runs "
            f"instead, which is exact but not fast. {_BUILD_HINT}",
            RuntimeWarning,
            stacklevel=3,
        )
    for name, implementation in _REFERENCE.items():
        # Backend kernels take precedence over this key, so it serves exactly the devices that have none.
        _fragment.impl(name, implementation, "CompositeExplicitAutograd")


def _path(stem: str) -> Path:
    return _HERE / f"{stem}.abi3.so"


def _load_library(stem: str) -> str | None:
    path = _path(stem)
    if not path.exists():
        return f"{path.name} was not built"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        log.warning("Could not load %s: %s", path, error)
        return str(error)
    return None


def capabilities() -> Capabilities:
    """Tell what this installation can run, and why not where it cannot.

    Returns:
        A `Capabilities`: the kernel set on CPU, whether the CUDA kernels are loaded, the load errors if any, and the
        paths of the libraries.
    """
    cpu = "reference" if _errors["_C"] is not None else str(torch.ops.fxsparse.cpu_isa())
    libraries = tuple(str(_path(stem)) for stem, error in _errors.items() if error is None)
    return Capabilities(cpu, _errors["_C_cuda"] is None, _errors["_C"], _errors["_C_cuda"], libraries)


def has_kernel(device: torch.device) -> bool:
    """Tell whether `conv2d` has a compiled kernel on this type of device."""
    return (device.type == "cpu" and _errors["_C"] is None) or (device.type == "cuda" and _errors["_C_cuda"] is None)
