// The tables of a row tile that tiled_wgmma_kernel.h keeps in shared memory.
#pragma once

#include "tiled_wgmma_plan.h"

namespace fxsparse::cuda {

// Makes the tables of a row tile in shared memory: decoded columns (unless streamed), and where each kernel row's
// columns start. All producers call it.
template <class Tile>
__device__ __forceinline__ void load_tables(const WgmmaCall &call, const RowTile &tile, bool streamed, Column *columns,
                                            int *row_starts) {
  constexpr int kProducers = Tile::kPairs * kWarpgroup;
  const int thread = int(threadIdx.x) - kProducers, kernel_height = call.shape.kernel_height;
  const int32_t *words = call.weight.columns + tile.first_column;
  // Padding counts as a kernel row behind the last.
  const auto row_of = [&](int32_t word) { return min(max(kernel_row_of(word), 0), kernel_height); };
  constexpr int kAhead = 4; // loads at once, so that most tiles wait for one only
#pragma unroll 1
  for (int first = thread; first < tile.padded_columns; first += kAhead * kProducers) {
    int32_t own[kAhead], before[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int i = min(first + j * kProducers, tile.padded_columns - 1);
      own[j] = __ldg(words + i), before[j] = __ldg(words + max(i - 1, 0));
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int i = first + j * kProducers;
      if (i >= tile.padded_columns)
        break;
      if (!streamed)
        columns[i] = decode_column(call.shape, own[j]);
      const int own_row = row_of(own[j]);
#pragma unroll 1
      for (int r = i == 0 ? 0 : row_of(before[j]) + 1; r <= own_row; ++r)
        row_starts[r] = i;
      if (i == tile.padded_columns - 1)
#pragma unroll 1
        for (int r = own_row + 1; r <= kernel_height; ++r)
          row_starts[r] = tile.padded_columns;
    }
  }
}

} // namespace fxsparse::cuda
