"""Make the code of a graph look a module up once, not once for each of its tensors.

torch.fx writes `self.features.0.conv.weight` out for every tensor, and every step of such a path goes through
`nn.Module.__getattr__`: about 1 us a step, five paths for each sparse convolution. Small images feel that. So modules
get local names, and they and buffers, which packed tensors are, come from their owner's dicts of them. Parameters do
not: in a replica of `nn.DataParallel` they are plain attributes.
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
# All of a line's right side: one tensor.
_READ = re.compile(rf"(?<= = )(?P<owner>self|{_NAME}\d+)\.(?P<name>\w+)(?=\s*(;|$))")


class SharedPaths:
    """Transforms the body of a graph's code.

    Args:
        before: the transformer that the graph had, which runs first.
        buffers: names of the buffers, from the root.
        modules: and of the modules.
    """

    def __init__(self, before: Transformer | None, buffers: frozenset[str], modules: frozenset[str]) -> None:
        """Remember what to run first, and what is a buffer or a module."""
        self.before = before
        self._buffers, self._modules = buffers, modules

    def __call__(self, body: list[str]) -> list[str]:
        """Give every module on a path a local name, where it is first needed."""
        known: dict[tuple[str, str], str] = {}
        prefixes = {"self": ""}  # by local name, what the names of its tensors begin with
        lines: list[str] = []

        def local(match: re.Match[str]) -> str:
            owner, name = match["of"] or match["on"], match["name"] or match["attr"]
            if (owner, name) not in known:
                known[owner, name] = f"{_NAME}{len(known)}"
                path = prefixes[owner] + name
                prefixes[known[owner, name]] = f"{path}."
                step = f"{owner}._modules[{name!r}]" if path in self._modules else match[0]
                lines.append(f"{known[owner, name]} = {step}\n")
            return known[owner, name]

        def buffer(match: re.Match[str]) -> str:
            owner, name = match["owner"], match["name"]
            if prefixes[owner] + name not in self._buffers:
                return match[0]
            if (owner, "") not in known:
                known[owner, ""] = f"{_NAME}{len(known)}"
                lines.append(f"{known[owner, '']} = {owner}._buffers\n")
            return f"{known[owner, '']}['{name}']"

        for line in self.before(body) if self.before else body:
            count = 1
            while count:
                line, count = _STEP.subn(local, line, count=1)
            lines.append(_READ.sub(buffer, line))
        return lines


def install(gm: GraphModule) -> None:
    """Make a graph generate its code so, from the next `recompile` on, with what the module has now."""
    buffers = frozenset(name for name, _ in gm.named_buffers(remove_duplicate=False))
    modules = frozenset(name for name, _ in gm.named_modules(remove_duplicate=False))

    def transformer(now: Transformer | None) -> Transformer:
        return SharedPaths(now.before if isinstance(now, SharedPaths) else now, buffers, modules)

    gm.graph.on_generate_code(transformer)
