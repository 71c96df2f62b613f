import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxsparse.errors import FxsparseError
from fxsparse.regrouping import Regrouping, Target, regroup, regroup_masks


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from([1, 1, 2, 4]),
    st.integers(1, 80),
    st.integers(1, 30),
    st.sampled_from([0.0, 0.03, 0.2, 0.7, 1.0]),
    st.sampled_from([None, 0.05, 0.5, 1.0]),
    st.sampled_from(["consecutive", "clustering"]),
    st.integers(0, 2**32 - 1),
)
def test_a_new_mask_is_blocks_within_the_budget(groups, rows, columns, density, budget, partitioner, seed):
    rng = np.random.default_rng(seed)
    mask = torch.from_numpy(rng.random((groups * rows, columns)) < density)
    weight = torch.from_numpy(rng.standard_normal(mask.shape)) if seed % 2 else None
    target = Target(group_rows=16, partitioner=partitioner)
    new = regroup_masks(
        {"a": mask},
        target,
        budget=budget,
        weights=None if weight is None else {"a": weight},
        groups={"a": groups},
    )["a"]
    assert new.dtype == torch.bool
    assert new.shape == mask.shape
    assert bool(new.any()) == bool(mask.any())
    assert not new[~mask.any(1)].any()
    area = mask.sum() if budget is None else round(budget * mask.numel())
    exact = Regrouping.from_identical_rows(new, groups)
    exact.validate()
    assert exact.residual_count == exact.fill_in == 0
    assert exact.kept == new.sum()
    strips = exact.blocks[0].rows.size if exact.blocks else 0
    assert new.sum() <= max(int(area), strips)


@pytest.mark.parametrize("partitioner", ["consecutive", "clustering"])
def test_new_masks_have_the_area_and_regroup_without_residual_and_fill_in(trained_like, partitioner):
    masks = {
        "wide": torch.from_numpy(trained_like(256, 64, 9).reshape(256, 64, 3, 3)),
        "narrow": torch.from_numpy(trained_like(40, 32, 1, 0.7)),
        "grouped": torch.from_numpy(trained_like(128, 16, 9, 0.8).reshape(128, 16, 3, 3)),
        "single": torch.from_numpy(trained_like(16, 8, 9, 0.5)),
    }
    target = Target(partitioner=partitioner)
    groups = {"grouped": 2}
    new = regroup_masks(masks, target, groups=groups)
    assert list(new) == list(masks)
    for name, mask in masks.items():
        assert new[name].shape == mask.shape
        assert mask.sum() - 32 <= new[name].sum() <= mask.sum()
        result = regroup(new[name], target, groups=groups.get(name, 1))
        assert result.residual_count == 0
        assert result.fill_in == 0
        assert result.blocks


def test_strips_are_ranked_by_kept_count(trained_like):
    mask = trained_like(256, 64, 9)
    kept = {}
    for partitioner in ("consecutive", "clustering"):
        new = regroup_masks({"a": torch.from_numpy(mask)}, Target(partitioner=partitioner))["a"].numpy()
        kept[partitioner] = (new & mask).sum() / mask.sum()
    rng = np.random.default_rng(0)
    random_strips = np.repeat(rng.random((8, mask.shape[1])) < 0.1, 32, axis=0)
    assert kept["clustering"] > kept["consecutive"] + 0.05
    assert kept["consecutive"] > (random_strips & mask).sum() / mask.sum() + 0.1


def test_by_hand_the_fullest_columns_stay():
    mask = np.zeros((4, 6), bool)
    mask[:, 1] = True
    mask[:3, 4] = True
    mask[0, 5] = True
    new = regroup_masks({"a": mask}, Target(group_rows=4, lanes=4))["a"]
    assert new.nonzero().tolist() == [[row, column] for row in range(4) for column in (1, 4)]


def test_weights_rank_by_the_energy_of_kept_weights():
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[0, 0] = False
    weight = torch.tensor([[100.0, 1.0, 2.0]] + [[0.1, 1.0, 2.0]] * 3)
    target = Target(group_rows=4, lanes=4)
    new = regroup_masks({"a": mask}, target, budget=1 / 3, weights={"a": weight})["a"]
    assert new.any(0).tolist() == [False, False, True]
    new = regroup_masks({"a": mask}, target, budget={"a": 2 / 3}, weights={"a": weight})["a"]
    assert new.any(0).tolist() == [False, True, True]


def test_blocks_stay_as_they_are_when_regrouped_again(trained_like):
    first = regroup_masks({"a": torch.from_numpy(trained_like(256, 64, 9))})["a"]
    again = regroup_masks({"a": first})["a"]
    assert first.any()
    assert torch.equal(first, again)


def test_a_layer_keeps_a_strip_and_an_empty_one_stays_empty():
    single = torch.zeros(64, 10, dtype=torch.bool)
    single[40, 3] = True
    single[41, 3] = True
    new = regroup_masks({"single": single, "empty": torch.zeros(64, 10)}, budget=0.001)
    assert new["single"].nonzero().tolist() == [[40, 3], [41, 3]]
    assert not new["empty"].any()
    assert new["empty"].dtype == torch.bool


def test_numbers_outside_the_mask_do_not_matter():
    rng = np.random.default_rng(0)
    mask = torch.from_numpy(rng.random((64, 40)) < 0.3)
    weight = torch.from_numpy(rng.standard_normal((64, 40)))
    a = regroup_masks({"a": mask}, weights={"a": weight})["a"]
    b = regroup_masks({"a": mask.float() * -3}, weights={"a": torch.where(mask, weight, 7.0)})["a"]
    assert torch.equal(a, b)
    assert not torch.equal(a, mask)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": {"b": 0.5}}, "Budget names the layer 'b', which has no mask. Layers: a."),
        ({"weights": {"b": torch.ones(4, 4)}}, "Weight names the layer 'b'"),
        ({"groups": {"b": 2}}, "Groups names the layer 'b'"),
        ({"budget": 0.0}, r"Budget of 'a' is 0.0. Give the share of weights to keep, in \(0, 1\]."),
        ({"budget": {"a": 1.5}}, "Budget of 'a' is 1.5"),
        ({"budget": float("nan")}, "Budget of 'a' is nan"),
        ({"budget": "half"}, "Budget of 'a' is 'half'"),
        ({"groups": {"a": 3}}, "Groups of 'a' is 3, which does not divide the 4 rows"),
        (
            {"weights": {"a": torch.ones(4, 5)}},
            r"Weight 'a' is \[4, 5\] as a weight matrix; its mask is \[4, 4\]",
        ),
        ({"weights": {"a": torch.full((4, 4), torch.inf)}}, "Weight 'a' holds infinity"),
        ({"weights": {"a": torch.full((4, 4), torch.nan)}}, "Weight 'a' holds NaN"),
    ],
)
def test_an_argument_that_cannot_be_read_is_an_error(arguments, message):
    with pytest.raises(FxsparseError, match=message):
        regroup_masks({"a": torch.ones(4, 4)}, **arguments)


def test_the_error_names_the_layer_of_a_bad_mask():
    with pytest.raises(FxsparseError, match="Mask 'conv7' holds NaN"):
        regroup_masks({"fine": torch.ones(4, 4), "conv7": torch.full((4, 4), torch.nan)})


def test_progress_draws_a_bar_over_the_layers(capsys):
    regroup_masks({"a": torch.ones(4, 4), "b": torch.ones(4, 4)}, progress=True)
    assert "layer" in capsys.readouterr().err


def test_masks_that_are_no_mapping_are_refused() -> None:
    with pytest.raises(FxsparseError, match="Masks is a Tensor. Give a mapping"):
        regroup_masks(torch.ones(4, 4))
