"""Runs of the model in which every convolution is timed where it stands, in every way it could run.

Each run takes one candidate of every convolution, so that the caches hold what they will hold in a model that runs so:
timed over and over in a loop, or side by side with its rivals, a layer finds another cache than it will have.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree
from tqdm import tqdm

from fxsparse import agreement, sites, tiled_weights, timing
from fxsparse.calibration import packings
from fxsparse.calibration.probes import Seen, probed
from fxsparse.calibration.samples import BATCH_INNER, Candidate, Measured, Samples
from fxsparse.calibration.transparency import is_elementwise, is_transparent, may_choose_layouts
from fxsparse.errors import FxsparseError
from fxsparse.inputs import ExampleInputs
from fxsparse.layouts import MEMORY_FORMATS
from fxsparse.ops import batch_inner
from fxsparse.ops.packing import PackedWeight
from fxsparse.ops.precision import convs_allow_tf32
from fxsparse.ops.region import NONE, Add
from fxsparse.report import graphs_of
from fxsparse.sites import ConvSite, Support
from fxsparse.writes import written_input

_FIRST_LOOK = 4  # samples after which candidates that are far behind are dropped
# Rounds before the first sample counts: until one is not clearly faster than the one before, or its runs last.
_WARM_UPS, _STILL_FALLS, _LASTING_RUN_S = 4, 0.9, 0.5
_MIN_SAMPLES, _MAX_SAMPLES = 9, 200  # nine are the fewest whose 95 % interval leaves out the extremes
# Samples of one candidate in a row, after a run that only fills the caches. Longer runs fill them by themselves.
_SAMPLES_IN_A_ROW, _LONG_RUN_S = 2, 0.05
_ROUND_TRIP_MOVES = 3  # what a region that computes nothing takes, in changes of layout


@dataclasses.dataclass
class Measurements:
    """Everything that the runs of a model showed.

    Attributes:
        sites: by node.
        values: the 4-D tensors of the graphs, by node.
        others: layout-transparent nodes whose time depends on the layout, by node; the arms are the layouts.
        moves: changes of layout, by (shape, dtype); the arms are the layouts that they go to, with `BATCH_INNER` where
            a region could.
        layouts: whether each graph's layouts may be chosen, by graph.
    """

    sites: dict[Node, Measured] = dataclasses.field(default_factory=dict)
    values: dict[Node, Seen] = dataclasses.field(default_factory=dict)
    others: dict[Node, Samples] = dataclasses.field(default_factory=dict)
    moves: dict[tuple[tuple[int, ...], torch.dtype], Samples] = dataclasses.field(default_factory=dict)
    layouts: dict[GraphModule, Support] = dataclasses.field(default_factory=dict)

    def half(self, which: int) -> Measurements:
        """Return the same with every second sample only, from the first (0) or the second (1) on."""
        return Measurements(
            {node: dataclasses.replace(m, samples=m.samples.half(which)) for node, m in self.sites.items()},
            self.values,
            {node: samples.half(which) for node, samples in self.others.items()},
            {key: samples.half(which) for key, samples in self.moves.items()},
            self.layouts,
        )


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        seconds: for all runs, about; nine samples there are in any case.
        margin: share by which sparse must win; the measurement ends early once every site's answer is clear.
        graphs: time replays of CUDA graphs in place of eager calls.
        only: names of the convolutions to time; None times all.
    """

    seconds: float
    margin: float = 0.05
    graphs: bool = False
    only: frozenset[str] | None = None


def observe(model: nn.Module, inputs: ExampleInputs) -> Measurements:
    """Run a converted model once and record its values, without timing anything."""
    found = Measurements()

    def convolve(gm: GraphModule, node: Node, source: Tensor) -> Tensor:
        site = sites.site_of(node)
        assert site is not None
        found.sites.setdefault(node, Measured(Seen.of(source)))
        return sites.run_vanilla(gm, site, source)

    def after(gm: GraphModule, node: Node, value: Any) -> None:
        if node in found.sites:
            found.sites[node].output_shape = tuple(value.shape)

    with probed(model, convolve, _ignore, after, lambda gm, node: False), torch.no_grad():
        inputs.run(model)
    return found


def _ignore(gm: GraphModule, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    pass


def measure(model: nn.Module, inputs: ExampleInputs, effort: Effort, bar: tqdm[Any]) -> Measurements:
    """Run a converted model many times and time every convolution, and what else depends on the layout.

    Args:
        model: every site vanilla, no changes of layout; nobody else uses it meanwhile.
        inputs: of the runs.
        effort: how long.
        bar: progress, in seconds.

    Raises:
        FxsparseError: the two paths of a convolution disagree.
    """
    return _Measuring(model, inputs, effort).run(bar)


class _Measuring:
    def __init__(self, model: nn.Module, inputs: ExampleInputs, effort: Effort) -> None:
        self.model, self.inputs, self.effort = model, inputs, effort
        self.found = Measurements()
        self.kind = ""  # the candidate that this run takes; "" is the default of each site
        self.sample: int | None = None  # its number; None where this run's times do not count
        self.around = False  # whether this run times what stands between the sites, and changes of layout:
        self.moved: set[tuple[tuple[int, ...], torch.dtype]] = set()  # these were timed in it
        self.weights: dict[Node, dict[str, Tensor]] = {}
        self.packed: dict[Node, dict[str, packings.Tensors]] = {}
        self.replays: dict[tuple[Node, int, str], Callable[[], Any]] = {}
        self.calls: dict[Node, int] = {}  # of each site in this run
        self.tiles = False  # whether a site can run on a tiled weight
        self.round_trips: dict[tuple[tuple[int, ...], torch.dtype], Callable[[], Any]] = {}
        for gm in graphs_of(model):
            self.found.layouts[gm] = may_choose_layouts(gm)

    def run(self, bar: tqdm[Any]) -> Measurements:
        start = last = time.perf_counter()
        probes = probed(self.model, self._convolve, self._before, self._after, self._wanted)
        with probes, torch.inference_mode():
            self._run_once("", None)  # meets the sites, and checks that their paths agree
            in_a_row = 1 if self._warm_up() else _SAMPLES_IN_A_ROW
            index = samples = 0
            while samples < _MAX_SAMPLES:
                for position, kind in enumerate(self._kinds(index)):
                    self.around = position == 0  # as often as any candidate, and not in each one's run
                    if in_a_row > 1:
                        self._run_once(kind, None)
                    for sample in range(samples, samples + in_a_row):
                        self._run_once(kind, sample)
                samples += in_a_row
                index += 1
                now = time.perf_counter()
                bar.update(min(now - last, max(0.0, self.effort.seconds - bar.n)))
                last = now
                if samples >= _FIRST_LOOK:
                    for measured in self.found.sites.values():
                        measured.drop_losers()
                if samples >= _MIN_SAMPLES and (now - start > self.effort.seconds or self._is_clear()):
                    break
        return self.found

    def _warm_up(self) -> bool:
        """Run until that is no longer clearly faster; tell whether one run is long enough to fill the caches."""
        before = run_s = float("inf")
        for index in range(_WARM_UPS):
            kinds = self._kinds(index)
            start = time.perf_counter()
            for kind in kinds:
                self._run_once(kind, None)
            run_s = (time.perf_counter() - start) / len(kinds)
            if run_s > _STILL_FALLS * before or run_s > _LASTING_RUN_S:
                break
            before = run_s
        return run_s > _LONG_RUN_S

    def _kinds(self, index: int) -> list[str]:
        """Return the candidates that some site still has, in an order that changes from round to round."""
        alive = {name for measured in self.found.sites.values() for name in measured.samples.alive}
        every = dict.fromkeys(name for measured in self.found.sites.values() for name in measured.candidates)
        kinds = [name for name in every if name in alive] or [""]
        return [kinds[k] for k in timing.order(len(kinds), index)]

    def _run_once(self, kind: str, sample: int | None) -> None:
        self.kind, self.sample = kind, sample
        self.moved.clear()
        self.calls.clear()
        self.inputs.run(self.model)

    def _is_clear(self) -> bool:
        return all(measured.is_clear(self.effort.margin) for measured in self.found.sites.values())

    def _chooses(self, gm: GraphModule) -> bool:
        """Tell whether the layouts of a graph are to be chosen."""
        return self.effort.only is None and self.found.layouts[gm].ok

    def _wanted(self, gm: GraphModule, node: Node) -> bool:
        if not self._chooses(gm) or not is_transparent(gm, node):
            return False
        if written_input(gm, node) is not None:  # element-wise; and it would change its input with each call
            return False
        return not is_elementwise(gm, node) or len(node.all_input_nodes) > 1

    def _before(self, gm: GraphModule, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Time a node in both layouts, unless it is element-wise on one shape, which costs the same in both."""
        if self.sample is None or not self.around:
            return
        leaves = pytree.tree_leaves((args, kwargs))
        tensors = [value for value in leaves if isinstance(value, Tensor) and value.dim() == 4]
        if not tensors or not any(Seen.of(tensor).layout for tensor in tensors):
            return
        if is_elementwise(gm, node) and len({tensor.shape for tensor in tensors}) == 1:
            return
        target = _callable(gm, node)
        arms = {
            layout: _call_in_layout(target, memory_format, args, kwargs)
            for layout, memory_format in MEMORY_FORMATS.items()
        }
        samples = self.found.others.setdefault(node, Samples.of(MEMORY_FORMATS))
        samples.add(timing.one_round(arms, tensors[0].device, self.sample))

    def _after(self, gm: GraphModule, node: Node, value: Any) -> None:
        if node in self.found.sites:
            self.found.sites[node].output_shape = tuple(value.shape)
        if node.op == "get_attr" or not isinstance(value, Tensor) or value.dim() != 4:
            return
        self.found.values[node] = Seen.of(value)
        key = (tuple(value.shape), value.dtype)
        if self.sample is None or not self.around or key in self.moved:  # each shape once a run
            return
        if self._chooses(gm) or node in self.found.sites:
            self.moved.add(key)
            self._time_moves(key, value, self.sample)

    def _time_moves(self, key: tuple[tuple[int, ...], torch.dtype], value: Tensor, index: int) -> None:
        times = timing.one_round(_moves(value), value.device, index)
        if self.tiles:
            if key not in self.round_trips:
                trip = partial(_round_trip, value)
                # A region that does more takes no longer to be called.
                self.round_trips[key] = timing.graphed(trip, value.device) if value.is_cuda else trip
            trip_ms = timing.one_round({BATCH_INNER: self.round_trips[key]}, value.device, index)
            times[BATCH_INNER] = trip_ms[BATCH_INNER] / _ROUND_TRIP_MOVES
        self.found.moves.setdefault(key, Samples.of(times)).add(times)

    def _convolve(self, gm: GraphModule, node: Node, source: Tensor) -> Tensor:
        """Run a site by this run's candidate, or by its default where it has no such one, or not any more."""
        site = sites.site_of(node)
        assert site is not None
        if self.effort.only is not None and site.name not in self.effort.only:
            return sites.run_vanilla(gm, site, source)
        if node not in self.found.sites:
            self._meet(gm, node, site, source)
        measured = self.found.sites[node]
        call = self.calls[node] = self.calls.get(node, -1) + 1
        default = measured.default
        alive = self.kind in measured.samples.alive
        name = self.kind if alive else str(default)
        arm = self._arm(gm, node, site, source, measured.candidates[name])
        if self.sample is None or not alive:
            result: Tensor = arm()
        else:
            timed = arm
            if self.effort.graphs:
                timed = self.replays.get((node, call, name)) or timing.graphed(arm, source.device)
                self.replays[(node, call, name)] = timed
            ms, result = timing.one_call(timed, source.device)
            # A site that is called again in one run has one time, the sum.
            measured.samples.add({name: ms}, to_last=call > 0)
        # What follows finds the layout that the all-vanilla model has here.
        return result.contiguous(memory_format=MEMORY_FORMATS[default.gives]) if result.dim() == 4 else result

    def _meet(self, gm: GraphModule, node: Node, site: ConvSite, source: Tensor) -> None:
        """List the candidates of a site, and check that its paths agree."""
        self.weights[node] = {}
        known = packings.candidates(gm, site)
        tiled = bool(known) and tiled_weights.are_possible(gm, site, tuple(source.shape))
        self.tiles |= tiled
        self.packed[node] = {name: packings.tensors(gm, site, name) for name in (known[:1] if tiled else known)}
        measured = self.found.sites[node] = Measured(Seen.of(source))
        # `torch.conv2d` gives channels_last if either its input or its weight is in that.
        gives = Seen.of(sites.run_vanilla(gm, site, source)).layout or measured.input.layout or "contiguous"
        arrives = measured.input.layout or gives
        layouts = [arrives]
        if self._chooses(gm) and measured.input.layout:
            layouts.append("channels_last" if arrives == "contiguous" else "contiguous")
        for layout in layouts:
            candidates = [Candidate("vanilla", "", layout, gives if layout == arrives else layout)]
            if not tiled:
                candidates += [Candidate("sparse", packing, layout, "contiguous") for packing in self.packed[node]]
            elif layout == layouts[-1]:  # in a region, which changes the layout itself
                candidates += [Candidate("sparse", known[0], BATCH_INNER, BATCH_INNER)]
            for candidate in candidates:
                measured.candidates[str(candidate)] = candidate
                if candidate.path == "sparse":
                    _refuse_disagreement(gm, site, source, self._arm(gm, node, site, source, candidate))
        measured.samples = Samples.of(measured.candidates)

    def _arm(
        self, gm: GraphModule, node: Node, site: ConvSite, source: Tensor, candidate: Candidate
    ) -> Callable[[], Tensor]:
        """Return the call of a candidate as its node makes it; tensors get into its layout here, off the clock."""
        if candidate.needs == BATCH_INNER:
            return _tiled_arm(gm, site, source, self.packed[node][candidate.packing])
        memory_format = MEMORY_FORMATS[candidate.needs]
        x = source.contiguous(memory_format=memory_format) if self.found.sites[node].input.layout else source
        bias = None if site.bias is None else sites.attribute(gm, site.bias)
        names = site.packed_names if candidate.path == "sparse" else (site.weight,)
        module = gm.get_submodule(site.weight.rpartition(".")[0])
        # A node fetches these from the module that owns them, some 0.6 us each.
        fetch = attrgetter(*(name.rpartition(".")[2] for name in names))
        if candidate.path == "sparse":
            tensors = self.packed[node][candidate.packing]

            def sparse() -> Tensor:
                fetch(module)
                return sites.sparse_conv2d(site, x, tensors, bias)

            return sparse
        weight = sites.attribute(gm, site.weight)
        if candidate != self.found.sites[node].default:
            weight = self.weights[node].setdefault(candidate.needs, weight.contiguous(memory_format=memory_format))

        def dense() -> Tensor:
            fetch(module)
            return sites.vanilla_conv2d(site, x, weight, bias)

        return dense


def _tiled_arm(gm: GraphModule, site: ConvSite, source: Tensor, packed: packings.Tensors) -> Callable[[], Tensor]:
    """Return the step that a site is within a region on CUDA, as a call of its own."""
    weight = PackedWeight(packed[0], packed[1], packed[2], packed[3], site.weight_shape)
    made = tiled_weights.tiled(weight, site, tuple(source.shape))
    kind = source.device.type
    x = source.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else source
    tiles = batch_inner.cast_tiles(made.values, made.tile_rows, x.dtype)
    bias = None if site.bias is None else sites.attribute(gm, site.bias).to(x.dtype)
    geometry = (list(site.weight_shape), list(site.stride), list(site.padding), list(site.dilation), site.groups)
    call, tf32 = (tiles, made.columns, made.tiles, made.rows, bias, *geometry), convs_allow_tf32()
    if len(x) < batch_inner.LANES:  # as csrc/plane_region.h decides
        return partial(torch.ops.fxsparse.conv2d_planes, x.contiguous(), *call, overlap=True, allow_tf32=tf32)
    return partial(torch.ops.fxsparse.conv2d_batch_inner, batch_inner.to_batch_inner(x), *call, allow_tf32=tf32)


def _round_trip(value: Tensor) -> Any:
    """Run a region that computes nothing: a change of layout, a copy, and a change back."""
    return torch.ops.fxsparse.region_batch_inner([value], [], Add(0, NONE, "none").numbers(), [1], [], False)


def _moves(value: Tensor) -> dict[str, Callable[[], Tensor]]:
    contiguous = value.contiguous()
    last = value.contiguous(memory_format=torch.channels_last)
    return {
        "contiguous": lambda: last.contiguous(),
        "channels_last": lambda: contiguous.contiguous(memory_format=torch.channels_last),
    }


def _refuse_disagreement(gm: GraphModule, site: ConvSite, source: Tensor, arm: Callable[[], Tensor]) -> None:
    vanilla = sites.run_vanilla(gm, site, source)
    difference = agreement.compare(gm, site, source, vanilla, arm())
    if difference is not None:
        raise FxsparseError(
            f"{difference} This is a bug of fxsparse: please report it, and leave the convolution out with "
            f"Settings(exclude=('{site.name}',))."
        )


def _callable(gm: GraphModule, node: Node) -> Callable[..., Any]:
    if node.op == "call_module":
        return gm.get_submodule(str(node.target))
    if node.op == "call_method":
        name = str(node.target)
        return lambda first, *rest, **options: getattr(first, name)(*rest, **options)
    assert callable(node.target)
    return node.target


def _call_in_layout(
    target: Callable[..., Any], memory_format: torch.memory_format, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[], Any]:
    def moved(tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=memory_format) if tensor.dim() == 4 else tensor

    there, options = pytree.tree_map_only(Tensor, moved, (args, kwargs))
    return lambda: target(*there, **options)
