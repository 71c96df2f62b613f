"""Make the code of a graph look a module up once, not once for each of its tensors.

torch.fx writes `self.features.0.conv.weight` out for every tensor, and every step of such a path goes through
`nn.Module.__getattr__`: about 1 us a step, five paths for each sparse convolution. Small images feel that.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from torch.fx import GraphModule

Transformer = Callable[[list[str]], list[str]]

_NAME = "_fxsparse_path_"
# A step of a path that has another step after it, in either of the forms that torch.fx writes.
_STEP = re.compile(
    rf"""(?<!["'\w.])(?:getattr\((?P<of>self|{_NAME}\d+), "(?P<name>[^"\\]+)"\)"""
    rf"""|(?P<on>self|{_NAME}\d+)\.(?P<attr>\w+))(?=\.\w|, ")"""
)


class SharedPaths:
    """Transforms the body of a graph's code; runs after the transformer that the graph had."""

    def __init__(self, before: Transformer | None) -> None:
        """Remember the transformer that runs first."""
        self._before = before

    def __call__(self, body: list[str]) -> list[str]:
        """Give every module on a path a local name, where it is first needed."""
        known: dict[tuple[str, str], str] = {}
        lines: list[str] = []

        def local(match: re.Match[str]) -> str:
            owner, name = match["of"] or match["on"], match["name"] or match["attr"]
            if (owner, name) not in known:
                known[owner, name] = f"{_NAME}{len(known)}"
                lines.append(f"{known[owner, name]} = {match[0]}\n")
            return known[owner, name]

        for line in self._before(body) if self._before else body:
            count = 1
            while count:
                line, count = _STEP.subn(local, line, count=1)
            lines.append(line)
        return lines


def install(gm: GraphModule) -> None:
    """Make a graph generate its code so, from the next `recompile` on; once is enough."""
    gm.graph.on_generate_code(lambda now: now if isinstance(now, SharedPaths) else SharedPaths(now))
