"""torch.export of converted models, what comes of an exported program, ONNX of the dense model, torch.jit.trace."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import random_masks, small_net
from programs import sparse_calls
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import fxsparse
from fxsparse import graph_module, layouts
from fxsparse.plan import Move

BATCHES = (1, 2, 5)


def converted(kind: str = "mixed", dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a converted SmallNet whose four convolutions are on the paths that `kind` says."""
    model = small_net().to(dtype)
    fast = fxsparse.convert(model, random_masks(model))
    assert fast.report.sparse == 4
    if kind == "vanilla":
        fxsparse.set_mode(fast, "vanilla")
    elif kind in ("mixed", "moved"):
        fxsparse.set_mode(fast, "vanilla", sites="block.conv1")
    elif kind == "training":
        fast.train()
    elif kind == "frozen":
        fxsparse.freeze(fast)
    if kind == "moved":
        moves = [Move("", "stem_2", "channels_last", ("conv2d_1",))]
        moves.append(Move("", "parameter block.conv1.weight", "channels_last", ()))
        assert not layouts.place(fast, moves)
        assert len(layouts.current(fast)) == 2
        graph_module.recompile(fast)
    return fast


def images(batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, 16, 16, dtype=dtype)


def export(model: nn.Module, dtype: torch.dtype = torch.float32, strict: bool = False) -> ExportedProgram:
    return torch.export.export(model, (images(2, dtype),), dynamic_shapes=({0: Dim("batch")},), strict=strict)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize(
    ("kind", "dtype", "sparse"),
    [
        ("sparse", torch.float32, 4),
        ("sparse", torch.bfloat16, 4),
        ("vanilla", torch.float32, 0),
        ("mixed", torch.float32, 3),
        ("mixed", torch.bfloat16, 3),
        ("moved", torch.float32, 3),
        ("frozen", torch.float32, 4),
        ("training", torch.float32, 0),
    ],
)
def test_an_exported_model_gives_the_same_bits_for_any_batch(
    kind: str, dtype: torch.dtype, sparse: int, strict: bool
) -> None:
    fast = converted(kind, dtype)
    program = export(fast, dtype, strict)
    decomposed = program.run_decompositions()
    assert sparse_calls(program.graph) == sparse_calls(decomposed.graph) == sparse
    for batch in BATCHES:
        x = images(batch, dtype)
        expected = fast(x)
        assert torch.equal(program.module()(x), expected)
        assert torch.equal(decomposed.module()(x), expected)


def test_a_program_of_a_frozen_model_holds_no_dense_weight_of_a_sparse_site() -> None:
    program = export(converted("frozen"))
    assert "stem.0.weight_values" in program.state_dict
    assert "stem.0.weight" not in program.state_dict


def test_the_program_survives_torchs_own_save_and_load() -> None:
    fast = converted()
    file = io.BytesIO()
    torch.export.save(export(fast), file)
    file.seek(0)
    loaded = torch.export.load(file)
    assert sparse_calls(loaded.graph) == 3
    for batch in BATCHES:
        x = images(batch)
        assert torch.equal(loaded.module()(x), fast(x))


def test_a_process_without_fxsparse_is_told_to_register_the_operator(tmp_path: Path) -> None:
    path = tmp_path / "program.pt2"
    torch.export.save(export(converted()), path)
    code = f"import torch; torch.export.load({str(path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "failed to resolve torch.ops.fxsparse.conv2d.default" in done.stderr
    assert "Please import the custom op to register it before deserializing" in done.stderr


def test_a_traced_model_runs_any_batch_and_survives_saving() -> None:
    fast = converted("moved")
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(fast, images(2)), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for batch in BATCHES:
        x = images(batch)
        assert torch.equal(loaded(x), fast(x))


@pytest.mark.parametrize("kind", ["mixed", "moved", "frozen"])
def test_the_dense_model_exports_with_no_operator_of_fxsparse(kind: str) -> None:
    fast = converted(kind)
    program = export(fxsparse.to_dense(fast))
    assert not any("fxsparse" in str(node.target) for node in program.graph.nodes)
    assert not any("weight_" in name for name in program.state_dict)
    x = images(5)
    torch.testing.assert_close(program.module()(x), fast(x))


def test_the_dense_model_exports_to_onnx() -> None:
    pytest.importorskip("onnx", reason="onnx is not installed, which torch.onnx.export needs")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed, which torch.onnx.export needs")
    from onnx.reference import ReferenceEvaluator

    fast = converted()
    program = torch.onnx.export(
        fxsparse.to_dense(fast), (images(2),), dynamic_shapes=({0: Dim("batch")},), dynamo=True, verbose=False
    )
    assert program is not None
    onnx_model = program.model_proto
    assert {node.domain for node in onnx_model.graph.node} == {""}  # ONNX's own operators
    evaluator = ReferenceEvaluator(onnx_model)
    for batch in BATCHES:
        x = images(batch)
        (out,) = evaluator.run(None, {onnx_model.graph.input[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(out), fast(x).detach())


def test_a_model_with_sparse_sites_is_refused_by_onnx_with_the_operators_name() -> None:
    pytest.importorskip("onnx", reason="onnx is not installed, which torch.onnx.export needs")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed, which torch.onnx.export needs")
    with pytest.raises(Exception, match=r"No ONNX function found for .*fxsparse\.conv2d"):
        torch.onnx.export(converted(), (images(2),), dynamo=True, verbose=False)
