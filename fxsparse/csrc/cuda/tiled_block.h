// Which part of a convolution a CTA of the kernels that are not persistent computes: 64 output channels of one row tile
// times some units of positions. Row tiles are innermost: CTAs that run at the same time read the same inputs.
#pragma once

#include "tiled_gather.h"

#include <climits>

namespace fxsparse::cuda {

inline constexpr int kBlockTileRows = 64;

struct TiledCall {
  GatherShape shape;
  TiledWeight weight;
  TiledTensors tensors;
  Activation activation;
};

struct TiledBlock {
  RowTile tile;
  int first_row;  // of the row tile's rows: 0 or 64
  int first_lane; // of all rows
  int first_unit; // of positions
};

// 0: too many CTAs for a grid.
inline unsigned tiled_grid(const GatherShape &shape, const TiledWeight &weight, int units) {
  const int64_t row_parts = weight.tile_count * (weight.tile_rows / kBlockTileRows);
  const int64_t position_tiles = (int64_t(shape.out_units) + units - 1) / units;
  return row_parts <= INT_MAX / position_tiles ? unsigned(row_parts * position_tiles) : 0;
}

#ifdef __CUDACC__

template <int kUnits> __device__ __forceinline__ TiledBlock block_of(const TiledCall &call) {
  const uint32_t halves = uint32_t(call.weight.tile_rows) / kBlockTileRows;
  const uint32_t row_parts = uint32_t(call.weight.tile_count) * halves;
  const uint32_t part = blockIdx.x % row_parts;
  return {row_tile(call.weight, part / halves), int(part % halves) * kBlockTileRows, int(part) * kBlockTileRows,
          int(blockIdx.x / row_parts) * kUnits};
}

// The columns that some threads gather, `kStep` apart, a stage ahead of the stage they are for.
template <int kCount, int kStep> struct ColumnWords {
  int32_t words[kCount];

  __device__ __forceinline__ void load(const int32_t *from) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      words[i] = __ldg(from + i * kStep);
  }
};

#endif // __CUDACC__

} // namespace fxsparse::cuda
