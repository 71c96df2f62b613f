// Sparse convolution by gathers: the kernel, apart from its launch so that a host can compile it too.
//
// Tile: a CTA has one panel (16 output channels) x 128 output positions of the flattened N * Ho * Wo, a
// thread one position and its 16 sums in registers. Per chunk of columns the CTA puts their addresses and
// weights into shared memory, then every thread gathers one input element and does 16 multiply-adds per
// column.
//
// Roofline: per column and warp 4 shared 16-byte reads and 1 gather against 16 FMAs: the load pipe binds, at
// about 2/3 of the FP32 peak. No tensor cores: half and bfloat16 gain bandwidth only.
//
// Limits: ceil(N * Ho * Wo / 128) * panels < 2^31. Asserts keep wrong tables inside the tensors.
#pragma once

#include "launch.h"
#include "tap_gather.h"

#include <cassert>

namespace fxsparse::cuda {

inline constexpr int kConv2dThreads = 128;
// One column (or residual weight) is decoded by each thread.
inline constexpr int kChunk = kConv2dThreads;

template <typename T> struct AccumulatorOf {
  using Type = float;
};
template <> struct AccumulatorOf<double> {
  using Type = double;
};

// Written with comparisons that are false for NaN, so that NaN passes through as in torch.
template <typename Accumulator> FXSPARSE_DEVICE Accumulator activate(Activation activation, Accumulator value) {
  const Accumulator zero(0), six(6);
  switch (activation) {
  case Activation::kNone:
    return value;
  case Activation::kRelu:
    return value < zero ? zero : value;
  case Activation::kRelu6:
    return value < zero ? zero : (value > six ? six : value);
  case Activation::kSilu:
    return value / (Accumulator(1) + exp(-value));
  case Activation::kHardswish: {
    const Accumulator gate = value + Accumulator(3);
    return value * (gate < zero ? zero : (gate > six ? six : gate)) / six;
  }
  }
  return value;
}

template <typename T, bool ZeroPadding>
__global__ void __launch_bounds__(kConv2dThreads)
    conv2d_kernel(const Conv2dGeometry g, const PackedTables tables, const Conv2dTensors<T> tensors) {
  using Accumulator = typename AccumulatorOf<T>::Type;
  __shared__ Tap taps[kChunk];
  // Residual weights use the first kChunk entries.
  __shared__ __align__(16) Accumulator weights[kChunk * kLanes];
  __shared__ int64_t channels[kLanes];
  __shared__ int64_t residual_end[kLanes]; // counted over the panel

  const int thread = static_cast<int>(threadIdx.x);
  const uint32_t panel_count = static_cast<uint32_t>(tables.panel_count);
  // Panels are innermost: CTAs that run at the same time read the same inputs.
  const int64_t panel = blockIdx.x % panel_count;
  const int64_t wanted = static_cast<int64_t>(blockIdx.x / panel_count) * kConv2dThreads + thread;
  const int64_t positions = g.batch * g.out_height * g.out_width;
  // Threads past the end compute the last position again and store nothing: all must reach the barriers.
  const bool stores = wanted < positions;
  const OutputPosition position = output_position(g, stores ? wanted : positions - 1);
  const Window window = window_of_position<ZeroPadding>(g, position);
  const int64_t area = g.out_height * g.out_width;
  const int64_t stores_at = position.image * g.out_channels * area + position.pixel; // in channel 0

  const int64_t *panel_row = tables.panels + panel * kPanelFields;
  const int64_t first_column = panel_row[kFirstColumn], column_count = panel_row[kColumnCount],
                first_value = panel_row[kFirstValue];
  const int64_t first_channel = panel_row[kFirstChannel];
  const int64_t *lane_rows = tables.rows + panel * kLanes * kRowFields;
  const int64_t row_columns = g.group_channels * g.kernel_height * g.kernel_width;
  assert(first_column >= 0 && column_count >= 0 && first_column + column_count <= tables.column_count);
  assert(first_value >= 0 && first_value + column_count * kLanes <= tables.value_count);
  assert(first_channel >= 0 && first_channel + g.group_channels <= g.in_channels);

  if (thread < kLanes) {
    const int64_t *lane_row = lane_rows + thread * kRowFields;
    assert(lane_row[kOutChannel] < g.out_channels && lane_row[kResidualCount] >= 0);
    assert(lane_row[kFirstResidual] >= 0 && lane_row[kFirstResidual] + lane_row[kResidualCount] <= tables.column_count);
    assert(lane_row[kFirstResidualValue] >= 0 &&
           lane_row[kFirstResidualValue] + lane_row[kResidualCount] <= tables.value_count);
    channels[thread] = lane_row[kOutChannel];
    int64_t end = 0;
    for (int lane = 0; lane <= thread; ++lane)
      end += lane_rows[lane * kRowFields + kResidualCount];
    residual_end[thread] = end;
  }

  Accumulator sums[kLanes] = {};

  for (int64_t first = 0; first < column_count; first += kChunk) {
    const int size = static_cast<int>(column_count - first < kChunk ? column_count - first : kChunk);
    __syncthreads(); // the chunk before has been read
    if (thread < size) {
      const int32_t column = tables.columns[first_column + first + thread];
      assert(column >= 0 && column < row_columns);
      taps[thread] = tap_of_column<ZeroPadding>(g, first_channel, column);
    }
    const T *chunk_values = tensors.values + first_value + first * kLanes;
    for (int i = thread; i < size * kLanes; i += kConv2dThreads)
      weights[i] = static_cast<Accumulator>(chunk_values[i]);
    __syncthreads();
#pragma unroll 4
    for (int k = 0; k < size; ++k) {
      const Accumulator x = gather<Accumulator, ZeroPadding>(g, tensors.input, window, taps[k]);
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane)
        sums[lane] += weights[k * kLanes + lane] * x;
    }
  }

  __syncthreads(); // residual_end is written, the last chunk has been read
  const int64_t residuals = residual_end[kLanes - 1];
  for (int64_t first = 0; first < residuals; first += kChunk) {
    const int64_t entry = first + thread;
    if (entry < residuals) {
      int lane = 0;
      while (entry >= residual_end[lane])
        ++lane;
      const int64_t *lane_row = lane_rows + lane * kRowFields;
      const int64_t nth = entry - (residual_end[lane] - lane_row[kResidualCount]);
      const int32_t column = tables.columns[lane_row[kFirstResidual] + nth];
      assert(column >= 0 && column < row_columns);
      taps[thread] = tap_of_column<ZeroPadding>(g, first_channel, column);
      weights[thread] = static_cast<Accumulator>(tensors.values[lane_row[kFirstResidualValue] + nth]);
    }
    __syncthreads();
    int k = 0;
#pragma unroll 1
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t lane_end = residual_end[lane] - first;
      // Negative where an earlier chunk ended the lane.
      const int end = static_cast<int>(lane_end < 0 ? 0 : (lane_end < kChunk ? lane_end : kChunk));
      Accumulator sum(0);
#pragma unroll 2 // with 4, double spills on sm_90
      for (; k < end; ++k) {
        sum += weights[k] * gather<Accumulator, ZeroPadding>(g, tensors.input, window, taps[k]);
      }
      // Not sums[lane]: an array indexed at run time would live in local memory.
#pragma unroll
      for (int other = 0; other < kLanes; ++other) {
        sums[other] += other == lane ? sum : Accumulator(0);
      }
    }
    __syncthreads(); // the chunk has been read
  }

  if (!stores)
    return;
#pragma unroll
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t channel = channels[lane];
    if (channel < 0)
      continue;
    Accumulator value = sums[lane];
    if (tensors.bias != nullptr)
      value += static_cast<Accumulator>(tensors.bias[channel]);
    const int64_t index = stores_at + channel * area;
    if (tensors.add != nullptr)
      value += static_cast<Accumulator>(tensors.add[index]);
    tensors.output[index] = static_cast<T>(activate(g.activation, value));
  }
}

} // namespace fxsparse::cuda
