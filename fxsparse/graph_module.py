"""The GraphModule of a converted graph: it follows `train()` and `eval()`, and its copies keep what hangs on it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import PythonCode

from fxsparse import checkpoints, layouts, regions, shared_paths, sites, tiled_weights
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

    _single_steps = False  # whether the code is that of the graph as it is, see `single_steps`
    _kinds: frozenset[tuple[torch.device, torch.dtype]] = frozenset()  # of the tensors that the code was made for
    may_tile = True  # whether its convolutions may run on tiled weights, which nobody else brings up to date

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
        # torch.compile does not look at the code of a module inside of a model again, but at its class it does.
        # torch.fx knows the classes that it makes for single modules by this name.
        fresh = type("GraphModuleImpl", (ConvertedModule,), {"__module__": __name__})
        fresh.__name__ = type(self).__name__
        self.__class__ = fresh
        if _follow not in self._load_state_dict_post_hooks.values():
            self.register_load_state_dict_post_hook(_follow)  # type: ignore[no-untyped-call]
        tiled_weights.detach(self)
        self._kinds = _kinds(self)
        graph = self._graph
        self._graph = graph if self._single_steps else regions.executed(self)
        try:
            return super().recompile()
        finally:
            self._graph = graph

    def _graph_to_see(self) -> Graph:
        # torch.export runs the graph of a GraphModule instead of its code: it shall get what the code does.
        exporting = torch.compiler.is_exporting() and not self._single_steps
        return regions.executed(self) if exporting else self._graph

    graph = property(_graph_to_see, GraphModule.graph.fset, doc="The graph, a node for every step.")  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: dict[int, Any]) -> ConvertedModule:
        """Copy the graph with its hooks and plain attributes, which GraphModule drops."""
        copied: ConvertedModule = super().__deepcopy__(memo)  # type: ignore[assignment]
        for name, value in self.__dict__.items():
            if name in HOOKS or name not in copied.__dict__:
                copied.__dict__[name] = copy.deepcopy(value, memo)
        return copied

    def __copy__(self) -> ConvertedModule:
        """Copy the graph, whose nodes a mode re-targets; share the parameters and buffers."""
        return copy.deepcopy(self, {id(tensor): tensor for tensor in chain(self.parameters(), self.buffers())})

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse to be pickled: pickle would keep the generated code and drop what fxsparse knows of it."""
        raise FxsparseError(
            "A converted model cannot be pickled, nor saved by torch.save. Use fxsparse.save(model, path) and "
            "fxsparse.load(path), also to bring it to another process; torch.save(model.state_dict(), path) keeps its "
            "tensors alone."
        )

    def __reduce_package__(self, exporter: Any) -> NoReturn:
        """Refuse to be packed by torch.package, for the same reason."""
        self.__reduce_ex__(0)

    def _replicate_for_data_parallel(self) -> ConvertedModule:
        """Return a replica that shares the graph and its code: it lives for one call and only runs."""
        replica: ConvertedModule = object.__new__(type(self))
        replica.__dict__ = {
            **self.__dict__,
            "_parameters": {},
            "_buffers": self._buffers.copy(),
            "_modules": self._modules.copy(),
            "_is_replica": True,
        }
        return replica

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ConvertedModule:
        """Cast or move the tensors; masks and tables keep their dtype and, even under `to_empty`, their content."""
        tiled = tiled_weights.detach(self)  # in another dtype they lie in another order
        fixed = {name: sites.attribute(self, name) for name in _fixed_names(self)}
        before = {name: layouts.layout_of(weight) for name, weight in _dense_weights(self)}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in fixed.items():
            device = sites.attribute(self, name).device
            if tensor.is_meta and device.type != "meta":
                # No content yet: tables of zeros, which no kernel reads out of bounds, and masks that prune nothing.
                tensor = torch.full_like(tensor, tensor.dtype == torch.bool, device=device)
            sites.set_attribute(self, name, tensor.to(device))
        for name, weight in _dense_weights(self):
            if layouts.layout_of(weight) != before[name]:  # the user's layout, which calibration comes back to
                for node, site in sites.conv_sites(self):
                    if site.weight == name:
                        sites.update(node, weight_layout=layouts.layout_of(weight))
        if tiled or _kinds(self) != self._kinds:
            self.recompile()
        return self

    def _load_from_state_dict(
        self,
        state_dict: MutableMapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Bring dense weights into the form of this graph before torch loads them."""
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        checkpoints.translate(self, state_dict, prefix, missing_keys, error_msgs, assign=assign)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _follow(gm: ConvertedModule, incompatible_keys: Any) -> None:
    """Follow a state dict that was loaded: called by torch when all of the graph's modules have got theirs."""
    if _kinds(gm) != gm._kinds:  # what it brought replaced tensors of the meta device
        gm.recompile()
    tiled_weights.follow(gm)


def _kinds(gm: GraphModule) -> frozenset[tuple[torch.device, torch.dtype]]:
    """Return what decides whether and which regions there are."""
    return frozenset((tensor.device, tensor.dtype) for tensor in gm.buffers() if tensor.is_floating_point())


def _fixed_names(gm: GraphModule) -> list[str]:
    """Name the masks and tables of a graph: they belong to the conversion, whatever dtype the weights have."""
    names: dict[str, None] = {}
    for _, site in sites.conv_sites(gm):
        names.update(
            dict.fromkeys([*([site.mask] if site.mask else []), *(site.packed_names[1:] if site.packed else ())])
        )
    return list(names)


def _dense_weights(gm: GraphModule) -> list[tuple[str, Tensor]]:
    """Return the dense weights of a graph's sites, by name, where `freeze` has not dropped them."""
    own = {**dict(gm.named_parameters(remove_duplicate=False)), **dict(gm.named_buffers(remove_duplicate=False))}
    return [(name, own[name]) for name in dict.fromkeys(s.weight for _, s in sites.conv_sites(gm)) if name in own]


@contextmanager
def single_steps(gm: ConvertedModule) -> Iterator[None]:
    """Let a graph run, and be exported, as it is: a node for every step, without epilogues and regions."""
    gm._single_steps = True
    gm.recompile()
    try:
        yield
    finally:
        del gm._single_steps
        gm.recompile()


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
