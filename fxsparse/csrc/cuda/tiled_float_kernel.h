// Sparse convolution of batch-innermost float32 images on CUDA cores: products and sums in float32, no TF32.
//
// Tile: 64 output channels x 256 positions a CTA, 8 x 8 sums a thread; stages of 16 columns, gathered rows and weights,
// by cp.async. Where that makes too few tiles for the device, 64 x 64, and the CTA's threads share a stage's columns
// in four slices, whose sums are added in the end.
//
// Roofline: per column a thread reads 64 bytes of shared memory for 64 multiply-adds, a warp's reads being half
// broadcasts: the FP32 units bind.
#pragma once

#include "overlapping_launch.h"
#include "ptx.h"
#include "tiled_block.h"
#include "tiled_epilogue.h"

namespace fxsparse::cuda {

inline constexpr int kFloatThreads = 256;

template <int kSlices_> struct FloatTile {
  static constexpr int kSlices = kSlices_, kUnits = 64 / kSlices, kStages = 4;
  static constexpr int kStageColumns = kSlices == 1 ? 16 : 32;
  static constexpr int kInputs = kStageColumns * kUnits * 4; // floats of a stage
  static constexpr int kWeights = kStageColumns * kBlockTileRows;
  static constexpr int kRingBytes = kStages * (kInputs + kWeights) * 4;
  static constexpr int kSliceBytes = kSlices == 1 ? 0 : kFloatThreads * 64 * 4; // all sums, in the ring's place
  static constexpr int kSharedBytes = kRingBytes > kSliceBytes ? kRingBytes : kSliceBytes;
};

// Adds the slices' sums: the slice `own` gets those of its rows 2 `own` and 2 `own` + 1, into sums[0] and sums[1].
template <class Tile>
__device__ __forceinline__ void add_slices(float (&sums)[8][8], float4 *memory, int own, int thread_of_slice) {
  constexpr int kThreads = kFloatThreads / Tile::kSlices, kQuads = 16; // four sums each
  wait_for_copies<0>();
  __syncthreads();
#pragma unroll
  for (int m = 0; m < 8; ++m)
#pragma unroll
    for (int n = 0; n < 2; ++n)
      memory[(own * kQuads + m * 2 + n) * kThreads + thread_of_slice] =
          make_float4(sums[m][n * 4], sums[m][n * 4 + 1], sums[m][n * 4 + 2], sums[m][n * 4 + 3]);
  __syncthreads();
#pragma unroll
  for (int m = 0; m < 8 / Tile::kSlices; ++m)
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
      for (int slice = 0; slice < Tile::kSlices; ++slice) {
        const int quad = (own * (8 / Tile::kSlices) + m) * 2 + n;
        const float4 part = memory[(slice * kQuads + quad) * kThreads + thread_of_slice];
        total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
      }
      sums[m][n * 4] = total.x, sums[m][n * 4 + 1] = total.y, sums[m][n * 4 + 2] = total.z,
                  sums[m][n * 4 + 3] = total.w;
    }
}

template <class Tile> __global__ void __launch_bounds__(kFloatThreads, 2) tiled_float_kernel(const TiledCall call) {
  constexpr int kSlices = Tile::kSlices, kUnits = Tile::kUnits, kStageColumns = Tile::kStageColumns;
  constexpr int kRowStep = kFloatThreads / kUnits, kInputRows = kStageColumns / kRowStep;
  constexpr int kWeightRows = kStageColumns / 16; // of each thread and stage, 16 apart
  extern __shared__ __align__(128) float stages_memory[];
  float *const inputs = stages_memory, *const weights = stages_memory + Tile::kStages * Tile::kInputs;
  const GatherShape &shape = call.shape;
  const TiledBlock block = block_of<kUnits>(call);
  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const float4 *input = static_cast<const float4 *>(call.tensors.input);
  const int stages = max((block.tile.columns + kStageColumns - 1) / kStageColumns, 1);

  // Gathers: a unit of positions, and some rows of a stage. Weights: 4 rows of a column.
  const int unit = thread % kUnits, row = thread / kUnits;
  const Position position = position_of(shape, block.first_unit + unit);
  const int32_t *words = call.weight.columns + block.tile.first_column + row;
  const int64_t rows = call.weight.tile_rows;
  const float *values = static_cast<const float *>(call.weight.values) + block.tile.first_value + block.first_row +
                        thread / 16 * rows + thread % 16 * 4;
  const uint32_t input_at = shared_address(inputs) + thread * kUnitBytes;
  const uint32_t weight_at = shared_address(weights) + thread * kUnitBytes;
  ColumnWords<kInputRows, kRowStep> next;
  next.load(words);
  wait_for_earlier_kernels(); // all before reads the weight only
  const auto load_stage = [&](int stage) {
    if (stage < stages) {
      const int slot = stage % Tile::kStages;
#pragma unroll
      for (int i = 0; i < kInputRows; ++i) {
        const Column column = decode_column(shape, next.words[i]);
        const bool meets = position.meets(column);
        copy_unit_async(input_at + (slot * Tile::kInputs + i * kRowStep * kUnits * 4) * 4,
                        input + (meets ? position.base + column.offset : 0), meets);
      }
#pragma unroll
      for (int i = 0; i < kWeightRows; ++i)
        copy_unit_async(weight_at + (slot * Tile::kWeights + i * 16 * kBlockTileRows) * 4,
                        values + (stage * kStageColumns + i * 16) * rows, true);
      if (stage + 1 < stages)
        next.load(words + (stage + 1) * kStageColumns);
    }
    commit_copies();
  };
#pragma unroll
  for (int stage = 0; stage < Tile::kStages - 1; ++stage)
    load_stage(stage);

  // A warp has 32 rows x 64 positions of a slice's columns; a thread 8 rows and two units, 8 units apart.
  constexpr int kUnitBlocks = kUnits / 16, kSliceColumns = kStageColumns / kSlices;
  const int slice = warp / 2 / kUnitBlocks;
  const int first_row = warp % 2 * 32 + lane / 8 * 8, first_unit = warp / 2 % kUnitBlocks * 16 + lane % 8;
  float sums[8][8] = {};
  for (int stage = 0; stage < stages; ++stage) {
    wait_for_copies<Tile::kStages - 2>();
    __syncthreads();
    load_stage(stage + Tile::kStages - 1);
    const int slot = stage % Tile::kStages, first_column = slice * kSliceColumns;
    const float *a = weights + slot * Tile::kWeights + first_column * kBlockTileRows + first_row;
    const float *b = inputs + slot * Tile::kInputs + first_column * kUnits * 4 + first_unit * 4;
#pragma unroll
    for (int k = 0; k < kSliceColumns; ++k) {
      float w[8], x[8];
      *reinterpret_cast<float4 *>(w) = *reinterpret_cast<const float4 *>(a + k * kBlockTileRows);
      *reinterpret_cast<float4 *>(w + 4) = *reinterpret_cast<const float4 *>(a + k * kBlockTileRows + 4);
      *reinterpret_cast<float4 *>(x) = *reinterpret_cast<const float4 *>(b + k * kUnits * 4);
      *reinterpret_cast<float4 *>(x + 4) = *reinterpret_cast<const float4 *>(b + k * kUnits * 4 + 32);
#pragma unroll
      for (int m = 0; m < 8; ++m)
#pragma unroll
        for (int n = 0; n < 8; ++n)
          sums[m][n] = fmaf(w[m], x[n], sums[m][n]);
    }
  }

  constexpr int kRows = 8 / kSlices; // whose sums this thread has now
  if constexpr (kSlices > 1)
    add_slices<Tile>(sums, reinterpret_cast<float4 *>(stages_memory), slice, thread % (kFloatThreads / kSlices));
  const int own_row = kSlices == 1 ? first_row : first_row + slice * kRows;
  const float *bias = static_cast<const float *>(call.tensors.bias);
  const float4 *add = static_cast<const float4 *>(call.tensors.add);
  float4 *output = static_cast<float4 *>(call.tensors.output);
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const int stored = stored_at(shape, block.first_unit + first_unit + n * 8);
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      const int channel = output_channel(shape, call.weight, block.first_lane + own_row + m);
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
