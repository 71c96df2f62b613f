// Copies between a dense weight matrix and its packed values: unpack scatters, repack gathers.
//
// Tile: a CTA takes a slice of one panel's [columns][16 lanes] values, then of its lanes' residual weights.
// Roofline: memory; the packed side is read or written in order, the dense side in places.
// Limits: panels < 2^31. Both run once per weight change, never per inference. The places that the tables do
// not name are set to zero by the launch.
#pragma once

#include "launch.h"

#include <cassert>

namespace fxsparse::cuda {

inline constexpr int kPlacesThreads = 256;
// CTAs along one panel, so that a layer with few panels still fills the device.
inline constexpr int kPlacesSlices = 8;

enum class PlacesCopy { kUnpack, kRepack };

template <typename T, PlacesCopy Copy>
__global__ void __launch_bounds__(kPlacesThreads)
    copy_packed_places(const PackedTables tables, const int64_t out_channels, const int64_t row_columns,
                       const T *source, T *destination) {
  const int64_t panel = blockIdx.x;
  const int64_t start = static_cast<int64_t>(blockIdx.y) * kPlacesThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(kPlacesSlices) * kPlacesThreads;
  const int64_t *panel_row = tables.panels + panel * kPanelFields;
  const int64_t *lane_rows = tables.rows + panel * kLanes * kRowFields;
  const auto copy = [&](int64_t channel, int64_t column_at, int64_t value) {
    assert(column_at >= 0 && column_at < tables.column_count && value >= 0 && value < tables.value_count);
    const int64_t column = tables.columns[column_at];
    assert(channel < out_channels && column >= 0 && column < row_columns);
    const int64_t dense = channel * row_columns + column;
    if constexpr (Copy == PlacesCopy::kUnpack)
      destination[dense] = source[value];
    else
      destination[value] = source[dense];
  };

  const int64_t block_values = panel_row[kColumnCount] * kLanes;
  for (int64_t i = start; i < block_values; i += step) {
    const int64_t channel = lane_rows[i % kLanes * kRowFields + kOutChannel];
    if (channel >= 0)
      copy(channel, panel_row[kFirstColumn] + i / kLanes, panel_row[kFirstValue] + i);
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t *lane_row = lane_rows + lane * kRowFields;
    for (int64_t i = start; i < lane_row[kResidualCount]; i += step)
      copy(lane_row[kOutChannel], lane_row[kFirstResidual] + i, lane_row[kFirstResidualValue] + i);
  }
}

} // namespace fxsparse::cuda
