"""The tiled weights of a graph: buffers beside the packed tensors, where its generated code reads them.

They are made when the code is generated (`regions.executed`) and taken away before it is generated again, before the
tensors are cast or moved, and in everything that is saved, exported step by step or copied: the packed form is the one
that lasts.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from fxsparse import sites
from fxsparse.ops import batch_inner, tile_cache, tiles
from fxsparse.ops.library import has_kernel
from fxsparse.ops.packing import PackedWeight
from fxsparse.ops.tiles import TiledWeight
from fxsparse.sites import ConvSite

SUFFIXES = ("_tile_values", "_tile_columns", "_tiles", "_tile_rows")
# Where convolutions run on tiled weights.
DEVICES = ("cuda",)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LEAST_CAPABILITY = (8, 0)
# Where tiles of 128 rows and 128 positions were faster on an H200 (published ticket, benchmarks/NOTES.md): from 1.45
# for each multiprocessor and 576 columns on, with up to 0.69 times the columns.
_WIDE_POSITIONS, _WIDE_TILES, _WIDE_COLUMNS, _WIDE_SHARE = 128, 1.4, 512, 0.7


def names_of(site: ConvSite) -> tuple[str, ...]:
    """Name the tiled tensors of a site in the graph's module."""
    assert site.packed is not None
    return tuple(site.packed + suffix for suffix in SUFFIXES)


def are_possible(gm: GraphModule, site: ConvSite, input_shape: tuple[int, ...] | None) -> bool:
    """Tell whether a site can run on a tiled weight, on images like those that it saw."""
    if site.packed is None or input_shape is None or len(input_shape) != 4:
        return False
    if site.padding_mode != "zeros" or tiles.refusal(site.weight_shape, site.groups) is not None:
        return False
    values = sites.attribute(gm, site.packed_names[0])
    if values.device.type not in DEVICES or values.dtype not in DTYPES or not getattr(gm, "may_tile", True):
        return False
    if values.device.type != "cuda":
        return True
    return has_kernel(values.device) and torch.cuda.get_device_capability(values.device) >= _LEAST_CAPABILITY


def attach(gm: GraphModule, site: ConvSite) -> tuple[str, ...]:
    """Add the tiled tensors of a site to its graph's module, unless they are there; return their names."""
    names = names_of(site)
    if not torch.compiler.is_exporting():  # then the tensors are fakes, and the buffers are there
        made = tiled(packed_weight(gm, site), site, site.input_shape)
        for name, tensor in zip(names, (made.values, made.columns, made.tiles, made.rows), strict=True):
            owner, _, leaf = name.rpartition(".")
            gm.get_submodule(owner).register_buffer(leaf, tensor, persistent=False)
    return names


def tiled(packed: PackedWeight, site: ConvSite, input_shape: tuple[int, ...] | None) -> TiledWeight:
    """Return the tiled form of a site's packed weight, in tiles of as many rows as suit images of a shape.

    Tiles of 128 rows gather half as much where all rows share their columns, and there are half as many of them: they
    must keep the device busy, and may not have many more columns.
    """
    values = packed.values
    if values.device.type != "cuda" or values.dtype not in (torch.bfloat16, torch.float16) or input_shape is None:
        return tile_cache.tiled(packed)
    device = torch.cuda.get_device_properties(values.device)
    geometry = (packed.weight_shape, site.stride, site.padding, site.dilation)
    _, outputs, height, width = batch_inner.output_shape(input_shape, *geometry)
    parts = batch_inner.padded_batch(input_shape[0]) * height * width / _WIDE_POSITIONS
    least = _WIDE_TILES * device.multi_processor_count
    rows = tiles.ROWS
    if device.major == 9 and parts * -(-outputs // tiles.ROWS) >= least:  # there are no more than that
        wide = tile_cache.wide_tiles(packed)
        if parts * wide.number >= least and wide.columns >= _WIDE_COLUMNS and wide.share <= _WIDE_SHARE:
            rows = tiles.WIDE_ROWS
    return tile_cache.tiled(packed, rows)


def packed_weight(gm: GraphModule, site: ConvSite) -> PackedWeight:
    """Return the packed weight of a site."""
    values, columns, panels, rows = (sites.attribute(gm, name) for name in site.packed_names)
    return PackedWeight(values, columns, panels, rows, site.weight_shape)


def detach(gm: GraphModule) -> bool:
    """Take all tiled tensors of a graph away; tell whether there were any."""
    found = False
    for _, site in sites.conv_sites(gm):
        for name in names_of(site) if site.packed is not None else ():
            owner, _, leaf = name.rpartition(".")
            found |= gm.get_submodule(owner)._buffers.pop(leaf, None) is not None
    return found


def are_attached(gm: GraphModule, site: ConvSite) -> bool:
    """Tell whether a site's tiled tensors are in its graph's module."""
    owner, _, leaf = names_of(site)[0].rpartition(".")
    return leaf in gm.get_submodule(owner)._buffers


def follow(gm: GraphModule) -> None:
    """Bring the tiled tensors of a graph up to date with its packed ones, which may be other tensors now."""
    for _, site in sites.conv_sites(gm):
        if site.packed is not None and are_attached(gm, site):
            attach(gm, site)
