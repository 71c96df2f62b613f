"""Which nodes of a graph write into their input."""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

_IN_PLACE_OPERATORS = frozenset(
    {
        *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod),
        *(operator.ipow, operator.imatmul, operator.iand, operator.ior, operator.ixor, operator.ilshift),
        *(operator.irshift, operator.iconcat, operator.setitem, setattr),
    }
)


def written_input(gm: GraphModule, node: Node) -> Node | None:
    """Return the input that a node writes into, or None."""
    first = next((a for a in (*node.args, *node.kwargs.values()) if isinstance(a, Node)), None)
    if node.op == "call_module":
        return first if getattr(gm.get_submodule(str(node.target)), "inplace", False) else None
    if node.op == "call_method":
        name = str(node.target)
        writes = (name.endswith("_") and not name.endswith("__")) or name in ("__iadd__", "__imul__", "__setitem__")
        return first if writes else None
    if node.op != "call_function":
        return None
    if isinstance(node.target, torch._ops.OpOverload):
        return first if node.target._schema.is_mutable else None
    target: Any = node.target
    name = getattr(target, "__name__", "")
    if (
        target in _IN_PLACE_OPERATORS
        or (name.endswith("_") and not name.endswith("__"))
        or node.kwargs.get("out") is not None
    ):
        return first
    return first if _inplace_argument(node) else None


def _inplace_argument(node: Node) -> bool:
    if "inplace" in node.kwargs:
        return bool(node.kwargs["inplace"])
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a builtin without a signature has no such argument
        return False
    return bool(bound.arguments.get("inplace", False))
