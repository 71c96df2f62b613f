"""Plans: what is chosen for a key, and that a file is read back as it was or refused with one clear error."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import fxsparse
from fxsparse import plan as plans
from fxsparse.errors import FxsparseError
from fxsparse.plan import Move, Plan, PlanEntry, PlanKey, SitePlan

CPU = torch.device("cpu")
KEY = PlanKey("Fast CPU x2 threads", "float32", ((16, 3, 32, 32),), "eager")
SITE = SitePlan(
    "sparse",
    "channels_last",
    "rows",
    input_shape=(16, 3, 32, 32),
    output_shape=(16, 8, 32, 32),
    vanilla_ms=2.0,
    vanilla_ci=(1.9, 2.1),
    sparse_ms=1.0,
    sparse_ci=(0.9, 1.1),
    bound_ms=0.5,
    reason="measured",
)
ENTRY = PlanEntry(
    KEY,
    {"conv1": SITE, "conv2": SitePlan("vanilla")},
    (Move("", "relu", "channels_last", ("conv1", "conv2")),),
    4.0,
    3.0,
    {"torch": torch.__version__, "fxsparse": fxsparse.__version__},
)
PLAN = Plan((ENTRY,))


def _entry(**changes: Any) -> PlanEntry:
    return dataclasses.replace(ENTRY, key=dataclasses.replace(KEY, **changes))


def _batches(*sizes: int) -> Plan:
    return Plan(tuple(_entry(shapes=((size, 3, 32, 32),)) for size in sizes))


def _at_batch(size: int) -> PlanKey:
    return dataclasses.replace(KEY, shapes=((size, 3, 32, 32),))


# Choosing


def test_merging_replaces_entries_of_the_same_key_by_newer_ones() -> None:
    newer, other = dataclasses.replace(ENTRY, model_ms=1.0), _entry(dtype="float64")
    assert PLAN.merged(Plan((other, newer))) == Plan((other, newer))
    assert Plan((newer, other)).merged(Plan((ENTRY,))) == Plan((other, ENTRY))
    assert Plan().merged(PLAN) == PLAN.merged(Plan()) == PLAN.merged(PLAN) == PLAN


def test_exact_takes_the_same_key_only() -> None:
    assert PLAN.exact(KEY) is ENTRY
    assert PLAN.exact(_at_batch(8)) is None
    assert Plan().exact(KEY) is None


def test_nearest_gives_the_exact_entry_without_a_warning() -> None:
    assert _batches(8, 16, 17).nearest(KEY) == (ENTRY, ())


def test_an_empty_plan_has_no_nearest_entry() -> None:
    with pytest.raises(FxsparseError, match="no entries"):
        Plan().nearest(KEY)


@pytest.mark.parametrize(
    ("measured", "used", "chosen"),
    [((1, 16), 24, 16), ((8, 32), 16, 8), ((32, 8), 16, 8), ((1, 64), 9, 64), ((3,), 0, 3)],
)
def test_nearest_takes_the_nearest_batch_and_the_smaller_of_two(
    measured: tuple[int, ...], used: int, chosen: int
) -> None:
    entry, warnings = _batches(*measured).nearest(_at_batch(used))
    assert entry.key.shapes[0][0] == chosen
    assert warnings == (f"The plan was measured at batch {chosen}, and is used at batch {used}.",)


@pytest.mark.parametrize(
    ("nearer", "farther"),
    [
        ({"dtype": "float64", "deploy": "graph"}, {"device": "Slow CPU x2 threads"}),
        ({"device": "Slow CPU x2 threads", "dtype": "float64"}, {"device": "A GPU"}),
        ({"deploy": "graph", "shapes": ((1, 1),)}, {"dtype": "float64"}),
        ({"shapes": ((1, 1),)}, {"deploy": "compiled"}),
        ({"shapes": ((999, 999, 999, 999),)}, {"shapes": ((16, 3, 32),)}),
        ({"shapes": ((999, 999, 999, 999),)}, {"shapes": ((16, 3, 32, 32), (1,))}),
    ],
)
def test_conditions_count_in_their_order(nearer: dict[str, Any], farther: dict[str, Any]) -> None:
    for entries in ((_entry(**nearer), _entry(**farther)), (_entry(**farther), _entry(**nearer))):
        assert Plan(entries).nearest(KEY)[0] == _entry(**nearer)


def test_each_difference_is_one_warning() -> None:
    old = dataclasses.replace(
        _entry(device="A GPU", dtype="float64", deploy="graph", shapes=((16, 3, 30, 32),)),
        environment={"torch": "1.0", "fxsparse": "0.0", "cpu kernels": "none"},
    )
    _, warnings = Plan((old,)).nearest(KEY)
    assert warnings == (
        "The plan was measured on 'A GPU', and is used on 'Fast CPU x2 threads'.",
        "The plan was measured in float64, and is used in float32.",
        "The plan was measured with deployment 'graph', and is used with 'eager'.",
        "The plan was measured at input shape (16, 3, 30, 32), and is used at input shape (16, 3, 32, 32).",
        f"The plan was measured with torch 1.0, and is used with torch {torch.__version__}.",
        f"The plan was measured with fxsparse 0.0, and is used with fxsparse {fxsparse.__version__}.",
        f"The plan was measured with cpu kernels none, and is used with cpu kernels {fxsparse.capabilities().cpu}.",
    )


def test_the_kernels_of_the_cpu_do_not_matter_on_a_gpu() -> None:
    entry = dataclasses.replace(_entry(device="A GPU"), environment={"cpu kernels": "none"})
    assert Plan((entry,)).nearest(entry.key) == (entry, ())


SHAPES = st.lists(st.lists(st.integers(0, 64), max_size=4).map(tuple), max_size=3).map(tuple)
KEYS = st.builds(
    PlanKey,
    device=st.sampled_from(["A x1 threads", "A x2 threads", "GPU"]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    shapes=SHAPES,
    deploy=st.sampled_from(plans.DEPLOYMENTS),
)


@settings(deadline=None)
@given(st.lists(KEYS, min_size=1, max_size=5, unique=True), KEYS, st.randoms())
def test_nearest_does_not_depend_on_the_order_of_the_entries(keys: list[PlanKey], key: PlanKey, random: Any) -> None:
    entries = [dataclasses.replace(ENTRY, key=k) for k in keys]
    first, warnings = Plan(tuple(entries)).nearest(key)
    random.shuffle(entries)
    assert Plan(tuple(entries)).nearest(key) == (first, warnings)
    assert (first.key == key) == (key in keys) == (not warnings)
    assert all(warning.endswith(".") and "\n" not in warning for warning in warnings)


# The file

NAMES = st.text(max_size=8)
TIMES = st.none() | st.floats(0, allow_infinity=False)
INTERVALS = st.none() | st.tuples(*[st.floats(0, allow_infinity=False)] * 2).map(lambda pair: tuple(sorted(pair)))
SIZES = st.none() | st.lists(st.integers(0, 2**63 - 1), max_size=4).map(tuple)
SITES = st.builds(
    SitePlan,
    path=st.sampled_from(plans.PATHS),
    layout=st.sampled_from([None, *plans.LAYOUTS]),
    packing=st.sampled_from(plans.PACKINGS),
    input_shape=SIZES,
    output_shape=SIZES,
    vanilla_ms=TIMES,
    vanilla_ci=INTERVALS,
    sparse_ms=TIMES,
    sparse_ci=INTERVALS,
    bound_ms=TIMES,
    reason=NAMES,
)
MOVES = st.builds(
    Move,
    graph=NAMES,
    value=NAMES,
    layout=st.sampled_from(plans.LAYOUTS),
    readers=st.lists(NAMES, max_size=2).map(tuple),
)
PLANS = st.lists(
    st.builds(
        PlanEntry,
        key=KEYS,
        sites=st.dictionaries(NAMES, SITES, max_size=2),
        moves=st.lists(MOVES, max_size=2).map(tuple),
        model_vanilla_ms=TIMES,
        model_ms=TIMES,
        environment=st.dictionaries(NAMES, NAMES, max_size=2),
    ),
    max_size=3,
    unique_by=lambda entry: entry.key,
).map(lambda entries: Plan(tuple(entries)))


@settings(max_examples=30, deadline=None)
@given(PLANS)
def test_a_plan_is_read_back_as_it_was(plan: Plan) -> None:
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_dict(plan.to_dict()) == plan


def test_a_plan_is_saved_and_loaded(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text("what was there before")
    PLAN.save(file)
    assert Plan.load(file) == Plan.load(str(file)) == PLAN
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "plan.json"
    PLAN.save(file)

    def fail(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(FxsparseError, match="plan.json.*disk is full"):
        Plan().save(file)
    assert Plan.load(file) == PLAN
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_that_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    wrong = Plan((dataclasses.replace(ENTRY, model_ms=math.nan),))
    with pytest.raises(FxsparseError, match=r"entries\[0\]\.model_ms is nan"):
        wrong.save(file)
    with pytest.raises(FxsparseError, match="Path"):
        Plan((dataclasses.replace(ENTRY, environment={"x": tmp_path}),)).save(file)  # type: ignore[dict-item]
    assert not file.exists()


def test_places_that_cannot_be_written_or_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(FxsparseError, match="nowhere.*folder that exists"):
        PLAN.save(tmp_path / "nowhere" / "plan.json")
    for path in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(FxsparseError, match=f"{path.name}' cannot be read"):
            Plan.load(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b"null", b"[]", b"{}", b'{"format": "another"}', b"1" * 5000],
)
def test_files_that_are_no_plan_are_refused_by_name(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_bytes(content)
    with pytest.raises(FxsparseError, match="mine.json.*Calibrate the model again"):
        Plan.load(file)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("version",), 2, "newer fxsparse .format version 2; this one reads up to 1.*Upgrade"),
        (("version",), 0, "version is 0"),
        (("version",), True, "version is True"),
        (("version",), None, "version is None"),
        (("entries",), {}, "entries is {}; it should be a list"),
        (("entries", 0), 7, r"entries\[0\] is 7; it should be an object with exactly the fields key, sites"),
        (("entries", 0, "key", "deploy"), "cloud", r"entries\[0\]\.key\.deploy is 'cloud'.*eager, compiled, graph"),
        (("entries", 0, "key", "shapes", 0, 1), -3, r"entries\[0\]\.key\.shapes\[0\]\[1\] is -3"),
        (("entries", 0, "key", "shapes", 0, 1), 1.0, "is 1.0; it should be an integer"),
        (("entries", 0, "key", "shapes", 0, 1), True, "is True; it should be an integer"),
        (("entries", 0, "key", "dtype"), None, "dtype is None; it should be a string"),
        (("entries", 0, "sites", "conv1", "path"), "fast", r"entries\[0\]\.sites\['conv1'\]\.path is 'fast'.*vanilla"),
        (("entries", 0, "sites", "conv1", "path"), ["sparse"], "it should be one of vanilla, sparse"),
        (("entries", 0, "sites", "conv1", "layout"), "NCHW", "one of contiguous, channels_last"),
        (("entries", 0, "sites", "conv1", "packing"), None, "one of blocks, rows"),
        (("entries", 0, "sites", "conv1", "sparse_ms"), -1, "sparse_ms is -1; it should be a finite"),
        (("entries", 0, "sites", "conv1", "sparse_ms"), math.nan, "sparse_ms is nan"),
        (("entries", 0, "sites", "conv1", "sparse_ms"), math.inf, "sparse_ms is inf"),
        (("entries", 0, "sites", "conv1", "sparse_ms"), 10**400, "sparse_ms is 1000"),
        (("entries", 0, "sites", "conv1", "sparse_ms"), "1", "sparse_ms is '1'"),
        (("entries", 0, "sites", "conv1", "vanilla_ci"), [2, 1], "its lower bound first"),
        (("entries", 0, "sites", "conv1", "vanilla_ci"), [1], "a list of two numbers"),
        (("entries", 0, "moves", 0, "layout"), None, r"moves\[0\]\.layout is None"),
        (("entries", 0, "moves", 0, "readers"), "conv1", r"moves\[0\]\.readers is 'conv1'; it should be a list"),
        (("entries", 0, "environment", "torch"), 2, r"environment\['torch'\] is 2; it should be a string"),
    ],
)
def test_wrong_values_are_refused_with_their_place(path: tuple[Any, ...], value: Any, message: str) -> None:
    values = json.loads(PLAN.to_json())
    _set(values, path, value)
    with pytest.raises(FxsparseError, match=message) as caught:
        Plan.from_dict(values, "The plan 'mine.json'")
    assert str(caught.value).startswith("The plan 'mine.json' ")


def test_fields_that_are_missing_or_unknown_are_refused() -> None:
    for change in ({"sites": None}, {"more": 1}):
        values = json.loads(PLAN.to_json())
        values["entries"][0].update(change)
        if change == {"sites": None}:
            del values["entries"][0]["sites"]
        with pytest.raises(FxsparseError, match="exactly the fields"):
            Plan.from_dict(values)


def test_two_entries_of_one_key_are_refused() -> None:
    with pytest.raises(FxsparseError, match=r"entries\[1\]\.key is also an earlier entry's"):
        Plan.from_dict(Plan((ENTRY, ENTRY)).to_dict())


def _places(values: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [path, *(place for name, item in inner for place in _places(item, (*path, name)))]


def _set(values: Any, path: tuple[Any, ...], value: Any) -> None:
    for name in path[:-1]:
        values = values[name]
    values[path[-1]] = value


VALUES = json.loads(PLAN.to_json())
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(_places(VALUES)[1:]), ANY_JSON), min_size=1, max_size=2))
def test_any_changed_value_is_read_or_refused(changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    values = copy.deepcopy(VALUES)
    for path, value in changes:
        try:
            _set(values, path, value)
        except (KeyError, IndexError, TypeError):  # the place went with the first change
            continue
    _read_or_refuse(json.dumps(values))


TEXT = PLAN.to_json()


@given(st.integers(0, len(TEXT)), st.integers(0, 40), st.text(max_size=5) | st.sampled_from(["1e999", "NaN", "-", '"']))
@example(0, len(TEXT), "")
def test_any_changed_text_is_read_or_refused(start: int, length: int, new: str) -> None:
    _read_or_refuse(TEXT[:start] + new + TEXT[start + length :])


@given(st.binary(max_size=50))
def test_any_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(FxsparseError):
        Plan.from_json(content)


def _read_or_refuse(text: str) -> None:
    try:
        plan = Plan.from_json(text)
    except FxsparseError:
        return
    assert Plan.from_json(plan.to_json()) == plan


# Where it was measured


def test_the_environment_is_text_and_names_the_device() -> None:
    found = plans.environment(CPU)
    assert list(found) == ["device", "torch", "fxsparse", "cpu kernels", "threads", "date", "platform"]
    assert found["device"] == plans.device_name(CPU)
    assert found["device"].endswith(f" x{torch.get_num_threads()} threads")
    entry = PlanEntry(KEY, {}, environment=found)
    assert Plan.from_json(Plan((entry,)).to_json()).entries == (entry,)


def test_the_cpu_has_a_name_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", fail)
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert plans.device_name(CPU) == f"riscv64 x{torch.get_num_threads()} threads"
