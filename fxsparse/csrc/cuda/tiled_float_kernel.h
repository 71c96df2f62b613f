// Sparse convolution of batch-innermost float32 images on CUDA cores: products and sums in float32, no TF32.
//
// Tile: 64 output channels x 256 positions a CTA, 8 x 8 sums a thread; stages of 16 columns, gathered rows and weights,
// by cp.async.
//
// Roofline: per column a thread reads 64 bytes of shared memory for 64 multiply-adds, a warp's reads being half
// broadcasts: the FP32 units bind.
#pragma once

#include "ptx.h"
#include "tiled_block.h"
#include "tiled_epilogue.h"

namespace fxsparse::cuda {

inline constexpr int kFloatThreads = 256, kFloatUnits = 64, kFloatStageColumns = 16, kFloatStages = 4;
inline constexpr int kFloatInputs = kFloatStageColumns * kFloatUnits * 4; // floats of a stage
inline constexpr int kFloatWeights = kFloatStageColumns * kBlockTileRows;
inline constexpr int kFloatSharedBytes = kFloatStages * (kFloatInputs + kFloatWeights) * 4;

__global__ void __launch_bounds__(kFloatThreads, 2) tiled_float_kernel(const TiledCall call) {
  extern __shared__ __align__(128) float stages_memory[];
  float *const inputs = stages_memory, *const weights = stages_memory + kFloatStages * kFloatInputs;
  const GatherShape &shape = call.shape;
  const TiledBlock block = block_of<kFloatUnits>(call);
  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const float4 *input = static_cast<const float4 *>(call.tensors.input);
  const int stages = max((block.tile.columns + kFloatStageColumns - 1) / kFloatStageColumns, 1);

  // Gathers: a unit of positions, and every fourth row of a stage. Weights: 4 rows of one column.
  const int unit = thread % kFloatUnits, row = thread / kFloatUnits;
  const Position position = position_of(shape, block.first_unit + unit);
  const int32_t *words = call.weight.columns + block.tile.first_column + row;
  const int64_t rows = call.weight.tile_rows;
  const float *values = static_cast<const float *>(call.weight.values) + block.tile.first_value + block.first_row +
                        thread / 16 * rows + thread % 16 * 4;
  const uint32_t input_at = shared_address(inputs) + thread * kUnitBytes;
  const uint32_t weight_at = shared_address(weights) + thread * kUnitBytes;
  ColumnWords<4, 4> next;
  next.load(words);
  const auto load_stage = [&](int stage) {
    if (stage < stages) {
      const int slot = stage % kFloatStages;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Column column = decode_column(shape, next.words[i]);
        const bool meets = position.meets(column);
        copy_unit_async(input_at + (slot * kFloatInputs + i * 4 * kFloatUnits * 4) * 4,
                        input + (meets ? position.base + column.offset : 0), meets);
      }
      copy_unit_async(weight_at + slot * kFloatWeights * 4, values + stage * kFloatStageColumns * rows, true);
      if (stage + 1 < stages)
        next.load(words + (stage + 1) * kFloatStageColumns);
    }
    commit_copies();
  };
#pragma unroll
  for (int stage = 0; stage < kFloatStages - 1; ++stage)
    load_stage(stage);

  // A warp has 32 rows x 64 positions; a thread 8 rows and two units, 8 units apart.
  const int first_row = warp % 2 * 32 + lane / 8 * 8, first_unit = warp / 2 * 16 + lane % 8;
  float sums[8][8] = {};
  for (int stage = 0; stage < stages; ++stage) {
    wait_for_copies<kFloatStages - 2>();
    __syncthreads();
    load_stage(stage + kFloatStages - 1);
    const float *a = weights + stage % kFloatStages * kFloatWeights + first_row;
    const float *b = inputs + stage % kFloatStages * kFloatInputs + first_unit * 4;
#pragma unroll
    for (int k = 0; k < kFloatStageColumns; ++k) {
      float w[8], x[8];
      *reinterpret_cast<float4 *>(w) = *reinterpret_cast<const float4 *>(a + k * kBlockTileRows);
      *reinterpret_cast<float4 *>(w + 4) = *reinterpret_cast<const float4 *>(a + k * kBlockTileRows + 4);
      *reinterpret_cast<float4 *>(x) = *reinterpret_cast<const float4 *>(b + k * kFloatUnits * 4);
      *reinterpret_cast<float4 *>(x + 4) = *reinterpret_cast<const float4 *>(b + k * kFloatUnits * 4 + 32);
#pragma unroll
      for (int m = 0; m < 8; ++m)
#pragma unroll
        for (int n = 0; n < 8; ++n)
          sums[m][n] = fmaf(w[m], x[n], sums[m][n]);
    }
  }

  const float *bias = static_cast<const float *>(call.tensors.bias);
  const float4 *add = static_cast<const float4 *>(call.tensors.add);
  float4 *output = static_cast<float4 *>(call.tensors.output);
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int stored = stored_at(shape, block.first_unit + first_unit + n * 8);
#pragma unroll
    for (int m = 0; m < 8; ++m) {
      const int channel = output_channel(shape, call.weight, block.first_lane + first_row + m);
      if (channel < 0 || stored < 0)
        continue;
      const uint32_t at = uint32_t(stored) + uint32_t(channel) * uint32_t(shape.units);
      const float shift = bias != nullptr ? __ldg(bias + channel) : 0.f;
      const float4 other = add != nullptr ? __ldg(add + at) : make_float4(0.f, 0.f, 0.f, 0.f);
      float values[4] = {sums[m][n * 4] + shift + other.x, sums[m][n * 4 + 1] + shift + other.y,
                         sums[m][n * 4 + 2] + shift + other.z, sums[m][n * 4 + 3] + shift + other.w};
      activate(call.activation, values);
      output[at] = make_float4(values[0], values[1], values[2], values[3]);
    }
  }
}

} // namespace fxsparse::cuda
