"""The grammar of sizes in a saved program.

torch.export writes a size that depends on the inputs as sympy's `srepr`, as in `Add(Symbol('s77', integer=True),
Integer(-1))`, and reads it with `sympy.sympify`, which is Python's `eval`. So the text is parsed here first, by `ast`,
which runs nothing, and every part of it must be a call of a known function on known things. Powers are bounded, because
sympy evaluates those of numbers at once, and so is the number of calls that sympy compares with each other.
"""

from __future__ import annotations

import ast
import functools
import re

from fxsparse.json_values import Wrong

_LONGEST = 8192
_LARGEST_INTEGER = 2**63
_LARGEST_EXPONENT = 8
_MOST_COMPARED = 64
SYMBOL = re.compile(r"(s|u|z|f|zf|zuf|i)\d{1,5}")
_ASSUMPTIONS = frozenset(
    ("integer", "positive", "nonnegative", "negative", "zero", "nonzero", "real", "finite", "even")
)
_FUNCTION_NAMES = """
Add Mul Mod PythonMod FloorDiv CeilDiv CleanDiv ModularIndexing Max Min Where Identity IntTrueDiv FloatTrueDiv
ToFloat CeilToInt FloorToInt TruncToInt TruncToFloat RoundToInt Equality Unequality Eq Ne Gt Ge Lt Le
StrictGreaterThan GreaterThan StrictLessThan LessThan And Or Not
"""
_FUNCTIONS = frozenset(_FUNCTION_NAMES.split())


def check(text: str, place: str) -> None:
    """Refuse a text that is no expression of sizes.

    Args:
        text: what `sympy.sympify` would get.
        place: where it is, for the error.

    Raises:
        Wrong: it is not in the grammar.
    """
    if not _is_known(text):
        raise Wrong(text, place, "an expression of sizes as torch.export writes it")


@functools.lru_cache(maxsize=10_000)  # a program repeats the same few
def _is_known(text: str) -> bool:
    if len(text) > _LONGEST or not text.isascii() or "\n" in text:
        return False
    try:
        tree = ast.parse(text, mode="eval").body
        calls = [
            node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        ]
        return _is_expression(tree, in_power=False) and sum(name in ("Max", "Min") for name in calls) <= _MOST_COMPARED
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # MemoryError is what the parser raises when nested
        return False


def _is_expression(node: ast.AST, *, in_power: bool) -> bool:
    if isinstance(node, ast.Name):
        return node.id in ("true", "false")
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        return False
    name, arguments = node.func.id, node.args
    if name == "Symbol":
        named = len(arguments) == 1 and isinstance(arguments[0], ast.Constant) and isinstance(arguments[0].value, str)
        return named and SYMBOL.fullmatch(arguments[0].value) is not None and _are_assumptions(node.keywords)  # type: ignore[attr-defined]
    if node.keywords:
        return False
    if name == "Integer":
        return len(arguments) == 1 and _is_integer(arguments[0], _LARGEST_INTEGER)
    if name == "Rational":
        return len(arguments) == 2 and all(_is_integer(argument, _LARGEST_INTEGER) for argument in arguments)
    if name == "Pow":
        base, exponent = arguments if len(arguments) == 2 else (node, node)
        small = isinstance(exponent, ast.Call) and len(exponent.args) == 1
        small = small and _is_integer(exponent.args[0], _LARGEST_EXPONENT)  # type: ignore[attr-defined]
        # A power in a power of a power grows beyond any bound.
        return small and not in_power and all(_is_expression(part, in_power=True) for part in (base, exponent))
    return name in _FUNCTIONS and all(_is_expression(argument, in_power=in_power) for argument in arguments)


def _are_assumptions(keywords: list[ast.keyword]) -> bool:
    return all(
        k.arg in _ASSUMPTIONS and isinstance(k.value, ast.Constant) and isinstance(k.value.value, bool)
        for k in keywords
    )


def _is_integer(node: ast.AST, largest: int) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    return isinstance(node, ast.Constant) and type(node.value) is int and node.value <= largest
