"""`validate` in Python: it refuses exactly the tables that the compiled one refuses."""

from __future__ import annotations

import random

import pytest
import torch
from cases import Case
from torch import Tensor

from fxsparse.ops.table_check import validate

VALUES = (-(2**63), -(2**31), -17, -1, 0, 1, 2, 15, 16, 17, 100, 2**31 - 1, 2**62, 2**63 - 1)
TABLES = ("columns", "panels", "rows")


def verdict(check, tables: dict[str, Tensor], case: Case, values: int) -> str:
    try:
        check(*tables.values(), values, list(case.packed.weight_shape), case.groups)
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("mask", ["mixed", "blocks", "unstructured", "empty"])
def test_mutated_tables_get_the_verdict_of_the_compiled_check(groups: int, mask: str) -> None:
    case = Case(groups=groups, out_channels=40, mask=mask)
    draw = random.Random(0)
    count = case.packed.values.numel()
    good = {name: getattr(case.packed, name) for name in TABLES}
    assert verdict(validate, good, case, count) == ""
    refused = 0
    for _ in range(300):
        tables = {name: table.clone() for name, table in good.items()}
        table = tables[draw.choice([name for name in TABLES if tables[name].numel()])].view(-1)
        for _ in range(draw.choice([1, 1, 2])):
            at = draw.randrange(len(table))
            near = int(table[at]) + draw.choice([-1, 1])
            limits = torch.iinfo(table.dtype)
            table[at] = min(max(draw.choice([near, *VALUES]), limits.min), limits.max)
        values = draw.choice([count, count, count - 1, 0])
        ours = verdict(validate, tables, case, values)
        theirs = verdict(torch.ops.fxsparse.validate, tables, case, values)
        assert bool(ours) == bool(theirs), (ours, theirs)
        refused += bool(ours)
    assert refused > 100


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"groups": 0}, "'groups' is 0"),
        ({"groups": 7}, "'groups' is 7"),
        ({"values": -1}, "'values' is -1"),
        ({"weight_shape": [40, 0, 3, 3]}, "'weight_shape'"),
        ({"weight_shape": [40, 2**20, 2**20, 1]}, "'weight_shape'"),
        ({"weight_shape": [40, 8]}, "'weight_shape'"),
        ({"weight_shape": [41, 8, 3, 3]}, "1 output channels are missing"),
        ({"columns": torch.zeros(3)}, "'columns'"),
        ({"panels": torch.zeros(3, 5, dtype=torch.int64)}, "'panels'"),
        ({"rows": torch.zeros(4, dtype=torch.int64)}, "'rows'"),
        ({"rows": torch.zeros(3, 4, dtype=torch.int64)}, "'rows' has 3 lanes"),
    ],
)
def test_wrong_arguments_are_named(change: dict, word: str) -> None:
    packed = Case(out_channels=40).packed
    arguments = {
        **{name: getattr(packed, name) for name in TABLES},
        "values": packed.values.numel(),
        "weight_shape": list(packed.weight_shape),
        "groups": 1,
        **change,
    }
    with pytest.raises(RuntimeError, match=word):
        validate(**arguments)
    with pytest.raises(RuntimeError):
        torch.ops.fxsparse.validate(*arguments.values())
