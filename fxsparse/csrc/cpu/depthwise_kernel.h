// The depthwise kernel: each row of the weight matrix is a small kernel on one plane, which is read where it lies.
//
// Positions in lanes, taps unrolled. A tap costs a load and an FMA; at the borders the loads are masked, which only
// AVX-512 does for nothing, so that no padded copy of the plane is needed.
#pragma once

#include "cpu/activation.h"
#include "cpu/gather_input.h"

namespace fxsparse::FXSPARSE_ISA {

// One vector of columns, from `x` on, down the plane. K: taps along each axis; S: the stride. Full: all its lanes lie
// inside the plane for every tap.
template <int K, int S, bool Full, class A>
void depthwise_columns(const Conv &conv, const A *weights, const A *input, int64_t x, A bias, A *output, const A *add) {
  constexpr int N = kLanes<A>;
  const int64_t width = conv.x.input, left = x * S - conv.x.before;
  const int valid = int(minimum(N, conv.out_width - x));
  int first[K], last[K]; // lanes that lie inside
  for (int s = 0; s < K; ++s) {
    const int64_t cell = left + s;
    first[s] = int(maximum(0, (S - 1 - cell) / S));
    last[s] = int(minimum(valid, (width - cell + S - 1) / S));
    if (first[s] >= last[s])
      first[s] = last[s] = N; // none
  }
  Vec<A> weight[K * K];
#pragma GCC unroll 25
  for (int t = 0; t < K * K; ++t)
    weight[t] = broadcast(weights[t]);
  for (int64_t y = 0; y < conv.out_height; ++y) {
    const int64_t top = y * S - conv.y.before;
    Vec<A> sum = broadcast(bias);
#pragma GCC unroll 5
    for (int r = 0; r < K; ++r) {
      if (uint64_t(top + r) >= uint64_t(conv.y.input)) // negative ones, too
        continue;
      const A *cells = input + (top + r) * width + left;
#pragma GCC unroll 5
      for (int s = 0; s < K; ++s) {
        Vec<A> cell;
        if constexpr (S == 2)
          cell = load_every_second(cells + s, Full ? 0 : first[s], Full ? N : last[s]);
        else
          cell = Full ? load(cells + s) : load_lanes(cells + s, first[s], last[s]);
        sum += cell * weight[r * K + s];
      }
    }
    const int64_t at = y * conv.out_width + x;
    if (add != nullptr)
      sum += load_lanes(add + at, 0, valid);
    store_lanes(output + at, activate<A>(sum, conv.shape.activation), 0, valid);
  }
}

// One plane.
template <int K, int S, class A>
void depthwise_plane(const Conv &conv, const A *weights, const A *input, A bias, A *output, const A *add) {
  constexpr int N = kLanes<A>;
  for (int64_t x = 0; x < conv.out_width; x += N) {
    const int64_t left = x * S - conv.x.before;
    if (x + N <= conv.out_width && left >= 0 && left + K - 1 + S * (N - 1) < conv.x.input)
      depthwise_columns<K, S, true>(conv, weights, input, x, bias, output, add);
    else
      depthwise_columns<K, S, false>(conv, weights, input, x, bias, output, add);
  }
}

// The rows of a unit, for one image.
template <class A>
void run_depthwise(const Conv &conv, const Unit &unit, const void *input, void *output, const void *add) {
  const A *values = (const A *)conv.values;
  const bool small = conv.shape.kernel[0] == 3, dense = conv.x.stride == 1;
  const auto plane = small ? (dense ? depthwise_plane<3, 1, A> : depthwise_plane<3, 2, A>)
                           : (dense ? depthwise_plane<5, 1, A> : depthwise_plane<5, 2, A>);
  int64_t rows = conv.shape.out_channels / conv.shape.channels; // of a channel: none is looked for behind them
  for (int64_t p = unit.first_panel; p < unit.first_panel + unit.panels; ++p) {
    const int64_t *panel = conv.panels + p * kPanelFields;
    for (int64_t lane = 0; lane < kPanelLanes && rows > 0; ++lane) {
      const int64_t *row = conv.rows + (p * kPanelLanes + lane) * kRowFields, channel = row[kOutChannel];
      if (channel < 0)
        continue;
      --rows;
      A weights[kMostTaps] = {};
      for (int64_t k = 0; k < panel[kColumnCount]; ++k)
        weights[conv.offsets[panel[kFirstColumn] + k]] = values[panel[kFirstValue] + k * kPanelLanes + lane];
      for (int64_t k = 0; k < row[kResidualCount]; ++k)
        weights[conv.offsets[row[kFirstResidual] + k]] = values[row[kFirstResidualValue] + k];
      plane(conv, weights, (const A *)input + panel[kFirstChannel] * conv.shape.input_plane,
            conv.bias ? ((const A *)conv.bias)[channel] : A(0), (A *)output + channel * conv.shape.output_plane,
            add ? (const A *)add + channel * conv.shape.add_plane : nullptr);
    }
  }
}

} // namespace fxsparse::FXSPARSE_ISA
