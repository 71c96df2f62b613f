"""Which model a command works on: factories, weights, masks, inputs; one error for each thing that can be wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from running import Run
from safetensors.torch import save_file

import fxsparse
from fxsparse.cli import models


def _rows(result: Any) -> dict[str, Any]:
    assert result.code == 0, result.err
    return {row["name"]: row for row in result.json["report"]["rows"]}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no_such_module:Net", "There is no module 'no_such_module'"),
        ("nets.inner:Net", "There is no module 'nets.inner'"),
        ("broken:Net", "Importing 'broken' raised ModuleNotFoundError: No module named 'there_is_no_such_package'"),
        ("wrong:Net", "Importing 'wrong' raised ZeroDivisionError: division by zero"),
        ("nets:Nat", "'nets' has no 'Nat'. Near names: 'Net'"),
        ("nets:Net.missing", "'nets' has no 'Net.missing'"),
        ("nets:number", "'nets:number' is a int, which cannot be called"),
        ("nets:fails", "The factory 'nets:fails' raised RuntimeError: no such dataset. Check"),
        ("nets:gives_none", "The factory 'nets:gives_none' returned a NoneType, not an nn.Module"),
        ("nets", "'nets' is no model: neither a file that exists, nor of the form package.module:factory"),
        ("fast.pt2", "'fast.pt2' is no model: neither a file that exists"),
        ("nets.py", "'nets.py' is a file, and this command takes package.module:factory"),
    ],
)
def test_a_model_that_cannot_be_had_is_one_clear_error(run: Run, model: str, message: str) -> None:
    code, out, err = run("explain", model)
    assert (code, out) == (2, "")
    assert message in err and "Traceback" not in err


def test_a_factory_gets_its_arguments(run: Run) -> None:
    rows = _rows(run("explain", "nets:Net", "--args", "[3]", "--kwargs", '{"width": 24}', "--json"))
    assert rows["body"]["weight_shape"] == [24, 24, 3, 3]
    assert "unexpected keyword argument 'depth'" in run("explain", "nets:Net", "--kwargs", '{"depth": 2}').err


def test_a_model_that_stands_ready_is_taken_as_it_is(run: Run) -> None:
    assert _rows(run("explain", "nets:ready", "--json"))["body"]["weight_shape"] == [16, 16, 3, 3]
    code, _, err = run("explain", "nets:ready", "--args", "[3]")
    assert code == 2 and "'nets:ready' is a model, not a factory" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--kwargs", "{'width': 1}"), "is not JSON"),
        (("--kwargs", "[1]"), "is no JSON object"),
        (("--args", '{"a": 1}'), "is no JSON array"),
        (("--input", "1x3xbig"), "is no shape. Write it as 1x3x224x224"),
        (("--input", "0x3x8x8"), "is no shape"),
        (("--prune", "1"), "is no share to prune"),
        (("--prune", "most"), "is no share to prune"),
        (("--threads", "0"), "is no number of threads"),
        (("--dtype", "int8"), "invalid choice: 'int8'"),
        (("--prune", "0.5", "--masks", "m.safetensors"), "not allowed with argument"),
    ],
)
def test_values_that_cannot_be_are_refused_by_argparse(run: Run, options: tuple[str, ...], message: str) -> None:
    code, _, err = run("explain", "nets:Net", *options)
    assert code == 2 and message in err


@pytest.mark.parametrize("shapes", [("2x4x8x8",), ("2x3x8x8", "2x3x8x8"), ("8",)])
def test_inputs_that_the_model_does_not_take_are_refused(run: Run, shapes: tuple[str, ...]) -> None:
    options = [part for shape in shapes for part in ("--input", shape)]
    code, out, err = run("explain", "nets:Net", *options)
    assert (code, out) == (2, "")
    assert f"The model does not run on {' '.join(options)} (" in err and err.count("\n") == 1


def test_every_input_is_an_argument(run: Run) -> None:
    rows = _rows(run("explain", "nets:TwoInputs", "--input", "2x3x8x8", "--input", "1x3x8x8", "--json"))
    assert rows["body"]["input_shape"] == [2, 16, 8, 8]


def test_dtype_layout_and_threads_are_those_asked_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def explain(model: torch.nn.Module, masks: Any, *, example_inputs: Any, settings: Any) -> fxsparse.Report:
        seen.append((next(model.parameters()), example_inputs.args[0], torch.get_num_threads(), model.training))
        return report

    report = fxsparse.explain(torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1)).eval())
    monkeypatch.setattr(fxsparse, "explain", explain)
    before = torch.get_num_threads()
    options = ("--input", "2x3x8x8", "--dtype", "bfloat16", "--threads", "2", "--channels-last")
    assert run("explain", "nets:Net", *options).code == 0
    ((weight, x, threads, training),) = seen
    assert weight.dtype == x.dtype == torch.bfloat16
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    assert (threads, training) == (2, False)
    assert torch.get_num_threads() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(run: Run) -> None:
    code, _, err = run("explain", "nets:Net", "--device", "cuda")
    assert code == 2 and "torch finds no CUDA device" in err


def test_the_current_folder_is_importable_for_the_command_only(run: Run, folder: Path) -> None:
    import sys

    assert run("explain", "nets:Net").code == 0
    assert str(folder) not in sys.path


def test_pruning_by_magnitude_keeps_the_share_and_says_what_it_is(run: Run) -> None:
    result = run("explain", "nets:Net", "--prune", "0.75", "--json")
    rows = _rows(result)
    assert rows["stem.0"]["density"] == pytest.approx(0.25, abs=0.01)
    assert rows["body"]["density"] == pytest.approx(0.25, abs=0.01)
    assert "for trying out" in result.json["notes"][0]
    assert "Note: --prune 0.75 is for trying out" in run("explain", "nets:Net", "--prune", "0.75").out


def test_masks_are_those_of_the_model_where_none_are_given(run: Run) -> None:
    assert _rows(run("explain", "nets:pruned", "--json"))["body"]["density"] == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("kind", ["safetensors", "torch.save"])
def test_masks_come_from_files_of_tensors(run: Run, folder: Path, kind: str) -> None:
    masks = {"body": torch.rand(16, 16, 3, 3) < 0.2}
    file = folder / "masks"
    if kind == "safetensors":
        save_file(masks, file)
    else:
        torch.save(masks, file)
    rows = _rows(run("explain", "nets:Net", "--masks", str(file), "--json"))
    assert rows["body"]["density"] == pytest.approx(float(masks["body"].float().mean()))


def test_a_mask_of_another_shape_or_name_is_refused(run: Run, folder: Path) -> None:
    for name, shape, message in (("body", (16, 16, 1, 1), "has shape"), ("bodi", (16, 16, 3, 3), "no weight of")):
        save_file({name: torch.ones(shape)}, folder / "masks")
        code, _, err = run("explain", "nets:Net", "--masks", "masks")
        assert code == 2 and message in err


@pytest.mark.parametrize("wrap", [False, True])
def test_weights_are_loaded(run: Run, folder: Path, wrap: bool) -> None:
    nets = models._attribute  # the factory, as the command finds it
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        net = nets("nets", "Net")()
    net.body.weight.data.masked_fill_(torch.rand(16, 16, 3, 3) < 0.7, 0)
    state = net.state_dict()
    torch.save({"state_dict": state, "epoch": 3} if wrap else state, folder / "w")
    share = float((net.body.weight != 0).float().mean())
    assert _rows(run("explain", "nets:Net", "--weights", "w", "--json"))["body"]["density"] == pytest.approx(share)


def test_weights_of_a_pruned_model_bring_their_masks(run: Run, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        state = models._attribute("nets", "pruned")().state_dict()
    assert "body.weight_orig" in state
    save_file(state, folder / "w.safetensors")
    rows = _rows(run("explain", "nets:Net", "--weights", "w.safetensors", "--json"))
    assert rows["body"]["density"] == pytest.approx(0.1, abs=0.01)
    assert rows["stem.0"]["density"] == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"body.weight": None}, "it lacks 'body.weight'"),
        ({f"more{i}": torch.ones(1) for i in range(5)}, "it has beyond the model 'more0', 'more1', 'more2' and 2 more"),
        ({"body.bias": torch.ones(3)}, "it has in another shape 'body.bias'"),
    ],
)
def test_weights_that_do_not_fit_are_refused(run: Run, folder: Path, change: dict[str, Any], message: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        state = models._attribute("nets", "Net")().state_dict()
    state = {name: value for name, value in {**state, **change}.items() if value is not None}
    save_file(state, folder / "w.safetensors")
    code, _, err = run("explain", "nets:Net", "--weights", "w.safetensors")
    assert code == 2 and message in err and err.count("\n") == 1


class _Unpickled:
    """What a hostile pickle would build."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file 'w'"),
        (b"", "cannot be read"),
        (b"hello", "cannot be read"),
        ((10).to_bytes(8, "little") + b"{broken}  ", "cannot be read"),
        ([1, 2], "holds a list that is no dict of tensors"),
        ({"a": 1}, "holds a dict that is no dict of tensors"),
        (_Unpickled(), "cannot be read"),
    ],
)
@pytest.mark.parametrize("option", ["--weights", "--masks"])
def test_files_that_hold_no_tensors_are_refused(
    run: Run, folder: Path, content: Any, message: str, option: str
) -> None:
    if isinstance(content, bytes):
        (folder / "w").write_bytes(content)
    elif content is not None:
        torch.save(content, folder / "w")
    code, _, err = run("explain", "nets:Net", option, "w")
    assert code == 2 and f"{option}: " in err and message in err
    assert not (folder / "ran").exists()


def test_regrouped_masks_are_blocks_of_the_same_size_and_said_to_be_other_masks(run: Run) -> None:
    result = run("explain", "nets:pruned", "--regroup", "--json")
    row = _rows(result)["body"]
    assert row["blocks"] > 0 and row["residual"] == 0 and row["fill_in"] == 0
    assert row["density"] == pytest.approx(0.1, abs=0.03)
    assert "--regroup is for trying out" in result.json["notes"][0]


def test_regrouping_a_dense_model_is_refused(run: Run) -> None:
    code, _, err = run("explain", "nets:Net", "--regroup")
    assert code == 2 and "no weight is pruned" in err


def test_rules_choose_the_convolutions(run: Run) -> None:
    rows = _rows(run("explain", "nets:pruned", "--exclude", "stem*", "--include", "*", "--json"))
    assert (rows["stem.0"]["path"], rows["body"]["path"]) == ("vanilla", "sparse")
    code, _, err = run("explain", "nets:pruned", "--include", "trunk")
    assert code == 2 and "The include rule 'trunk' matches no convolution" in err
