"""What every pass takes and gives."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from fxsparse.masks import WeightMask
from fxsparse.settings import Settings


@dataclasses.dataclass
class PassContext:
    """What the passes over one graph share.

    Attributes:
        settings: of the conversion.
        masks: by parameter name in the user's model.
        prefix: what to put before a name of this graph to get the name in the user's model.
        counts: what the passes did, by pass and thing, for tests and logs.
        others: convolutions that are no conv sites, as (name, reason), for the report.
        selected: names of the convolutions that the include and exclude rules choose; None means all.
    """

    settings: Settings
    masks: Mapping[str, WeightMask] = dataclasses.field(default_factory=dict)
    prefix: str = ""
    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    others: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    selected: frozenset[str] | None = None

    def full_name(self, name: str) -> str:
        """Return the name in the user's model of something in this graph."""
        return (self.prefix + name).rstrip(".")


Pass = Callable[[GraphModule, PassContext], PassResult]


def finish(gm: GraphModule, ctx: PassContext, counts: Mapping[str, int]) -> PassResult:
    """Count what a pass did; lint and recompile once, only if that was anything."""
    ctx.counts.update(counts)
    modified = any(counts.values())
    if modified:
        gm.graph.lint()
        gm.recompile()
    return PassResult(gm, modified)
