"""One run of the model in which every convolution is timed on its real input, in every way it could run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree
from tqdm import tqdm

from fxsparse import agreement, sites, timing
from fxsparse.calibration import packings
from fxsparse.calibration.probes import Seen, probed
from fxsparse.calibration.transparency import is_elementwise, is_transparent, may_choose_layouts, written_input
from fxsparse.errors import FxsparseError
from fxsparse.inputs import ExampleInputs
from fxsparse.layouts import MEMORY_FORMATS
from fxsparse.report import graphs_of
from fxsparse.sites import ConvSite, Support

# A candidate this much slower than the best, in a first short look, is not looked at again.
_OUT_OF_THE_RACE = 1.3
_FIRST_LOOK_ROUNDS = 3
_FIRST_LOOK_SHARE = 0.25  # of a convolution's time budget


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run a convolution.

    Attributes:
        path: "vanilla" or "sparse".
        packing: of the sparse weight, "blocks" or "rows".
        needs: the layout of its input.
    """

    path: str
    packing: str
    needs: str

    @property
    def gives(self) -> str:
        """The layout of its output: the sparse operator's is contiguous."""
        return self.needs if self.path == "vanilla" else "contiguous"


@dataclasses.dataclass
class Measured:
    """What one convolution took, summed over its calls in one run of the model.

    Attributes:
        input: as it arrives in the all-vanilla model.
        output_shape: of the convolution.
        ms: medians by candidate.
        ci: 95 % confidence intervals of the medians.
        beyond_noise: sparse candidates whose gain over vanilla on the same input is more than noise.
        spread: distance of the quartiles of the vanilla time, as a share of its median.
    """

    input: Seen
    output_shape: tuple[int, ...]
    ms: dict[Candidate, float] = dataclasses.field(default_factory=dict)
    ci: dict[Candidate, tuple[float, float]] = dataclasses.field(default_factory=dict)
    beyond_noise: set[Candidate] = dataclasses.field(default_factory=set)
    spread: float = 0.0

    def best(self, path: str) -> Candidate | None:
        """Return the fastest candidate of a path, or None."""
        return min((c for c in self.ms if c.path == path), key=self.ms.__getitem__, default=None)


@dataclasses.dataclass
class Measurements:
    """Everything that one run of a model showed.

    Attributes:
        sites: by node.
        values: the 4-D tensors of the graphs, by node.
        others: milliseconds of layout-transparent nodes in each layout, where these may differ, by node.
        moves: milliseconds of a change of layout, by (shape, dtype, layout it goes to).
        layouts: whether each graph's layouts may be chosen, by graph.
    """

    sites: dict[Node, Measured] = dataclasses.field(default_factory=dict)
    values: dict[Node, Seen] = dataclasses.field(default_factory=dict)
    others: dict[Node, dict[str, float]] = dataclasses.field(default_factory=dict)
    moves: dict[tuple[tuple[int, ...], torch.dtype, str], float] = dataclasses.field(default_factory=dict)
    layouts: dict[GraphModule, Support] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        site_s: seconds for one convolution.
        margin: share by which sparse must win; the measurement of a convolution ends early once that is clear.
        graphs: time replays of CUDA graphs in place of eager calls.
        only: names of the convolutions to time; None times all.
    """

    site_s: float = 0.2
    margin: float = 0.05
    graphs: bool = False
    only: frozenset[str] | None = None


def observe(model: nn.Module, inputs: ExampleInputs) -> Measurements:
    """Run a converted model once and record its values, without timing anything."""
    return _run(model, inputs, None, None)


def measure(model: nn.Module, inputs: ExampleInputs, effort: Effort, bar: tqdm[Any]) -> Measurements:
    """Run a converted model once and time every convolution, and what else depends on the layout.

    Args:
        model: every site vanilla, no changes of layout; nobody else uses it meanwhile.
        inputs: of the run.
        effort: how long.
        bar: progress, one step for each call of a convolution.

    Raises:
        FxsparseError: the two paths of a convolution disagree.
    """
    return _run(model, inputs, effort, bar)


def _run(model: nn.Module, inputs: ExampleInputs, effort: Effort | None, bar: tqdm[Any] | None) -> Measurements:
    found = Measurements()
    for gm in graphs_of(model):
        found.layouts[gm] = may_choose_layouts(gm)

    def wanted(gm: GraphModule, node: Node) -> bool:
        if effort is None or effort.only is not None or not found.layouts[gm].ok or not is_transparent(gm, node):
            return False
        if written_input(gm, node) is not None:  # element-wise; and it would change its input with each call
            return False
        return not is_elementwise(gm, node) or len(node.all_input_nodes) > 1

    def before(gm: GraphModule, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        site = sites.site_of(node)
        if site is None:
            assert effort is not None
            _time_other(found, gm, node, args, kwargs, effort)
            return
        if effort is not None and effort.only is not None and site.name not in effort.only:
            return
        (source,) = args
        measured = found.sites.setdefault(node, Measured(Seen.of(source), ()))
        if effort is not None:
            _time_site(measured, gm, site, source, effort, both_layouts=effort.only is None and found.layouts[gm].ok)
        if bar is not None:
            bar.update()

    def after(gm: GraphModule, node: Node, value: Any) -> None:
        if node in found.sites:
            found.sites[node].output_shape = tuple(value.shape)
        if node.op == "get_attr" or not isinstance(value, Tensor) or value.dim() != 4:
            return
        found.values[node] = Seen.of(value)
        if effort is not None and effort.only is None and found.layouts[gm].ok:
            _time_moves(found, value, effort)

    with probed(model, before, after, wanted), torch.no_grad():
        inputs.run(model)
    return found


def _time_site(
    measured: Measured, gm: GraphModule, site: ConvSite, source: Tensor, effort: Effort, *, both_layouts: bool
) -> None:
    arms = _arms(gm, site, source, both_layouts=both_layouts)
    if site.packed:
        for candidate, arm in arms.items():
            if candidate.path == "sparse":
                _refuse_disagreement(gm, site, source, arm)
    named = {str(number): candidate for number, candidate in enumerate(arms)}
    calls = {
        name: timing.graphed(arms[candidate], source.device) if effort.graphs else arms[candidate]
        for name, candidate in named.items()
    }
    device = source.device
    vanilla = [name for name, candidate in named.items() if candidate.path == "vanilla"]
    first = timing.interleaved(
        calls,
        device,
        budget_s=effort.site_s * _FIRST_LOOK_SHARE,
        min_rounds=_FIRST_LOOK_ROUNDS,
        max_rounds=_FIRST_LOOK_ROUNDS,
    )
    sparse = [name for name in calls if name not in vanilla]
    best = min(first[name].median_ms for name in calls)
    kept = {name for name in calls if first[name].median_ms <= _OUT_OF_THE_RACE * best}
    for names in (vanilla, sparse):
        if names:
            kept.add(min(names, key=lambda name: first[name].median_ms))
    # The first is vanilla in the layout that arrives: what every other one must beat.
    kept.add(vanilla[0])
    rival = min((n for n in kept if n in sparse), key=lambda name: first[name].median_ms, default=None)

    def clear(times: timing.Timings) -> bool:
        if rival is None:
            return False
        ratio = times.ratio(vanilla[0], rival)
        return ratio.low > 1 + 2 * effort.margin or ratio.high < 1

    second = timing.interleaved(
        {name: call for name, call in calls.items() if name in kept}, device, budget_s=effort.site_s, stop=clear
    )
    for name, candidate in named.items():
        time = second[name] if name in kept else first[name]
        low, high = measured.ci.get(candidate, (0.0, 0.0))
        measured.ms[candidate] = measured.ms.get(candidate, 0.0) + time.median_ms
        measured.ci[candidate] = (low + time.ci_low_ms, high + time.ci_high_ms)
        if candidate.path == "sparse" and name in kept:
            dense = next(n for n in vanilla if named[n].needs == candidate.needs)
            if dense not in kept or second.ratio(dense, name).low > 1:
                measured.beyond_noise.add(candidate)
            else:
                measured.beyond_noise.discard(candidate)
    measured.spread = max(measured.spread, second.spread(vanilla[0]))


def _arms(
    gm: GraphModule, site: ConvSite, source: Tensor, *, both_layouts: bool
) -> dict[Candidate, Callable[[], Tensor]]:
    """Return what to time; first comes vanilla in the layout that arrives."""
    arrives = Seen.of(source).layout or "contiguous"
    other = "channels_last" if arrives == "contiguous" else "contiguous"
    needed = [arrives, other] if both_layouts and Seen.of(source).layout else [arrives]
    weight = sites.attribute(gm, site.weight)
    packed = {name: packings.tensors(gm, site, name) for name in packings.candidates(gm, site)}
    arms: dict[Candidate, Callable[[], Tensor]] = {}
    for layout in needed:
        x = source if layout == arrives else source.contiguous(memory_format=MEMORY_FORMATS[layout])
        w = weight.contiguous(memory_format=MEMORY_FORMATS[layout])

        def dense(x: Tensor = x, w: Tensor = w) -> Tensor:
            return sites.run_vanilla(gm, site, x, w)

        arms[Candidate("vanilla", "", layout)] = dense
        for name, tensors in packed.items():

            def sparse(x: Tensor = x, tensors: packings.Tensors = tensors) -> Tensor:
                return sites.run_sparse(gm, site, x, tensors)

            arms[Candidate("sparse", name, layout)] = sparse
    return arms


def _refuse_disagreement(gm: GraphModule, site: ConvSite, source: Tensor, arm: Callable[[], Tensor]) -> None:
    vanilla = sites.run_vanilla(gm, site, source)
    difference = agreement.compare(gm, site, source, vanilla, arm())
    if difference is not None:
        raise FxsparseError(
            f"{difference} This is a bug of fxsparse: please report it, and leave the convolution out with "
            f"Settings(exclude=('{site.name}',))."
        )


def _time_other(
    found: Measurements, gm: GraphModule, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any], effort: Effort
) -> None:
    """Time a node in both layouts, unless it is element-wise on one shape, which costs the same in both."""
    tensors = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor) and value.dim() == 4]
    if not tensors or not any(Seen.of(tensor).layout for tensor in tensors):
        return
    if is_elementwise(gm, node) and len({tensor.shape for tensor in tensors}) == 1:
        return
    target: Callable[..., Any]
    if node.op == "call_module":
        target = gm.get_submodule(str(node.target))
    elif node.op == "call_method":
        name = str(node.target)

        def target(first: Any, *rest: Any, **options: Any) -> Any:
            return getattr(first, name)(*rest, **options)
    else:
        assert callable(node.target)
        target = node.target
    arms = {}
    for layout, memory_format in MEMORY_FORMATS.items():
        arms[layout] = _call_in_layout(target, memory_format, args, kwargs)
    times = timing.interleaved(arms, tensors[0].device, budget_s=effort.site_s / 4, min_rounds=5)
    known = found.others.setdefault(node, dict.fromkeys(MEMORY_FORMATS, 0.0))
    for layout in MEMORY_FORMATS:
        known[layout] += times[layout].median_ms


def _time_moves(found: Measurements, value: Tensor, effort: Effort) -> None:
    shape = tuple(value.shape)
    if (shape, value.dtype, "contiguous") in found.moves:
        return
    copies = {layout: value.contiguous(memory_format=f) for layout, f in MEMORY_FORMATS.items()}
    arms: Mapping[str, Callable[[], Tensor]] = {
        "contiguous": lambda: copies["channels_last"].contiguous(),
        "channels_last": lambda: copies["contiguous"].contiguous(memory_format=torch.channels_last),
    }
    times = timing.interleaved(arms, value.device, budget_s=effort.site_s / 4, min_rounds=5)
    for layout in MEMORY_FORMATS:
        found.moves[(shape, value.dtype, layout)] = times[layout].median_ms


def _call_in_layout(
    target: Callable[..., Any], memory_format: torch.memory_format, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[], Any]:
    def moved(tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=memory_format) if tensor.dim() == 4 else tensor

    there, options = pytree.tree_map_only(Tensor, moved, (args, kwargs))
    return lambda: target(*there, **options)
