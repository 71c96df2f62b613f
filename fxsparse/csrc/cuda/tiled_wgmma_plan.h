// How tiled_wgmma_kernel.h uses an SM: its tiles, its shared memory, and what each CTA computes.
#pragma once

#include "tiled_gather.h"

namespace fxsparse::cuda {

inline constexpr int kWarpgroup = 128;
inline constexpr int kBlockRows = 64; // of one wgmma
inline constexpr int kSubTile = 64;   // positions in one swizzled row of 128 bytes
// Of one CTA, or of each of two on an SM.
inline constexpr int kSharedBytes = 227 * 1024, kHalfSharedBytes = 113 * 1024;
inline constexpr int kMostStages = 8, kFewestResidentStages = 3;
inline constexpr int kConsumerRegisters = 184, kProducerRegisters = 72;
// What a tile costs besides its columns, in columns: shares the tiles out over the CTAs.
inline constexpr int kTileOverhead = 48;

template <int kPositions_, int kRowBlocks_, int kPairs_, int kStageColumns_> struct WgmmaTile {
  static constexpr int kPositions = kPositions_, kRowBlocks = kRowBlocks_, kPairs = kPairs_;
  static constexpr int kThreads = 2 * kPairs * kWarpgroup; // consumers, then producers
  static constexpr int kSharedBytes = kPairs == 2 ? cuda::kSharedBytes : kHalfSharedBytes;
  static constexpr int kRows = kBlockRows * kRowBlocks;
  static constexpr int kUnits = kPositions / 8;
  // Of a tile that is pooled: its units are the first positions of so many windows, then the second ones, and so on.
  static constexpr int kPooledUnits = kUnits / 4;
  static constexpr int kSubTiles = kPositions / kSubTile;
  static constexpr int kStageColumns = kStageColumns_;
  static constexpr int kInputBytes = kStageColumns * kPositions * 2;
  static constexpr int kWeightBytes = kStageColumns * kRows * 2;
  // Added tensors come through the ring too.
  static constexpr int kAddRows = kInputBytes / (kPositions * 2), kAddStages = kRows / kAddRows;
};

// What a CTA computes: from position tile `first` of row tile `first_row_tile` on, in steps of `step`, through the row
// tiles between, until before position tile `end` of row tile `last_row_tile` (none: less than the first).
struct CtaShare {
  int first_row_tile, first, last_row_tile, end, step;
  int most_columns; // of any row tile, padded
};

// Shared memory behind the rings (and the weights that stay).
template <class Tile> struct WgmmaFixed {
  uint64_t full[Tile::kPairs][kMostStages], empty[Tile::kPairs][kMostStages];
  uint64_t weights_full, weights_empty;
  int row_starts[kMaxKernel + 1];                                   // columns of the row tile before each kernel row
  int row_at[Tile::kPairs][Tile::kRows];                            // where a row's channel begins, or -1
  CtaShare shares[Tile::kThreads / 32];                             // of each warp its own copy
  alignas(128) uint8_t staging[Tile::kPairs][4][16 * kSubTile * 2]; // of a consumer's warps
};

template <class Tile>
inline constexpr int kRingBytes = (Tile::kSharedBytes - int(sizeof(WgmmaFixed<Tile>))) / 1024 * 1024;

// How the shared memory before it is used: rings from 0 on, then weights and columns where they stay.
struct WgmmaLayout {
  bool streamed;
  int stages, stage_bytes, weights, columns;
};

template <class Tile> __device__ __forceinline__ WgmmaLayout wgmma_layout(int most_columns) {
  constexpr int kBytes = kRingBytes<Tile>;
  const int column_bytes = Tile::kRows * 2 + int(sizeof(Column));
  const int room = kBytes - min(most_columns, kBytes / column_bytes) * column_bytes;
  const int resident = most_columns > kBytes / column_bytes ? 0 : room / (Tile::kPairs * Tile::kInputBytes);
  WgmmaLayout layout;
  layout.streamed = resident < kFewestResidentStages;
  layout.stage_bytes = Tile::kInputBytes + (layout.streamed ? Tile::kWeightBytes : 0);
  layout.stages = min(layout.streamed ? kBytes / (Tile::kPairs * layout.stage_bytes) : resident, kMostStages);
  layout.weights = Tile::kPairs * layout.stages * layout.stage_bytes;
  layout.columns = layout.weights + most_columns * Tile::kRows * 2;
  return layout;
}

struct WgmmaCall {
  GatherShape shape;
  TiledWeight weight;
  TiledTensors tensors;
  Activation activation;
};

// A slot of a ring and the parity of its turn.
struct RingTurn {
  int slot = 0, parity = 0;

  __device__ __forceinline__ void advance(int stages) {
    if (++slot == stages) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// A range [first, end).
struct Range {
  int first, end;
};

__device__ __forceinline__ Range position_tiles_of(const CtaShare &share, int row_tile, int position_tiles) {
  return {row_tile == share.first_row_tile ? share.first : 0,
          row_tile == share.last_row_tile ? share.end : position_tiles};
}

// Stored units of a position tile: all that it computes, or a fourth of them.
template <class Tile> __host__ __device__ __forceinline__ int stored_units(const GatherShape &shape) {
  return shape.window == 1 ? Tile::kUnits : Tile::kPooledUnits;
}

// The stages of a row tile that hold a kernel row which a tile's positions meet; at least one, so that sums are
// written.
template <class Tile>
__device__ __forceinline__ Range stages_of(const GatherShape &shape, const int *row_starts, int tile) {
  const int units = stored_units<Tile>(shape);
  const TapRange rows = kernel_rows_met(shape, tile * units, tile * units + units - 1);
  const int all = max((row_starts[shape.kernel_height] + Tile::kStageColumns - 1) / Tile::kStageColumns, 1);
  const int first = min(row_starts[rows.first] / Tile::kStageColumns, all - 1);
  const int end = (row_starts[rows.last] + Tile::kStageColumns - 1) / Tile::kStageColumns;
  return {first, max(min(end, all), first + 1)};
}

// Where a CTA's run begins on the line of all tiles, {row tile, position tile}, at the first tile whose middle is not
// before `at`. One warp calls it with 32 row tiles from `base` on, one a lane; row < 0: behind them all.
struct TilePoint {
  int row, tile;
};

__device__ __forceinline__ TilePoint point_at(float at, float start, float cost, int base, bool real,
                                              int position_tiles) {
  const float tiles = ceilf(__fdividef(at - start, cost) - 0.5f);
  const int tile = tiles <= 0 ? 0 : tiles >= position_tiles ? position_tiles : int(tiles);
  const uint32_t found = __ballot_sync(~0u, real && tile < position_tiles);
  const int lane = found == 0 ? 0 : __ffs(found) - 1;
  return {found == 0 ? -1 : base + lane, __shfl_sync(~0u, tile, lane)};
}

// One warp works out what the CTA does. A CTA gets a run of the line of all tiles, by cost: a row tile's columns begin
// where those before it end, so its place on the line is known without a sum. Few row tiles of like cost get CTAs of
// their own instead, which walk the positions side by side: what one CTA has read others find in L2. Rounding moves a
// border for both of its neighbours alike. Where there are as many CTAs as tiles there is nothing to work out.
__device__ __forceinline__ CtaShare share_tiles(const TiledWeight &weight, int position_tiles) {
  const int lane = int(threadIdx.x) % 32, count = int(weight.tile_count), grid = int(gridDim.x), cta = int(blockIdx.x);
  if (position_tiles * count == grid) { // one tile each
    const int own = cta % count, first = cta / count;
    return {own, first, own, first + 1, 1, row_tile(weight, own).most_columns};
  }
  const float total = float(weight.column_count) + float(kTileOverhead) * count;
  const float per_cta = total * position_tiles / grid;
  TilePoint first{-1, 0}, end{-1, 0};
  int most_columns = 0;
#pragma unroll 1
  for (int base = 0; base < count && end.row < 0; base += 32) {
    const int i = base + lane;
    const bool real = i < count;
    const RowTile tile = row_tile(weight, real ? i : 0);
    if (base == 0)
      most_columns = __shfl_sync(~0u, tile.most_columns, 0);
    const float cost = float(tile.padded_columns + kTileOverhead);
    if (count <= 4 && grid % count == 0) {
      const bool alike = abs(tile.padded_columns - __shfl_sync(~0u, tile.padded_columns, 0)) <= kColumnStep;
      if (__all_sync(~0u, alike || !real)) {
        const int own = cta % count;
        return {own, cta / count, own, position_tiles, grid / count, most_columns};
      }
    }
    const float start = (float(tile.first_column) + float(kTileOverhead) * i) * position_tiles;
    if (first.row < 0)
      first = point_at(per_cta * cta, start, cost, base, real, position_tiles);
    if (cta + 1 < grid)
      end = point_at(per_cta * (cta + 1), start, cost, base, real, position_tiles);
  }
  if (first.row < 0)
    return {0, 0, -1, 0, 1, most_columns};
  if (end.row < 0)
    end = {count - 1, position_tiles};
  else if (end.tile == 0)
    end = {end.row - 1, position_tiles};
  return {first.row, first.tile, end.row, end.tile, 1, most_columns};
}

} // namespace fxsparse::cuda
