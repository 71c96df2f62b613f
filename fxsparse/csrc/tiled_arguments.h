// Checks tiled weights (fxsparse/ops/tiles.py), in the same words in every operator that takes them.
#pragma once

#include "conv2d_arguments.h"
#include "cuda/tiled_conv2d.h"

#include <algorithm>

namespace fxsparse {

inline cuda::TiledType tiled_type_of(const char *name, const Tensor &input) {
  switch (input.scalar_type()) {
  case ScalarType::BFloat16:
    return cuda::TiledType::kBFloat16;
  case ScalarType::Half:
    return cuda::TiledType::kHalf;
  default:
    STD_TORCH_CHECK(input.scalar_type() == ScalarType::Float, "'", name, "' has dtype ", toString(input.scalar_type()),
                    ", expected bfloat16, float16 or float32");
    return cuda::TiledType::kFloat;
  }
}

inline void check_int_vector(const char *name, const Tensor &table, const char *anchor_name, const Tensor &anchor) {
  check_same_device(name, table, anchor_name, anchor);
  check_vector(name, table);
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Int, "'", name, "' has dtype ", toString(table.scalar_type()),
                  ", expected Int");
}

// Sizes and types; what the tables hold is held against these on the device. Returns the rows of a tile.
inline int64_t check_tiled(const Tensor &values, const Tensor &columns, const Tensor &tiles, const Tensor &rows,
                           const char *anchor_name, const Tensor &anchor, int64_t out_channels) {
  check_vector("tile_values", values);
  check_like("tile_values", values, anchor_name, anchor);
  check_int_vector("tile_columns", columns, anchor_name, anchor);
  check_int_vector("tile_rows", rows, anchor_name, anchor);
  check_same_device("tiles", tiles, anchor_name, anchor);
  check_table("tiles", tiles, cuda::kTileFields);
  const int64_t count = tiles.size(0), lanes = rows.size(0);
  STD_TORCH_CHECK(lanes == 64 * count || lanes == 128 * count, "'tile_rows' has ", lanes,
                  " lanes, expected 64 or 128 for each of ", count, " tiles");
  STD_TORCH_CHECK(lanes >= out_channels, "'tile_rows' has ", lanes, " lanes, expected at least the ", out_channels,
                  " output channels");
  return lanes / std::max<int64_t>(count, 1);
}

} // namespace fxsparse
