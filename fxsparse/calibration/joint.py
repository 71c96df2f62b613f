"""Choose paths and memory layouts of a whole graph at once, so that the sum of all measured times is least.

A change of layout between neighbours costs time, so the best candidate of each convolution alone need not be part of
the best whole. The graph is walked in its own order. A state says for every value that is still needed in which
layouts it is there; equal states keep the cheapest way to reach them. That is exact dynamic programming while the
states fit into the beam (on a chain there are three), and a beam search in graphs that keep many values alive.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

BEAM = 1024


@dataclasses.dataclass(frozen=True)
class Option:
    """One way to run a step.

    Attributes:
        needs: the layout that every input must be in, or None for "as it is there already".
        gives: the layout of the output.
        cost: milliseconds, as the decision counts them (margins included).
        label: what the caller calls it.
    """

    needs: str
    gives: str
    cost: float
    label: str = ""


@dataclasses.dataclass(frozen=True)
class Step:
    """One node of the graph.

    Attributes:
        name: of the node, and of its value.
        inputs: names of the values that it reads.
        options: ways to run it; a node without inputs has one.
    """

    name: str
    inputs: tuple[str, ...]
    options: tuple[Option, ...]


class Choice(NamedTuple):
    """The result: the option of every step, and what all of it costs, in milliseconds."""

    options: dict[str, Option]
    cost: float


class _State(NamedTuple):
    cost: float
    chosen: tuple[Option, object] | None  # a linked list back to the first step


def solve(steps: Sequence[Step], moves: Mapping[tuple[str, str], float], beam: int = BEAM) -> Choice:
    """Find the cheapest options.

    Args:
        steps: in an order in which every value is made before it is read.
        moves: milliseconds to bring a value, by name, into a layout that it was not made in.
        beam: how many states are kept; more is slower and nearer to exact where the graph keeps many values alive.

    Returns:
        The options of the cheapest walk.
    """
    last_read = {name: step.name for step in steps for name in step.inputs}
    states: dict[frozenset[tuple[str, str]], _State] = {frozenset(): _State(0.0, None)}
    for step in steps:
        after: dict[frozenset[tuple[str, str]], _State] = {}
        dead = {name for name in step.inputs if last_read[name] == step.name}
        for there, state in states.items():
            for option in step.options:
                missing = {(name, option.needs) for name in step.inputs} - there
                cost = state.cost + option.cost + sum(moves[need] for need in missing)
                left = {pair for pair in there | missing if pair[0] not in dead}
                if step.name in last_read:
                    left.add((step.name, option.gives))
                key = frozenset(left)
                if key not in after or cost < after[key].cost:
                    after[key] = _State(cost, (option, state.chosen))
        if len(after) > beam:
            after = dict(sorted(after.items(), key=lambda item: item[1].cost)[:beam])
        states = after
    best = min(states.values(), key=lambda state: state.cost)
    options: dict[str, Option] = {}
    chosen = best.chosen
    for step in reversed(steps):
        assert chosen is not None
        options[step.name], chosen = chosen  # type: ignore[assignment]
    return Choice(options, best.cost)
