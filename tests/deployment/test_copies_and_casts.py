"""Copies, casts, moves and pickles of converted models: what torch does to any module, done to these."""

from __future__ import annotations

import copy
import functools
import io
import pickle

import pytest
import torch
from models import random_masks, small_net
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import fxsparse
from fxsparse import FxsparseError, Mode, layouts, sites
from fxsparse.graph_module import ConvertedModule
from fxsparse.report import graphs_of

RUNGS = ("symbolic", "export", "modules")
X = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(1))
TABLES = {"_columns": torch.int32, "_panels": torch.int64, "_rows": torch.int64, "_mask": torch.bool}


@functools.cache
def converted(rung: str) -> nn.Module:
    model = small_net()
    chosen = fxsparse.Settings(calibrate=False, capture=rung, cache=False)
    made = fxsparse.convert(model, random_masks(model), example_inputs=X, settings=chosen)
    fxsparse.set_mode(made, Mode.SPARSE)
    fxsparse.set_mode(made, Mode.VANILLA, sites="stem.0")
    return made


@pytest.fixture(params=RUNGS)
def fast(request: pytest.FixtureRequest) -> nn.Module:
    return copy.deepcopy(converted(request.param))


def found_sites(model: nn.Module) -> list[tuple[nn.Module, sites.ConvSite]]:
    return [(gm, site) for gm in graphs_of(model) for _, site in sites.conv_sites(gm)]


def tables(model: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in model.state_dict().items() if k.endswith(tuple(TABLES))}


def packed_is_dense(model: nn.Module) -> bool:
    """Tell whether every packed weight holds the dense one, bit by bit."""
    for gm, site in found_sites(model):
        packed = [sites.attribute(gm, name) for name in site.packed_names]
        if not torch.equal(
            torch.ops.fxsparse.unpack(*packed, list(site.weight_shape)), sites.attribute(gm, site.weight)
        ):
            return False
    return True


def passes_test_mode(model: nn.Module, x: Tensor = X) -> bool:
    with torch.no_grad(), fxsparse.set_mode(model, Mode.TEST):
        model(x)
    return True


CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "to dtype": lambda m: m.to(torch.float16),
    "to device and dtype": lambda m: m.to("cpu", torch.bfloat16),
    "type": lambda m: m.type(torch.float16),
}


@pytest.mark.parametrize("cast", CASTS)
def test_casts_change_weights_and_packed_values_alike_and_leave_the_tables(fast: nn.Module, cast: str) -> None:
    if cast == "type":
        fast.register_buffer("_unused", torch.zeros(1))  # what torch casts, too
    before = {k: v.clone() for k, v in tables(fast).items()}
    assert CASTS[cast](fast) is fast
    dtype = next(fast.parameters()).dtype
    assert {p.dtype for p in fast.parameters()} == {dtype} != {torch.float32}
    for name, table in tables(fast).items():
        assert table.dtype == next(d for suffix, d in TABLES.items() if name.endswith(suffix))
        assert torch.equal(table, before[name])
    assert packed_is_dense(fast)
    assert passes_test_mode(fast, X.to(dtype))
    fast.float()
    assert packed_is_dense(fast)
    assert passes_test_mode(fast)


def test_copies_are_independent_and_keep_report_and_paths(fast: nn.Module) -> None:
    with torch.no_grad():
        expected = fast(X)
        for made in (copy.deepcopy(fast), copy.deepcopy(copy.deepcopy(fast))):
            assert torch.equal(made(X), expected)
            assert str(made.report) == str(fast.report)
            assert [s.path for _, s in found_sites(made)] == [s.path for _, s in found_sites(fast)]
            assert not {p.data_ptr() for p in made.parameters()} & {p.data_ptr() for p in fast.parameters()}
            assert {k: (v.shape, v.dtype) for k, v in made.state_dict().items()} == {
                k: (v.shape, v.dtype) for k, v in fast.state_dict().items()
            }
            fxsparse.set_mode(made, Mode.VANILLA)
            made.train()
            assert not fast.training
            assert torch.equal(fast(X), expected)


def test_a_shallow_copy_of_a_graph_shares_tensors_and_has_modes_of_its_own(fast: nn.Module) -> None:
    for gm in graphs_of(fast):
        made = copy.copy(gm)
        assert isinstance(made, ConvertedModule)
        for (name, tensor), (other, copied) in zip(gm.state_dict().items(), made.state_dict().items(), strict=True):
            assert name == other
            assert tensor.data_ptr() == copied.data_ptr()
        paths = [site.mode for _, site in sites.conv_sites(gm)]
        made.train()
        assert [site.mode for _, site in sites.conv_sites(gm)] == paths
    assert passes_test_mode(fast)


def test_a_shallow_copy_of_the_model_computes_the_same(fast: nn.Module) -> None:
    with torch.no_grad():
        assert torch.equal(copy.copy(fast)(X), fast(X))


def test_flags_of_parameters_survive(fast: nn.Module) -> None:
    assert fast.requires_grad_(False) is fast
    assert not any(p.requires_grad for p in copy.deepcopy(fast).half().parameters())
    fast.requires_grad_(True).train()
    fast(X).sum().backward()
    assert all(p.grad is not None for p in fast.parameters())
    fast.eval()
    assert passes_test_mode(fast)


def test_the_users_memory_format_holds_for_weights_and_stays_through_modes(fast: nn.Module) -> None:
    with torch.no_grad():
        expected = fast(X)
        fast.to(memory_format=torch.channels_last)
        out = fast(X.to(memory_format=torch.channels_last))
        assert torch.allclose(out, expected, atol=1e-5)
        fxsparse.set_mode(fast, Mode.VANILLA)
        fast.train().eval()
        for gm, site in found_sites(fast):
            if 1 not in site.weight_shape[1:]:
                assert layouts.layout_of(sites.attribute(gm, site.weight)) == "channels_last"
            assert not layouts.current(gm)
    assert packed_is_dense(fast)
    assert passes_test_mode(fast)


def test_parameters_go_through_a_vector(fast: nn.Module) -> None:
    vector = parameters_to_vector(fast.parameters())
    vector_to_parameters(2 * vector.detach(), fast.parameters())
    with torch.no_grad(), pytest.raises(FxsparseError, match="If the weight was written to since it was packed"):
        passes_test_mode(fast)
    with fxsparse.set_mode(fast, Mode.TRAINING):  # and back packs it again, as that error says
        pass
    assert passes_test_mode(fast)


def test_tensors_without_values_never_make_a_kernel_read_out_of_bounds(fast: nn.Module) -> None:
    with torch.no_grad():
        expected = fast(X)
        weights = {k: v.clone() for k, v in fast.state_dict().items()}
        fast.to_empty(device="cpu")
        assert all(torch.equal(table, weights[name]) for name, table in tables(fast).items())
        fast(X)  # some numbers
        fast.load_state_dict(weights)
        assert torch.equal(fast(X), expected)
        fast.to("meta")
        assert fast(X.to("meta")).is_meta
        fast.to_empty(device="cpu")
        assert not any(table.any() for name, table in tables(fast).items() if not name.endswith("_mask"))
        fast(X)
        fast.load_state_dict(weights)
        assert torch.equal(fast(X), expected)


def test_shared_memory_is_shared_by_all_tensors(fast: nn.Module) -> None:
    with torch.no_grad():
        expected = fast(X)
        assert fast.share_memory() is fast
        assert all(tensor.is_shared() for tensor in fast.state_dict().values())
        assert torch.equal(fast(X), expected)


@pytest.mark.parametrize("way", ["pickle", "torch.save", "torch.package"])
def test_pickling_points_at_save(fast: nn.Module, way: str) -> None:
    with pytest.raises(FxsparseError, match=r"cannot be pickled.*fxsparse.save\(model, path\)"):
        if way == "pickle":
            pickle.dumps(fast)
        elif way == "torch.save":
            torch.save(fast, io.BytesIO())
        else:
            with torch.package.PackageExporter(io.BytesIO()) as exporter:
                exporter.extern("**")
                exporter.save_pickle("model", "model.pkl", graphs_of(fast)[0])


def test_a_state_dict_is_saved_and_read_as_weights_only(fast: nn.Module) -> None:
    file = io.BytesIO()
    torch.save(fast.state_dict(), file)
    file.seek(0)
    made = copy.deepcopy(fast)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
        made.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(made(X), fast(X))
