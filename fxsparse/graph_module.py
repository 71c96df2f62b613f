"""The GraphModule of a converted graph: it follows `train()` and `eval()`, and its copies keep what hangs on it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch.fx import GraphModule, Node
from torch.fx.graph import PythonCode

from fxsparse import epilogues, layouts, regions, shared_paths, sites
from fxsparse.errors import FxsparseError
from fxsparse.plan import Move
from fxsparse.sites import TRAINING, ConvSite

_LAID_ASIDE = "fxsparse_laid_aside"  # in the meta, which copies keep
# GraphModule.__init__ runs when one is copied, and makes them empty.
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


class ConvertedModule(GraphModule):
    """A graph with conv sites: `train()` puts them in the mode TRAINING, and `eval()` back to what they were in."""

    def train(self, mode: bool = True) -> ConvertedModule:
        """Set the training mode, and with it the modes of the conv sites.

        Raises:
            FxsparseError: a convolution is frozen, so that it cannot train.
        """
        if mode:
            begin_training(self)
        else:
            end_training(self)
        super().train(mode)
        return self

    def recompile(self) -> PythonCode:
        """Generate the code: epilogues in the convolutions, regions as single calls, each module looked up once."""
        shared_paths.install(self)
        graph = self._graph
        self._graph = regions.gathered(self, epilogues.executed(self))
        try:
            return super().recompile()
        finally:
            self._graph = graph

    def _apply(self, fn: Any, recurse: bool = True) -> ConvertedModule:
        """Move or cast everything, as `to`, `half` and others do; which calls the code makes depends on the device."""
        before = {tensor.device for tensor in self.buffers()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if {tensor.device for tensor in self.buffers()} != before:
            self.recompile()
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> ConvertedModule:
        """Copy the graph with its hooks and plain attributes, which GraphModule drops."""
        copied: ConvertedModule = super().__deepcopy__(memo)  # type: ignore[assignment]
        for name, value in self.__dict__.items():
            if name in HOOKS or name not in copied.__dict__:
                copied.__dict__[name] = copy.deepcopy(value, memo)
        return copied


def begin_training(gm: GraphModule) -> None:
    """Put every conv site of a graph in the mode TRAINING.

    Raises:
        FxsparseError: a site is frozen.
    """
    nodes = [node for node, site in sites.conv_sites(gm) if site.mode != TRAINING]
    for node in nodes:
        refuse_frozen(node.meta[sites.META], TRAINING)
    if nodes:
        switch(gm, dict.fromkeys(nodes, TRAINING))


def end_training(gm: GraphModule) -> None:
    """Put every site that is in the mode TRAINING back to the mode that it was in before."""
    training = {node: site.resume or site.path for node, site in sites.conv_sites(gm) if site.mode == TRAINING}
    if training:
        switch(gm, training)


def follow_training_flag(gm: GraphModule) -> None:
    """Put the conv sites of a graph that was captured in training mode into the mode TRAINING."""
    if gm.training:
        begin_training(gm)


def switch(gm: GraphModule, modes: Mapping[Node, str]) -> None:
    """Put conv sites of one graph into other modes, and recompile.

    The plan's changes of layout hold for the paths that it chose, so TRAINING lays them aside until no site of the
    graph is in it any more.
    """
    if TRAINING in modes.values():
        if not _trains(gm):
            lay_aside(gm, layouts.current(gm))
        layouts.clear(gm)
    for node, mode in modes.items():
        site: ConvSite = node.meta[sites.META]
        if mode in ("vanilla", "sparse"):
            sites.set_path(gm, node, mode)
        else:
            sites.update(node, resume=(site.resume or site.mode) if mode == TRAINING else None)
            sites.retarget(gm, node, mode)
    if not _trains(gm):
        layouts.place(gm, laid_aside(gm))
        lay_aside(gm, ())
    recompile(gm)


def _trains(gm: GraphModule) -> bool:
    return any(site.mode == TRAINING for _, site in sites.conv_sites(gm))


def laid_aside(gm: GraphModule) -> tuple[Move, ...]:
    """Return the changes of layout that come back when TRAINING ends."""
    moves: tuple[Move, ...] = gm.meta.get(_LAID_ASIDE, ())
    return moves


def lay_aside(gm: GraphModule, moves: tuple[Move, ...]) -> None:
    """Set the changes of layout that come back when TRAINING ends."""
    if moves:
        gm.meta[_LAID_ASIDE] = moves
    else:
        gm.meta.pop(_LAID_ASIDE, None)


def recompile(gm: GraphModule) -> None:
    """Check a graph and generate its code."""
    gm.graph.lint()
    gm.recompile()


def refresh_packed(gm: GraphModule) -> None:
    """Bring every packed weight of a graph up to date with its dense one, once each (see `sites.refresh_weight`)."""
    by_weight = {site.weight: site for _, site in sites.conv_sites(gm) if not site.frozen}
    for site in by_weight.values():
        sites.refresh_weight(gm, site)


def refuse_frozen(site: ConvSite, mode: str) -> None:
    """Refuse to put a frozen site into a mode other than its path.

    Raises:
        FxsparseError: `fxsparse.freeze` has dropped the tensors that the mode needs.
    """
    if site.frozen and mode != site.path:
        raise FxsparseError(
            f"'{site.name}' is frozen on its {site.path} path: the tensors that the mode '{mode}' needs are gone. "
            "Keep a copy.deepcopy of the model from before fxsparse.freeze, or convert it again."
        )
