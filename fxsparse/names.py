"""Name rules: exact names, globs and `re:` patterns. A rule that matches nothing is an error."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence

from fxsparse.errors import FxsparseError


def matching(rules: Sequence[str], names: Iterable[str], what: str) -> set[str]:
    """Return the names that any of the rules matches.

    Args:
        rules: exact names, globs (`*`, `?`, `[...]`) or regular expressions after `re:` (matched in full).
        names: the names there are.
        what: what a rule is for, used in the error: "include", "exclude".

    Raises:
        FxsparseError: a rule matches none of the names, or is not a valid regular expression.
    """
    known = list(names)
    found: set[str] = set()
    for rule in rules:
        hits = [name for name in known if _matches(rule, name, what)]
        if not hits and rule != "*":
            raise FxsparseError(f"The {what} rule '{rule}' matches no convolution. {near(rule, known)}")
        found.update(hits)
    return found


def near(name: str, known: Sequence[str]) -> str:
    """Return a sentence that lists the known names nearest to `name`."""
    if not known:
        return "The model has none."
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    if close:
        return "Near names: " + ", ".join(f"'{c}'" for c in close) + "."
    shown = ", ".join(f"'{k}'" for k in known[:5])
    return f"Known names: {shown}{', ...' if len(known) > 5 else ''}."


def _matches(rule: str, name: str, what: str) -> bool:
    if rule.startswith("re:"):
        try:
            return re.fullmatch(rule[3:], name) is not None
        except re.error as error:
            raise FxsparseError(f"The {what} rule '{rule}' is not a valid regular expression: {error}.") from None
    return rule == name or fnmatch.fnmatchcase(name, rule)
