"""Names of what Dynamo hands to a backend as nameless inputs: parameters and buffers of the user's model."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.fx import Node

from fxsparse import masks as reading
from fxsparse import names
from fxsparse.errors import FxsparseError
from fxsparse.masks import WeightMask

# L['self']._modules['layer1']._modules['0']._parameters['weight']
_STEP = r"\._(?:modules|parameters|buffers)\['([^']+)'\]"
_CHAIN = re.compile(rf"(?:{_STEP})+$")
_PARAMETRIZED = re.compile(r"(^|\.)parametrizations\.([^.]+)\.original\d*$")


def compiled_model() -> nn.Module | None:
    """Return the module that torch.compile was called on, found up the stack; None where a function was compiled.

    Dynamo tells a backend a parameter's place relative to the frame that it compiles, which after a graph break may be
    a submodule's. The names that users know are relative to the model.
    """
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, OptimizedModule):
            model: nn.Module = module._orig_mod
            return model
        if isinstance(module, nn.Module) and module._compiled_call_impl is not None:  # by model.compile()
            return module
        frame = frame.f_back  # type: ignore[assignment]
    return None


def attribute_names(placeholders: Mapping[Node, Any], model: nn.Module | None) -> dict[Node, str]:
    """Name the placeholders that stand for parameters and buffers.

    Args:
        placeholders: of a graph from Dynamo, with the values that they stand for.
        model: whose names count; None names them relative to the compiled frame.
    """
    known: dict[int, str] = {}
    if model is not None:
        for named in (model.named_buffers, model.named_parameters):
            known |= {id(tensor): name for name, tensor in named(remove_duplicate=False)}
    found = {}
    for node, value in placeholders.items():
        if not isinstance(value, Tensor):
            continue
        chain = _CHAIN.search(source_name(node))
        if id(value) in known:
            found[node] = known[id(value)]
        elif chain is not None:
            found[node] = ".".join(re.findall(_STEP, chain[0]))
        elif isinstance(value, nn.Parameter):
            found[node] = node.name
    return found


def source_name(node: Node) -> str:
    """Return the Python expression that gives a placeholder's value, as Dynamo writes it."""
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return ""
    name = source.name  # a method until torch 2.10, a property since
    return str(name() if callable(name) else name)


def plain_name(name: str) -> str:
    """Return the name that a weight has without `nn.utils.prune` and parametrizations."""
    name = _PARAMETRIZED.sub(r"\1\2", name)
    return name.removesuffix("_orig")


def read_masks(
    given: Mapping[str, Any], weights: Mapping[str, tuple[Tensor, int]], model: nn.Module | None
) -> dict[str, WeightMask]:
    """Read the masks of the weights of one graph.

    Args:
        given: by module name, parameter name or `*_mask` buffer name.
        weights: of the graph's convolutions by plain name, with the groups of the convolution.
        model: the compiled model, if known.

    Raises:
        FxsparseError: a mask does not fit its weight, or its name is no weight of the model.
    """
    if model is not None:
        _refuse_unknown(given, [plain_name(name) for name, _ in model.named_parameters(remove_duplicate=False)])
    found: dict[str, WeightMask] = {}
    for name, (weight, groups) in weights.items():
        hits = [alias for alias in _aliases(name) if alias in given]
        if len(hits) > 1:
            raise FxsparseError(
                f"The masks name the weight '{name}' twice (as '{hits[0]}' and '{hits[1]}'). Give one mask a weight."
            )
        if hits:
            found[name] = reading.read(hits[0], given[hits[0]], weight, groups)
    return found


def _aliases(name: str) -> tuple[str, ...]:
    aliases = (name, name + "_mask", name + "_orig")
    return (*aliases, name.removesuffix(".weight")) if name.endswith(".weight") else aliases


def _refuse_unknown(given: Iterable[str], known: list[str]) -> None:
    aliases = {alias for name in known for alias in _aliases(name)}
    for name in given:
        if name not in aliases:
            raise FxsparseError(f"The masks name '{name}', which is no weight of the model. {names.near(name, known)}")
