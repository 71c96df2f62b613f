"""What `python -m benchmarks cuda` does without a GPU: its options, its tables, its refusal."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import cuda, cuda_networks
from benchmarks.cpu_models import VGG16, Level, ResNet18, Workload, make_masks


def _row(**changes: Any) -> dict[str, Any]:
    workload = {"name": "vgg16", "px": 32, "batch": 64, "structure": "regrouped", "zeros": 0.9, "dtype": "bfloat16"}
    times = {"best dense": "reduce-overhead", "dense ms": 0.25, "fxsparse ms": 0.125, "ratio": 2.0}
    counts = {"ratios": [1.9, 2.1], "target": 4, "sparse sites": 12, "sites": 13, "regions": 1}
    return {**workload, **times, **counts, **changes}


def test_the_tables_show_ratios_targets_and_what_was_left_out() -> None:
    table = cuda_networks.render([_row(), _row(target=None)])
    first, second = table.splitlines()[2:]
    assert "2.00x [1.90, 2.10]" in first and "| 4x" in first and "12/13" in first
    assert "4x" not in second
    ways = [{"network": "a", "ms": {"x": 1.0}}, {"network": "b", "ms": {"x": 2.0, "y": 3.0}}]
    assert [cell.strip() for cell in cuda_networks.render_ways(ways).splitlines()[2].split("|")[1:-1]] == [
        "a",
        "1.000",
        "-",
    ]


def test_every_default_network_with_a_target_can_be_read() -> None:
    networks = {str(Workload.read(text)) for text in cuda_networks.NETWORKS}
    assert networks == set(cuda_networks.NETWORKS)
    assert all(set(targets) <= networks for targets in cuda_networks.TARGETS.values())
    parser = argparse.ArgumentParser()
    cuda.add_arguments(parser)
    assert parser.parse_args([]).zeros == list(cuda_networks.ZEROS)


def test_masks_have_groups_of_the_rows_that_are_asked_for() -> None:
    masks = make_masks(VGG16(), "regrouped", 0.9, cuda_networks.GROUP_ROWS)
    rows = masks["features.3.0"].flatten(1)
    _, counts = torch.unique(rows, dim=0, return_counts=True)
    assert set(counts.tolist()) == {64}
    assert str(Level("regrouped", 0.9)) == "fxsparse regrouped 0.9"


def test_the_ticket_is_one_of_vgg16() -> None:
    masks = make_masks(VGG16(), "ticket", 0.5)  # it brings its own share of zeros
    kept = {name: float(mask.float().mean()) for name, mask in masks.items()}
    assert len(masks) == 12 and list(kept.values())[:3] == [1, 1, 1] and min(kept.values()) < 0.07
    layers = cuda.ticket_layers()
    assert [mask.shape[0] for _, mask in layers[1:]] == [mask.shape[0] for mask in masks.values()]
    for (layer, mask), other in zip(layers[1:], masks.values(), strict=True):
        assert torch.equal(mask, other) and (layer.channels, layer.out) == (mask.shape[1], mask.shape[0])
    with pytest.raises(SystemExit, match="one of VGG-16"):
        make_masks(ResNet18(), "ticket", 0.8)


def test_a_ticket_is_one_level_whatever_the_shares() -> None:
    levels = Level.every(["ticket", "regrouped"], [0.8, 0.9])
    assert [str(level) for level in levels] == [
        "fxsparse ticket 0.792",
        "fxsparse regrouped 0.8",
        "fxsparse regrouped 0.9",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_says_that_it_needs_a_gpu() -> None:
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        command.main(["cuda", "--networks", "vgg16:32:8"])
