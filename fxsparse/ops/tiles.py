"""The tiled form of a packed weight, which the CUDA kernels for batch-innermost images read.

A *row tile* is 64 (or 128) output channels that share one ascending list of columns. Rows are the tensor cores' side
of a product, and a tile costs what its columns cost, however few of its rows are real; so panels are merged over the
union of their columns until they fill a tile, and residual weights are columns like others, with zeros in the rows that
lack them. Tiles lie one after the other, each with K columns: its own, padded to a multiple of 64.

| tensor | dtype, shape | content |
| --- | --- | --- |
| `values` | float [V] | per tile [K / 8][rows][8 columns]; other dtypes than bfloat16 and float16: [K][rows] |
| `columns` | int32 [.] | per tile K words `r << 27 | s << 23 | c`: kernel row and column, input channel of all groups |
| `tiles` | int64 [T, 4] | first column, columns without padding, first value, the largest K of all tiles |
| `rows` | int32 [rows * T] | output channel, or -1 |
| `places` | int32 [V] | index into the packed values with one zero behind them, for `tiled_values` |
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fxsparse.errors import FxsparseError
from fxsparse.ops.batch_inner import COLUMN_STEP, ROW_SHIFT, TAP_SHIFT
from fxsparse.ops.packing import PackedWeight
from fxsparse.ops.reference import LANES

ROWS = 64
WIDE_ROWS = 128
LARGEST_KERNEL = 15
LARGEST_CHANNELS = 1 << 23
PADDING_COLUMN = 15 << ROW_SHIFT | 15 << TAP_SHIFT
# More chunks than this are first filled up in order: choosing partners takes the cube of their number.
_MOST_CHUNKS = 192

_Ints = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class TiledWeight:
    """A weight in tiled form; the module's docstring describes the tensors."""

    values: Tensor
    columns: Tensor
    tiles: Tensor
    rows: Tensor
    places: Tensor
    weight_shape: tuple[int, int, int, int]

    @property
    def tile_rows(self) -> int:
        """Rows of a tile, padding included."""
        return len(self.rows) // max(len(self.tiles), 1)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that a call reads (`places` is for changes of the weight)."""
        return sum(t.numel() * t.element_size() for t in (self.values, self.columns, self.tiles, self.rows))


@dataclasses.dataclass
class _Chunk:
    """At most a tile's rows, in lanes, and the words of their columns."""

    lanes: _Ints
    columns: _Ints


def refusal(weight_shape: tuple[int, ...], groups: int = 1) -> str | None:
    """Tell why a weight of this shape has no tiled form, or None."""
    if max(weight_shape[2:]) > LARGEST_KERNEL:
        return f"the kernel is {weight_shape[2]}x{weight_shape[3]} (tiles: at most {LARGEST_KERNEL})"
    if weight_shape[1] * groups > LARGEST_CHANNELS:
        return f"the input has {weight_shape[1] * groups} channels (tiles: at most {LARGEST_CHANNELS})"
    return None


def tile(packed: PackedWeight, tile_rows: int = ROWS) -> TiledWeight:
    """Put a packed weight into tiles.

    Args:
        packed: of dtype float32, bfloat16 or float16 (CUDA kernels) or float64 (reference only), on any device.
        tile_rows: 64, or 128, which halves what is gathered where 128 rows share their columns.

    Raises:
        FxsparseError: the kernel or the number of channels is larger than a column's word can say, or there are more
            values than int32 can index.
    """
    first_channels = packed.panels[:, 3]
    groups = int(first_channels.max()) // packed.weight_shape[1] + 1 if len(first_channels) else 1
    wrong = refusal(packed.weight_shape, groups)
    if wrong is None and packed.values.numel() >= 2**31 - 1:
        wrong = f"it has {packed.values.numel()} packed values (int32 indexes them)"
    if wrong is not None:
        raise FxsparseError(f"The weight has no tiled form: {wrong}. Keep `fxsparse::conv2d` for it.")
    source = _Source(packed)
    return source.assemble(source.merged(tile_rows), tile_rows)


class WideTiles(NamedTuple):
    """What tiles of 128 rows would be.

    Attributes:
        number: of them.
        columns: of a tile, on average, without padding.
        share: columns of all over those of all tiles of 64 rows: 0.5 where all rows share their columns, 1 where pairs
            of tiles have none in common.
    """

    number: int
    columns: float
    share: float


def wide_tiles(packed: PackedWeight) -> WideTiles:
    """Return what the tiles of 128 rows of a packed weight would be."""
    source = _Source(packed)
    narrow, wide = ([len(chunk.columns) for chunk in source.merged(rows)] for rows in (ROWS, WIDE_ROWS))
    return WideTiles(len(wide), sum(wide) / max(len(wide), 1), sum(wide) / max(sum(narrow), 1))


def tiled_values(values: Tensor, places: Tensor) -> Tensor:
    """Return the tiled values of (changed) packed values."""
    return torch.cat([values, values.new_zeros(1)]).index_select(0, places)


def _padded(columns: int) -> int:
    return max(-(-columns // COLUMN_STEP), 1) * COLUMN_STEP


class _Source:
    """A packed weight's tables, by lane (a row of `rows`)."""

    def __init__(self, packed: PackedWeight) -> None:
        self._packed = packed
        _, _, self._kernel_height, self._kernel_width = packed.weight_shape
        self._columns = packed.columns.cpu().numpy().astype(np.int64)
        self._panels = packed.panels.cpu().numpy()
        self._rows = packed.rows.cpu().numpy()

    def _words(self, columns: _Ints, first_channel: int | _Ints) -> _Ints:
        taps = self._kernel_height * self._kernel_width
        r, s = np.divmod(columns % taps, self._kernel_width)
        return r << ROW_SHIFT | s << TAP_SHIFT | (columns // taps + first_channel)

    def _residual(self, lane: int) -> tuple[_Ints, _Ints]:
        """Return (words, places) of a lane's residual weights."""
        _, first, count, value = self._rows[lane]
        words = self._words(self._columns[first : first + count], self._panels[lane // LANES, 3])
        return words, value + np.arange(count)

    def _block(self, panel: int) -> tuple[_Ints, _Ints]:
        """Return (words, places of lane 0) of a panel's block columns."""
        first, count, value, channel = self._panels[panel]
        return self._words(self._columns[first : first + count], channel), value + LANES * np.arange(count)

    def merged(self, limit: int) -> list[_Chunk]:
        """Return tiles: chunks of blocks with at most `limit` rows, merged where there is room."""
        full: list[_Chunk] = []
        partial: list[_Chunk] = []
        for panels in self._blocks():
            lanes = (panels[:, None] * LANES + np.arange(LANES)).ravel()
            lanes = lanes[self._rows[lanes, 0] >= 0]
            block, _ = self._block(panels[0])
            for start in range(0, len(lanes), limit):
                part = lanes[start : start + limit]
                columns = np.unique(np.concatenate([block, *(self._residual(lane)[0] for lane in part)]))
                (full if len(part) == limit else partial).append(_Chunk(part, columns))
        return full + _merge(partial, limit)

    def _blocks(self) -> list[_Ints]:
        """Return runs of consecutive panels that share their columns (those without columns: their group)."""
        if not len(self._panels):
            return []
        key = self._panels[:, [0, 1, 3]].copy()
        key[key[:, 1] == 0, 0] = 0
        starts = np.flatnonzero((key[1:] != key[:-1]).any(1)) + 1
        return np.split(np.arange(len(key)), starts)

    def assemble(self, chunks: list[_Chunk], tile_rows: int) -> TiledWeight:
        """Lay the tiles out."""
        nothing = self._packed.values.numel()
        columns, tiles, rows, places = [], [], [], []
        first_column = first_value = 0
        most = max((_padded(len(chunk.columns)) for chunk in chunks), default=0)
        for chunk in chunks:
            count = len(chunk.columns)
            padded = _padded(count)
            tiles.append((first_column, count, first_value, most))
            columns.append(np.append(chunk.columns, np.full(padded - count, PADDING_COLUMN)))
            rows.append(np.append(self._rows[chunk.lanes, 0], np.full(tile_rows - len(chunk.lanes), -1)))
            places.append(self._places(chunk, padded, tile_rows, nothing))
            first_column += padded
            first_value += padded * tile_rows
        device = self._packed.values.device

        def table(parts: list[_Ints], dtype: type) -> Tensor:
            whole = np.concatenate(parts) if parts else np.empty(0)
            return torch.from_numpy(whole.astype(dtype)).to(device)

        where = table(places, np.int32)
        return TiledWeight(
            tiled_values(self._packed.values.detach(), where),
            table(columns, np.int32),
            torch.from_numpy(np.array(tiles, np.int64).reshape(-1, 4)).to(device),
            table(rows, np.int32),
            where,
            self._packed.weight_shape,
        )

    def _places(self, chunk: _Chunk, padded: int, tile_rows: int, nothing: int) -> _Ints:
        """Return where each of a tile's values comes from, in the tile's order."""
        grid: _Ints = np.full((padded, tile_rows), nothing, np.int64)
        for row, lane in enumerate(chunk.lanes):
            words, places = self._block(lane // LANES)
            grid[np.searchsorted(chunk.columns, words), row] = places + lane % LANES
            words, places = self._residual(lane)
            grid[np.searchsorted(chunk.columns, words), row] = places
        if self._packed.values.dtype in (torch.bfloat16, torch.float16):
            grid = grid.reshape(padded // 8, 8, tile_rows).swapaxes(1, 2)
        return grid.ravel()


def _merge(chunks: list[_Chunk], limit: int) -> list[_Chunk]:
    """Merge chunks into tiles: time and again the two that fit into one and share the most columns."""
    chunks = sorted(chunks, key=lambda chunk: -len(chunk.lanes))
    if len(chunks) > _MOST_CHUNKS:
        chunks = _fill(chunks, limit)
    if len(chunks) < 2:
        return chunks
    words, where = np.unique(np.concatenate([chunk.columns for chunk in chunks]), return_inverse=True)
    has = np.zeros((len(chunks), len(words)), np.float32)
    has[np.repeat(np.arange(len(chunks)), [len(chunk.columns) for chunk in chunks]), where] = 1
    rows = np.array([len(chunk.lanes) for chunk in chunks])
    shared = has @ has.T
    np.fill_diagonal(shared, -1)
    while True:
        gain = np.where(rows[:, None] + rows[None] <= limit, shared, -1)
        a, b = np.unravel_index(int(gain.argmax()), gain.shape)
        if gain[a, b] < 0:
            return [chunk for chunk, count in zip(chunks, rows, strict=True) if count <= limit]
        chunks[a] = _union(chunks[a], chunks[b])
        has[a] = np.maximum(has[a], has[b])
        rows[a] += rows[b]
        rows[b] = limit + 1  # merged away: fits nowhere
        shared[a] = shared[:, a] = has @ has[a]
        shared[a, a] = -1


def _fill(chunks: list[_Chunk], limit: int) -> list[_Chunk]:
    filled = [chunks[0]]
    for chunk in chunks[1:]:
        if len(filled[-1].lanes) + len(chunk.lanes) <= limit:
            filled[-1] = _union(filled[-1], chunk)
        else:
            filled.append(chunk)
    return filled


def _union(a: _Chunk, b: _Chunk) -> _Chunk:
    return _Chunk(np.append(a.lanes, b.lanes), np.union1d(a.columns, b.columns))


def check(
    values: int, columns: Tensor, tiles: Tensor, rows: Tensor, weight_shape: tuple[int, ...], groups: int
) -> None:
    """Refuse tables from outside that are not a tiled weight; the kernels trap on what would leave the tensors.

    Args:
        values: number of tiled values.
        columns, tiles, rows: the tables, as in the module's docstring.
        weight_shape: (O, C / groups, kh, kw).

    Raises:
        FxsparseError: the first thing that is wrong.
    """
    wrong = refusal(weight_shape, groups) or _describe_invalid(values, columns, tiles, rows, weight_shape, groups)
    if wrong is not None:
        raise FxsparseError(f"The tiled weight is damaged: {wrong}")


def _describe_invalid(
    values: int, columns: Tensor, tiles: Tensor, rows: Tensor, weight_shape: tuple[int, ...], groups: int
) -> str | None:
    for name, table, dtype, dim in (("columns", columns, torch.int32, 1), ("rows", rows, torch.int32, 1)):
        if table.dtype != dtype or table.dim() != dim:
            return f"'{name}' is {table.dtype} {tuple(table.shape)}, expected {dtype} with one dimension"
    if tiles.dtype != torch.int64 or tiles.dim() != 2 or tiles.shape[1] != 4:
        return f"'tiles' is {tiles.dtype} {tuple(tiles.shape)}, expected torch.int64 (any, 4)"
    lanes = len(rows) // max(len(tiles), 1)
    if len(rows) != lanes * len(tiles) or lanes not in (ROWS, WIDE_ROWS):
        return f"'rows' has {len(rows)} lanes, expected {ROWS} or {WIDE_ROWS} for each of {len(tiles)} tiles"
    out_channels, group_channels, height, width = weight_shape
    words, real = columns.cpu().numpy(), np.sort(rows.cpu().numpy())
    if not np.array_equal(real[real >= 0], np.arange(out_channels)):
        return f"'rows' does not have each of the {out_channels} output channels once"
    padded = [_padded(count) for count in tiles[:, 1].clamp(0, len(words)).tolist()]
    next_column = 0
    for t, (first, count, value, most) in enumerate(tiles.tolist()):
        if first != next_column or count < 0 or first + max(count, padded[t]) > len(words):
            return f"tile {t} has columns [{first}, +{count}), expected them from {next_column} on, of {len(words)}"
        next_column += padded[t]
        if value < 0 or value % 8 or value + padded[t] * lanes > values:
            return f"tile {t} has values [{value}, +{padded[t] * lanes}), but there are {values}"
        if most != max(padded):
            return f"tile {t} says that tiles have {most} columns, expected {max(padded)}"
        own, behind = words[first : first + count], words[first + count : next_column]
        r, s, c = own >> ROW_SHIFT, own >> TAP_SHIFT & 15, own & LARGEST_CHANNELS - 1
        inside = (own >= 0) & (r < height) & (s < width) & (c < group_channels * groups)
        if not inside.all() or (own[1:] <= own[:-1]).any():
            return f"the columns of tile {t} are not ascending words of the weight {tuple(weight_shape)}"
        if (behind != PADDING_COLUMN).any():
            return f"the columns of tile {t} are not padded with {PADDING_COLUMN}"
    return None
