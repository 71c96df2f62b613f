"""Readers of the values in a saved program, each with its place, as `json_values` has them."""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Callable, Iterable
from typing import Any

from fxsparse import json_values
from fxsparse.json_values import Reader, Wrong
from fxsparse.saving import expression_check

DEVICES = ("cpu", "cuda", "mps", "xpu", "meta")
_DEEPEST = 20

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,499}")
# Parts that are no identifiers end up between double quotes in generated code.
_TENSOR_NAME = re.compile(r"[A-Za-z0-9_:+/ -]+(\.[A-Za-z0-9_:+/ -]+){0,99}")
_RESERVED = frozenset(("self", "torch", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree"))  # in generated code
_KEY = re.compile(r"[A-Za-z0-9_ .:/-]{0,200}")


def tensor_name(value: Any, place: str) -> str:
    """Read the dotted name of a parameter or buffer, whose parts become attributes of modules."""
    name = json_values.text(value, place)
    if len(name) > 1000 or not _TENSOR_NAME.fullmatch(name) or any(p.startswith("__") for p in name.split(".")):
        raise Wrong(value, place, "the dotted name of a parameter or buffer")
    return name


def dtype_number(value: Any, place: str) -> int:
    """Read the number that torch.export gives a dtype."""
    return int(up_to(63)(value, place))


def device(value: Any, place: str) -> str:
    """Read a device."""
    fields = fields_of(value, place, ("type",), ("index",))
    json_values.optional(up_to(1023))(fields.get("index"), f"{place}.index")
    return str(json_values.one_of(DEVICES)(fields["type"], f"{place}.type"))


def fields_of(value: Any, place: str, required: Iterable[str], optional: Iterable[str] = ()) -> dict[str, Any]:
    """Read an object that has the required fields and no others than the optional ones."""
    required = set(required)
    if not isinstance(value, dict) or not required <= set(value) <= required | set(optional):
        raise Wrong(value, place, f"an object with the fields {', '.join(sorted(required))}")
    return value


def list_of(value: Any, place: str, length: int | None = None) -> list[Any]:
    """Read a list."""
    if not isinstance(value, list) or (length is not None and len(value) != length):
        raise Wrong(value, place, "a list" if length is None else f"a list of {length}")
    return value


def tagged(value: Any, place: str) -> tuple[str, Any, str]:
    """Read an object with one field: return the field, its value and its place."""
    if not isinstance(value, dict) or len(value) != 1:
        raise Wrong(value, place, "an object with one field")
    ((tag, inner),) = value.items()
    return tag, inner, f"{place}.{tag}"


def by_tag(readers: dict[str, Reader], tag: str, place: str) -> Reader:
    """Return the reader of a tag."""
    if tag not in readers:
        raise Wrong(tag, place, f"one of {', '.join(readers)}")
    return readers[tag]


def one_tag(**readers: Reader) -> Reader:
    """Return a reader of an object with one of these fields, and with no other."""

    def read(value: Any, place: str) -> Any:
        tag, inner, here = tagged(value, place)
        return by_tag(readers, tag, here)(inner, here)

    return read


def empty(value: Any, place: str) -> None:
    """Read an empty list or object."""
    if value not in ([], {}):
        raise Wrong(value, place, "empty")


def identifier(value: Any, place: str) -> str:
    """Read a name that is pasted into generated Python: plain, and none that has a meaning there."""
    name = json_values.text(value, place)
    if not _NAME.fullmatch(name) or keyword.iskeyword(name) or name in _RESERVED or name.startswith("__"):
        raise Wrong(value, place, "a plain name")
    return name


def name_record(value: Any, place: str) -> str:
    """Read an object that holds a name."""
    return identifier(fields_of(value, place, ("name",))["name"], f"{place}.name")


def boolean(value: Any, place: str) -> bool:
    """Read true or false."""
    if not isinstance(value, bool):
        raise Wrong(value, place, "true or false")
    return value


def up_to(largest: int) -> Reader:
    """Return a reader of an integer from 0 on."""

    def read(value: Any, place: str) -> int:
        if json_values.integer(value, place) > largest:
            raise Wrong(value, place, f"an integer up to {largest}")
        return int(value)

    return read


def signed(value: Any, place: str) -> int:
    """Read an integer of 64 bits."""
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise Wrong(value, place, "an integer of 64 bits")
    return value


def number(value: Any, place: str) -> Any:
    """Read a number, which may be infinite."""
    if type(value) not in (int, float) and value not in ("Infinity", "-Infinity", "NaN"):
        raise Wrong(value, place, "a number")
    return value


def string(value: Any, place: str) -> str:
    """Read a short printable string."""
    text = json_values.text(value, place)
    if len(text) > 1000 or not text.isprintable():
        raise Wrong(value, place, "a short printable string")
    return text


def range_of(value: Any, place: str) -> None:
    """Read the range of a symbol."""
    fields = fields_of(value, place, ("min_val", "max_val"))
    low, high = (json_values.optional(signed)(fields[name], f"{place}.{name}") for name in ("min_val", "max_val"))
    if low is not None and high is not None and low > high:
        raise Wrong(value, place, "a range, its lower end first")


def _expression(hint: str, read_hint: Callable[[Any, str], Any]) -> Reader:
    def read(value: Any, place: str) -> None:
        fields = fields_of(value, place, ("expr_str",), ("hint",))
        expression_check.check(json_values.text(fields["expr_str"], f"{place}.expr_str"), f"{place}.expr_str")
        json_values.optional(one_tag(**{hint: read_hint}))(fields.get("hint"), f"{place}.hint")

    return read


def tensor_meta(value: Any, place: str) -> None:
    """Read the dtype, sizes, strides and device of a tensor."""
    fields = fields_of(
        value, place, ("dtype", "sizes", "requires_grad", "device", "strides", "storage_offset", "layout")
    )
    dtype_number(fields["dtype"], f"{place}.dtype")
    boolean(fields["requires_grad"], f"{place}.requires_grad")
    device(fields["device"], f"{place}.device")
    up_to(7)(fields["layout"], f"{place}.layout")
    size(fields["storage_offset"], f"{place}.storage_offset")
    lengths = {len(json_values.tuple_of(size)(fields[name], f"{place}.{name}")) for name in ("sizes", "strides")}
    if len(lengths) != 1:
        raise Wrong(fields["strides"], f"{place}.strides", "a stride for each size")


def treespec(value: Any, place: str) -> None:
    """Read the structure of the inputs or outputs: JSON text in which torch looks types up and imports enums."""
    try:
        version, spec = json.loads(json_values.text(value, place))
    except (ValueError, TypeError, RecursionError):
        raise Wrong(value, place, "JSON text of a version and a tree") from None
    if version != 1:
        raise Wrong(version, f"{place}[0]", "1")
    _tree(spec, place, 0)
    if place == "in_spec":
        children = spec["children_spec"]
        arguments = spec["type"] == "builtins.tuple" and [child["type"] for child in children]
        if arguments != ["builtins.tuple", "builtins.dict"]:
            raise Wrong(spec, place, "a tuple of arguments and a dict of keywords")
        identifiers(json.loads(children[1]["context"]), f"{place}.keywords")  # they become names in generated code


def _tree(value: Any, place: str, depth: int) -> None:
    fields = fields_of(value, place, ("type", "context", "children_spec"))
    children = list_of(fields["children_spec"], f"{place}.children_spec")
    if depth > _DEEPEST:
        raise Wrong(depth, place, f"nested at most {_DEEPEST} deep")
    kind = fields["type"]
    if kind is None:
        if fields["context"] is not None or children:
            raise Wrong(value, place, "a leaf")
        return
    json_values.one_of(("builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"))(kind, place)
    try:
        context = json.loads(json_values.text(fields["context"], f"{place}.context"))
    except (ValueError, RecursionError):
        raise Wrong(fields["context"], f"{place}.context", "JSON text") from None
    if kind in ("builtins.tuple", "builtins.list"):
        if context is not None:
            raise Wrong(context, f"{place}.context", "null")
    elif not isinstance(context, list) or len(context) != len(children) or not all(map(_is_key, context)):
        raise Wrong(context, f"{place}.context", "a plain key for each child")
    for i, child in enumerate(children):
        _tree(child, f"{place}.children_spec[{i}]", depth + 1)


def _is_key(value: Any) -> bool:
    return type(value) is int or (isinstance(value, str) and _KEY.fullmatch(value) is not None)


def flat(value: Any) -> Iterable[str]:
    """Yield the names in nested tuples of them."""
    if isinstance(value, str):
        yield value
    elif value is not None:
        for item in value:
            yield from flat(item)


identifiers = json_values.tuple_of(identifier)
size = one_tag(as_int=json_values.integer, as_expr=_expression("as_int", signed))
condition = one_tag(as_bool=boolean, as_expr=_expression("as_bool", boolean))
scalar = one_tag(as_float=number, as_expr=_expression("as_float", number))
_sym_int = one_tag(as_name=identifier, as_int=signed)
_sym_bool = one_tag(as_name=identifier, as_bool=boolean)
_sym_float = one_tag(as_name=identifier, as_float=number)
_optional_tensor = one_tag(as_tensor=name_record, as_none=lambda value, place: None)
CONSTANTS: dict[str, Reader] = {
    "as_none": lambda value, place: None,
    "as_int": signed,
    "as_float": number,
    "as_string": string,
    "as_bool": boolean,
}
OF_TENSORS: dict[str, Reader] = {
    "as_tensor": name_record,
    "as_tensors": json_values.tuple_of(name_record),
    "as_optional_tensor": _optional_tensor,
    "as_optional_tensors": json_values.tuple_of(_optional_tensor),
    "as_nested_tensors": json_values.tuple_of(json_values.tuple_of(name_record)),
}
# Left out: as_custom_obj (unpickles), as_operator (any attribute of torch), as_graph (operators that run one), and what
# only Triton kernels take.
ARGUMENTS: dict[str, Reader] = {
    **CONSTANTS,
    **OF_TENSORS,
    "as_ints": json_values.tuple_of(signed),
    "as_floats": json_values.tuple_of(number),
    "as_strings": json_values.tuple_of(string),
    "as_bools": json_values.tuple_of(boolean),
    "as_sym_int": _sym_int,
    "as_sym_ints": json_values.tuple_of(_sym_int),
    "as_sym_bool": _sym_bool,
    "as_sym_bools": json_values.tuple_of(_sym_bool),
    "as_sym_float": _sym_float,
    "as_sym_floats": json_values.tuple_of(_sym_float),
    "as_scalar_type": dtype_number,
    "as_memory_format": up_to(4),
    "as_layout": up_to(7),
    "as_device": device,
    "as_complex": lambda value, place: [
        number(part, place) for part in fields_of(value, place, ("real", "imag")).values()
    ],
}
