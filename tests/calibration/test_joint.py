"""The joint choice against trying every combination."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from fxsparse.calibration.joint import Choice, Option, Step, solve

LAYOUTS = ("contiguous", "channels_last")


def cost_of(steps: list[Step], options: dict[str, Option], moves: dict[tuple[str, str], float]) -> float:
    """Add up what a combination costs: each value is moved into a layout at most once."""
    moved = {
        (name, options[step.name].needs)
        for step in steps
        for name in step.inputs
        if options[step.name].needs != options[name].gives
    }
    return sum(option.cost for option in options.values()) + sum(moves[pair] for pair in moved)


def exhaustive(steps: list[Step], moves: dict[tuple[str, str], float]) -> float:
    """Return the least cost over all combinations."""
    return min(
        cost_of(steps, {s.name: o for s, o in zip(steps, combination, strict=True)}, moves)
        for combination in itertools.product(*(step.options for step in steps))
    )


times = st.integers(0, 50).map(float)


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[Step], dict[tuple[str, str], float]]:
    """Draw a graph of up to six nodes, each with readers of its own choice."""
    steps: list[Step] = []
    for number in range(draw(st.integers(1, 6))):
        names = [step.name for step in steps]
        inputs = draw(st.lists(st.sampled_from(names), max_size=3, unique=True)) if names else []
        kinds = draw(st.lists(st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)), min_size=1, max_size=3))
        options = tuple(Option(needs, gives, draw(times)) for needs, gives in kinds)
        steps.append(Step(f"n{number}", tuple(inputs), options))
    moves = {(step.name, layout): draw(times) for step in steps for layout in LAYOUTS}
    return steps, moves


@settings(max_examples=300, deadline=None)
@given(graphs())
def test_no_combination_is_cheaper_than_the_choice(graph: tuple[list[Step], dict[tuple[str, str], float]]) -> None:
    steps, moves = graph
    choice = solve(steps, moves)
    assert set(choice.options) == {step.name for step in steps}
    assert all(choice.options[step.name] in step.options for step in steps)
    assert choice.cost == cost_of(steps, choice.options, moves) == exhaustive(steps, moves)


@settings(max_examples=50, deadline=None)
@given(graphs())
def test_a_narrow_beam_still_gives_a_combination_and_its_true_cost(
    graph: tuple[list[Step], dict[tuple[str, str], float]],
) -> None:
    steps, moves = graph
    choice = solve(steps, moves, beam=1)
    assert choice.cost == cost_of(steps, choice.options, moves) >= exhaustive(steps, moves)


def chain(*convolutions: tuple[Option, ...]) -> tuple[list[Step], Choice]:
    """Solve an input, a chain of convolutions and an output, both contiguous; a change of layout costs 1."""
    steps = [Step("x", (), (Option("", "contiguous", 0.0),))]
    for number, options in enumerate(convolutions):
        steps.append(Step(f"conv{number}", (steps[-1].name,), options))
    steps.append(Step("output", (steps[-1].name,), (Option("contiguous", "", 0.0),)))
    moves = {(step.name, layout): 1.0 for step in steps for layout in LAYOUTS}
    return steps, solve(steps, moves)


def either(contiguous: float, channels_last: float) -> tuple[Option, ...]:
    """Return a convolution's two layouts."""
    return tuple(Option(a, a, ms) for a, ms in zip(LAYOUTS, (contiguous, channels_last), strict=True))


def test_one_fast_layout_does_not_pay_for_two_changes_but_three_do() -> None:
    _, one = chain(either(2.0, 1.0))
    assert one.options["conv0"].gives == "contiguous"
    _, three = chain(*[either(2.0, 1.0)] * 3)
    assert {three.options[f"conv{i}"].gives for i in range(3)} == {"channels_last"}
    assert three.cost == 5.0


def test_a_value_that_two_nodes_want_in_another_layout_is_moved_once() -> None:
    other = (Option("channels_last", "channels_last", 0.0),)
    steps = [
        Step("x", (), (Option("", "contiguous", 0.0),)),
        Step("a", ("x",), other),
        Step("b", ("x",), other),
        Step("sum", ("a", "b"), other),
    ]
    assert solve(steps, {(s.name, layout): 3.0 for s in steps for layout in LAYOUTS}).cost == 3.0
