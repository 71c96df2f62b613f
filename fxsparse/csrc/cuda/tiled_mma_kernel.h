// Sparse convolution of batch-innermost images on tensor cores by mma.sync, for every device of compute capability 8.0
// and later; no instruction here needs a newer one.
//
// Tile: 64 output channels x 128 positions a CTA, 8 warps of 32 x 32. Stages of 32 columns, gathered rows and weights,
// come by cp.async; positions are worked out once a CTA, columns are decoded as they are gathered.
//
// Roofline: 12 KB of shared memory written and 24 KB read a stage for 2^18 products: shared memory binds. Written to be
// right everywhere and measured on Hopper alone, where tiled_wgmma_kernel.h is used instead.
#pragma once

#include "ptx.h"
#include "tiled_block.h"
#include "tiled_epilogue.h"

#include <type_traits>

namespace fxsparse::cuda {

inline constexpr int kMmaThreads = 256, kMmaUnits = 16, kMmaStageColumns = 32, kMmaStages = 4;
inline constexpr int kMmaInputBytes = kMmaStageColumns * kMmaUnits * kUnitBytes;
inline constexpr int kMmaWeightBytes = kMmaStageColumns * kBlockTileRows * 2;
inline constexpr int kMmaSharedBytes = kMmaStages * (kMmaInputBytes + kMmaWeightBytes); // 48 KB: needs no permission

// D[16][8] += A[16][16] B[16][8].
template <typename T>
__device__ __forceinline__ void multiply_fragments(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <typename T> __global__ void __launch_bounds__(kMmaThreads, 2) tiled_mma_kernel(const TiledCall call) {
  extern __shared__ __align__(128) uint8_t shared[];
  const uint32_t inputs = shared_address(shared), weights = inputs + kMmaStages * kMmaInputBytes;
  const GatherShape &shape = call.shape;
  const TiledBlock block = block_of<kMmaUnits>(call);
  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const uint4 *input = static_cast<const uint4 *>(call.tensors.input);
  const int stages = max((block.tile.columns + kMmaStageColumns - 1) / kMmaStageColumns, 1);

  // Gathers: a unit of positions, and two rows of each stage. Weights: 16 bytes of one row.
  const int unit = thread % kMmaUnits, row = thread / kMmaUnits;
  const Position position = position_of(shape, block.first_unit + unit);
  const uint32_t input_at = inputs + row * (kMmaUnits * kUnitBytes) + (unit ^ (row % 8)) * kUnitBytes;
  const int32_t *words = call.weight.columns + block.tile.first_column + row;
  const int rows = int(call.weight.tile_rows);
  const uint4 *values = static_cast<const uint4 *>(call.weight.values) + block.tile.first_value / 8 + block.first_row +
                        thread / kBlockTileRows * rows + thread % kBlockTileRows;
  ColumnWords<2, 16> next;
  next.load(words);
  const auto load_stage = [&](int stage) {
    if (stage < stages) {
      const int slot = stage % kMmaStages;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Column column = decode_column(shape, next.words[i]);
        const bool meets = position.meets(column);
        copy_unit_async(input_at + slot * kMmaInputBytes + i * 16 * kMmaUnits * kUnitBytes,
                        input + (meets ? position.base + column.offset : 0), meets);
      }
      copy_unit_async(weights + slot * kMmaWeightBytes + thread * kUnitBytes,
                      values + int64_t(stage) * (kMmaStageColumns / 8) * rows, true);
      if (stage + 1 < stages)
        next.load(words + (stage + 1) * kMmaStageColumns);
    }
    commit_copies();
  };
#pragma unroll
  for (int stage = 0; stage < kMmaStages - 1; ++stage)
    load_stage(stage);

  const int first_row = warp % 2 * 32, first_unit = warp / 2 * 4; // of the warp's 32 x 32
  float sums[2][4][4] = {};
  for (int stage = 0; stage < stages; ++stage) {
    wait_for_copies<kMmaStages - 2>();
    __syncthreads();
    load_stage(stage + kMmaStages - 1);
    const uint32_t a_at = weights + stage % kMmaStages * kMmaWeightBytes + lane / 16 * (kBlockTileRows * 16) +
                          (first_row + lane % 16) * 16;
    const uint32_t b_row = inputs + stage % kMmaStages * kMmaInputBytes + lane % 16 * (kMmaUnits * kUnitBytes);
#pragma unroll
    for (int k = 0; k < kMmaStageColumns / 16; ++k) {
      uint32_t a[2][4], b[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m)
        load_matrices(a[m], a_at + k * 2 * (kBlockTileRows * 16) + m * 16 * 16);
#pragma unroll
      for (int n = 0; n < 2; ++n)
        load_transposed_matrices(b[n], b_row + k * 16 * (kMmaUnits * kUnitBytes) +
                                           ((first_unit + n * 2 + lane / 16) ^ (lane % 8)) * kUnitBytes);
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n)
          multiply_fragments<T>(sums[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
    }
  }
  wait_for_copies<0>();
  __syncthreads(); // the ring becomes [64 rows][16 units] of results

  const T *bias = static_cast<const T *>(call.tensors.bias);
  const uint32_t *add = static_cast<const uint32_t *>(call.tensors.add);
  const int tile_row = block.first_lane;
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int m_row = first_row + m * 16 + half * 8 + lane / 4;
      const int channel = output_channel(shape, call.weight, tile_row + m_row);
      const float shift = bias != nullptr && channel >= 0 ? widen(bias[channel]) : 0.f;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        float values[2] = {sums[m][n][half * 2] + shift, sums[m][n][half * 2 + 1] + shift};
        const int stored = stored_at(shape, block.first_unit + first_unit + n);
        if (add != nullptr && channel >= 0 && stored >= 0) {
          const int64_t at = uint32_t(stored) + uint32_t(channel) * uint32_t(shape.units);
          const float2 both = Pair<T>::unpack(__ldg(add + at * 4 + lane % 4));
          values[0] += both.x, values[1] += both.y;
        }
        activate_rounded(call.activation, values);
        uint32_t *to = reinterpret_cast<uint32_t *>(shared) + m_row * (kMmaUnits * 4) +
                       ((first_unit + n) ^ (m_row % 8)) * 4 + lane % 4;
        *to = Pair<T>::pack(values[0], values[1]);
      }
    }
  __syncthreads();
  const int stored = stored_at(shape, block.first_unit + unit);
  uint4 *output = static_cast<uint4 *>(call.tensors.output);
#pragma unroll
  for (int i = 0; i < kBlockTileRows / 16; ++i) {
    const int m_row = i * 16 + row, channel = output_channel(shape, call.weight, tile_row + m_row);
    if (channel >= 0 && stored >= 0)
      output[uint32_t(stored) + uint32_t(channel) * uint32_t(shape.units)] =
          reinterpret_cast<const uint4 *>(shared)[m_row * kMmaUnits + (unit ^ (m_row % 8))];
  }
}

} // namespace fxsparse::cuda
