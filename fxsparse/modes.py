"""Modes: what the convolutions of a converted model do when they are called, by site.

Setting a mode re-targets nodes of the graph. Nothing branches at run time, so a model in any mode is a plain module,
which can be copied, and in the modes TRAINING, VANILLA and SPARSE exported and compiled as well.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple

from torch import nn
from torch.fx import GraphModule, Node

from fxsparse import calibration_mode, graph_module, layouts, names, site_checks
from fxsparse.errors import FxsparseError
from fxsparse.report import graphs_of, refresh, report_of
from fxsparse.sites import ConvSite, conv_sites, retarget, site_of, update

_FORCED = "set by fxsparse.set_mode"


class Mode(enum.Enum):
    """What a conv site does.

    Attributes:
        TRAINING: computes densely with `where(mask, weight, 0)`: pruned weights stay zero, kept ones learn.
        VANILLA: takes the vanilla path, whatever the plan says.
        SPARSE: takes the sparse path, where there is one.
        TEST: takes both, raises where they disagree, and returns what the plan's path gives.
        BENCHMARK: times both, prints a row, and returns what the plan's path gives.
        CALIBRATION: chooses the path, on the inputs of the next calls.
    """

    TRAINING = "training"
    VANILLA = "vanilla"
    SPARSE = "sparse"
    TEST = "test"
    BENCHMARK = "benchmark"
    CALIBRATION = "calibration"


class ModeChange:
    """What `set_mode` changed: as a context manager it puts that back on exit.

    CALIBRATION is different: its exit keeps the paths that it chose.
    """

    def __init__(self, model: nn.Module, chosen: Sequence[_Chosen], mode: Mode) -> None:
        """Remember the modes of some sites, and the changes of layout in their graphs."""
        self._model = model
        self._mode = mode
        self._before = chosen
        self._layouts = [(gm, layouts.current(gm), graph_module.laid_aside(gm)) for gm in _graphs(chosen)]

    def __enter__(self) -> nn.Module:
        """Return the model."""
        return self._model

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put every site back that `set_mode` touched."""
        if self._mode is Mode.CALIBRATION:
            for chosen in self._before:
                if chosen.now.mode == Mode.CALIBRATION.value:
                    update(chosen.node, mode=chosen.now.path)
        else:
            self._restore()
        calibration_mode.follow(self._model)
        refresh(self._model, report_of(self._model))

    def _restore(self) -> None:
        for chosen in self._before:
            graph_module.refuse_frozen(chosen.now, chosen.site.mode)
        for gm, node, site in self._before:
            update(node, path=site.path, resume=site.resume, reason=site.reason)
            retarget(gm, node, site.mode)
        for gm, moves, laid_aside in self._layouts:
            layouts.clear(gm)
            layouts.place(gm, moves)
            graph_module.lay_aside(gm, laid_aside)
            graph_module.recompile(gm)


def set_mode(model: nn.Module, mode: Mode | str, sites: str | Sequence[str] = "*") -> ModeChange:
    """Set what the convolutions of a converted model do when they are called.

    Args:
        model: what `fxsparse.convert` returned; changed in place.
        mode: a `Mode` or its value, as in "test".
        sites: which convolutions: an exact name, a glob, a regular expression after `re:`, or several of these.

    Returns:
        A context manager that puts back what it found. Used without `with`, the mode stays.

    Raises:
        FxsparseError: the model was not converted, the mode does not exist, a rule matches no convolution, or only
            ones that the mode is not for, or a convolution is frozen.
    """
    wanted = _mode(mode)
    report_of(model)
    chosen = _choose(model, wanted, [sites] if isinstance(sites, str) else list(sites))
    change = ModeChange(model, chosen, wanted)
    for gm in _graphs(chosen):
        modes = {node: _mode_of(site, wanted) for owner, node, site in chosen if owner is gm}
        if wanted in (Mode.VANILLA, Mode.SPARSE):
            # The plan placed them for the paths that it chose.
            layouts.clear(gm)
            graph_module.lay_aside(gm, ())
            for _, node, site in chosen:
                if node in modes and site.path != modes[node]:
                    update(node, reason=_FORCED)
        graph_module.switch(gm, modes)
    calibration_mode.follow(model)
    site_checks.begin_table()
    refresh(model, report_of(model))
    return change


class _Chosen(NamedTuple):
    """A site that a rule chose, as it was then."""

    gm: GraphModule
    node: Node
    site: ConvSite

    @property
    def now(self) -> ConvSite:
        """The site as it is by now."""
        site = site_of(self.node)
        assert site is not None
        return site


def _mode(given: Mode | str) -> Mode:
    try:
        return Mode(given)
    except ValueError:
        known = ", ".join(f"'{mode.value}'" for mode in Mode)
        raise FxsparseError(f"'{given}' is no mode. Give a fxsparse.Mode, or one of {known}.") from None


def _choose(model: nn.Module, mode: Mode, rules: Sequence[str]) -> list[_Chosen]:
    """Return the sites that the rules name; refuse those that the mode is not for."""
    every = [_Chosen(gm, node, site) for gm in graphs_of(model) for node, site in conv_sites(gm)]
    known = list(dict.fromkeys(chosen.site.name for chosen in every))
    hits = {rule: names.matching([rule], known, "sites") for rule in rules}
    for rule, matched in hits.items():
        unpacked = [c.site for c in every if c.site.name in matched and not c.site.packed]
        if mode is Mode.SPARSE and rule != "*" and matched and len({s.name for s in unpacked}) == len(matched):
            reasons = "; ".join(f"'{site.name}': {site.reason or 'nothing is packed'}" for site in unpacked[:3])
            raise FxsparseError(
                f"The sites rule '{rule}' names no convolution with a sparse path ({reasons}). Leave it out of the "
                "rules, or change what the reason says and convert again."
            )
    found = [chosen for chosen in every if any(chosen.site.name in matched for matched in hits.values())]
    for chosen in found:
        graph_module.refuse_frozen(chosen.site, _mode_of(chosen.site, mode))
    return found


def _mode_of(site: ConvSite, mode: Mode) -> str:
    """Return the mode that a site gets: without a packed weight, SPARSE leaves it vanilla."""
    return "vanilla" if mode is Mode.SPARSE and not site.packed else mode.value


def _graphs(chosen: Sequence[_Chosen]) -> list[GraphModule]:
    return list(dict.fromkeys(gm for gm, _, _ in chosen))
