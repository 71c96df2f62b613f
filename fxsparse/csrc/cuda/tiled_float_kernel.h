// Sparse convolution of batch-innermost float32 images: on CUDA cores, products and sums in float32; or where TF32 is
// allowed on tensor cores, with products of rounded factors and sums in float32.
//
// Tile: 64 output channels x 256 positions a CTA; stages of 16 columns, gathered rows and weights, by cp.async. Where
// that makes too few tiles for the device, 64 x 128 or 64 x 64, and the CTA's warps share a stage's columns in slices,
// whose sums are added in the end. Columns are decoded once a CTA, a stage ahead of their gathers.
// tiled_float_product.h has what a warp computes.
#pragma once

#include "overlapping_launch.h"
#include "tiled_block.h"
#include "tiled_epilogue.h"
#include "tiled_float_product.h"

namespace fxsparse::cuda {

// The ring of stages with their decoded columns; in its place, in the end, the sums [slices][64 rows][pitch].
template <class Product> struct FloatMemory {
  static constexpr int kStages = 4;
  static constexpr int kInputFloats = Product::kStageColumns * Product::kInputPitch; // of a stage
  static constexpr int kRingBytes = kStages * (kInputFloats + Product::kWeightFloats) * 4;
  static constexpr int kTableBytes = kStages * Product::kStageColumns * int(sizeof(Column));
  static constexpr int kSumsPitch = Product::kUnits * 4 + 4; // no two threads that store at once meet in a bank
  static constexpr int kSumsBytes = Product::kSlices * kBlockTileRows * kSumsPitch * 4;
  static constexpr int kSharedBytes = kRingBytes + kTableBytes > kSumsBytes ? kRingBytes + kTableBytes : kSumsBytes;
};

// Adds the slices' sums and finishes them, a unit at a time, side by side in memory. What takes code (activations) is
// there four times, not once for each of a thread's 64 sums: instruction fetches would take longer than all the rest.
template <class Product>
__device__ __forceinline__ void store_sums(const TiledCall &call, int first_unit, const float *sums,
                                           const int *channels, const float *biases) {
  constexpr int kUnits = Product::kUnits, kRowStep = kFloatThreads / kUnits, kAtOnce = 4;
  constexpr int kPitch = FloatMemory<Product>::kSumsPitch;
  const int unit = int(threadIdx.x) % kUnits, row = int(threadIdx.x) / kUnits;
  const int stored = stored_at(call.shape, first_unit + unit);
  if (stored < 0)
    return;
  const float4 *add = static_cast<const float4 *>(call.tensors.add);
  float4 *output = static_cast<float4 *>(call.tensors.output);
#pragma unroll 1
  for (int first = row; first < kBlockTileRows; first += kAtOnce * kRowStep) {
    float4 others[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int channel = channels[first + i * kRowStep];
      others[i] = make_float4(0.f, 0.f, 0.f, 0.f);
      if (add != nullptr && channel >= 0)
        others[i] = __ldg(add + (uint32_t(stored) + uint32_t(channel) * uint32_t(call.shape.units)));
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int channel = channels[first + i * kRowStep];
      const float shift = biases[first + i * kRowStep];
      float values[4] = {others[i].x + shift, others[i].y + shift, others[i].z + shift, others[i].w + shift};
#pragma unroll
      for (int slice = 0; slice < Product::kSlices; ++slice) {
        const float4 part = *reinterpret_cast<const float4 *>(
            sums + (slice * kBlockTileRows + first + i * kRowStep) * kPitch + unit * 4);
        values[0] += part.x, values[1] += part.y, values[2] += part.z, values[3] += part.w;
      }
      activate(call.activation, values);
      if (channel >= 0)
        output[uint32_t(stored) + uint32_t(channel) * uint32_t(call.shape.units)] =
            make_float4(values[0], values[1], values[2], values[3]);
    }
  }
}

template <class Product> __global__ void __launch_bounds__(kFloatThreads, 2) tiled_float_kernel(const TiledCall call) {
  using Memory = FloatMemory<Product>;
  constexpr int kStages = Memory::kStages, kUnits = Product::kUnits;
  constexpr int kStageColumns = Product::kStageColumns, kRowStep = kFloatThreads / kUnits;
  extern __shared__ __align__(128) float shared[];
  __shared__ int channels[kBlockTileRows];
  __shared__ float biases[kBlockTileRows];
  float *const inputs = shared, *const weights = inputs + kStages * Memory::kInputFloats;
  Column *const table = reinterpret_cast<Column *>(weights + kStages * Product::kWeightFloats);
  const GatherShape &shape = call.shape;
  const TiledBlock block = block_of<kUnits>(call);
  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const float4 *input = static_cast<const float4 *>(call.tensors.input);
  const int stages = max((block.tile.columns + kStageColumns - 1) / kStageColumns, 1);
  const int columns = stages * kStageColumns; // padding fills the last stage

  // Gathers: a unit of positions, and some columns of a stage. A column is decoded by the thread of its number.
  const int unit = thread % kUnits, row = thread / kUnits;
  const int32_t *words = call.weight.columns + block.tile.first_column;
  const int64_t tile_rows = call.weight.tile_rows;
  const float *values = static_cast<const float *>(call.weight.values) + block.tile.first_value + block.first_row;
  const uint32_t input_at = shared_address(inputs + row * Product::kInputPitch + unit * 4);
  static_assert(kStages * kStageColumns <= kFloatThreads);
  if (thread < kStages * kStageColumns && thread < columns)
    table[thread] = decode_column(shape, __ldg(words + thread));
  int next = kStages * kStageColumns + thread; // what this thread decodes next, in the first stage's place
  int32_t word = thread < kStageColumns && next < columns ? __ldg(words + next) : kPaddingColumn;
  if (thread >= kFloatThreads - kBlockTileRows) {
    const int own = thread - (kFloatThreads - kBlockTileRows);
    const int channel = output_channel(shape, call.weight, block.first_lane + own);
    const float *bias = static_cast<const float *>(call.tensors.bias);
    channels[own] = channel;
    biases[own] = bias != nullptr && channel >= 0 ? __ldg(bias + channel) : 0.f;
  }
  const Position position = position_of(shape, block.first_unit + unit);
  __syncthreads();
  wait_for_earlier_kernels();              // all before reads the weight only
  const auto load_stage = [&](int stage) { // one after the other
    if (stage < stages) {
      const int slot = stage % kStages;
      const uint2 *decoded = reinterpret_cast<const uint2 *>(table + slot * kStageColumns + row);
      uint2 own[kStageColumns / kRowStep]; // all are loaded before the first is waited for
#pragma unroll
      for (int i = 0; i < kStageColumns / kRowStep; ++i)
        own[i] = decoded[i * kRowStep];
#pragma unroll
      for (int i = 0; i < kStageColumns / kRowStep; ++i) {
        const bool meets = position.meets({own[i].x, own[i].y});
        copy_unit_async(input_at + (slot * Memory::kInputFloats + i * kRowStep * Product::kInputPitch) * 4,
                        input + (meets ? position.base + own[i].x : 0), meets);
      }
      Product::copy_weights(weights + slot * Product::kWeightFloats, values, tile_rows);
      values += kStageColumns * tile_rows;
    }
    commit_copies();
  };
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage)
    load_stage(stage);

  float sums[Product::kRows][Product::kRuns][Product::kRun] = {};
  for (int stage = 0; stage < stages; ++stage) {
    const int slot = stage % kStages;
    wait_for_copies<kStages - 2>();
    Product::prepare_weights(weights + slot * Product::kWeightFloats);
    __syncthreads();
    load_stage(stage + kStages - 1);
    if (thread < kStageColumns && next < columns) { // this stage's columns were read long ago
      table[slot * kStageColumns + thread] = decode_column(shape, word);
      next += kStageColumns;
      word = next < columns ? __ldg(words + next) : kPaddingColumn;
    }
    Product::multiply(sums, weights + slot * Product::kWeightFloats, inputs + slot * Memory::kInputFloats, warp, lane);
  }

  wait_for_copies<0>();
  __syncthreads(); // the ring becomes the sums
  float *const own = shared + Product::slice(warp) * kBlockTileRows * Memory::kSumsPitch;
#pragma unroll
  for (int m = 0; m < Product::kRows; ++m)
#pragma unroll
    for (int n = 0; n < Product::kRuns; ++n) {
      float *to = own + Product::row(m, warp, lane) * Memory::kSumsPitch + Product::position(n, warp, lane);
      if constexpr (Product::kRun == 4)
        *reinterpret_cast<float4 *>(to) = make_float4(sums[m][n][0], sums[m][n][1], sums[m][n][2], sums[m][n][3]);
      else
        *reinterpret_cast<float2 *>(to) = make_float2(sums[m][n][0], sums[m][n][1]);
    }
  __syncthreads();
  store_sums<Product>(call, block.first_unit, shared, channels, biases);
}

} // namespace fxsparse::cuda
