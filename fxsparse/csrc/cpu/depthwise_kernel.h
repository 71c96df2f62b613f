// The depthwise kernel: each row of the weight matrix is a small kernel on one plane, which is read where it lies.
//
// Positions in lanes, taps unrolled, several rows of the output in the making: a row of the input is loaded once for
// all that need it, and a tap costs an FMA. At the borders the loads are masked, which AVX-512 and AVX2 do for nothing,
// so that no padded copy of the plane is needed.
#pragma once

#include "cpu/activation.h"
#include "cpu/gather_input.h"

namespace fxsparse::FXSPARSE_ISA {

// Lanes of each tap that lie inside the plane, and of the output.
template <class A, int K> struct TapLanes {
  int first[K], last[K], valid;
  Lanes<A> inside[K];
};

template <int K, int S, class A> inline TapLanes<A, K> find_lanes(const Conv &conv, int64_t x) {
  constexpr int N = kLanes<A>;
  TapLanes<A, K> lanes;
  lanes.valid = int(minimum(N, conv.out_width - x));
  for (int s = 0; s < K; ++s) {
    const int64_t cell = x * S - conv.x.before + s;
    lanes.first[s] = int(maximum(0, (S - 1 - cell) / S));
    lanes.last[s] = int(minimum(lanes.valid, (conv.x.input - cell + S - 1) / S));
    if (lanes.first[s] >= lanes.last[s])
      lanes.first[s] = lanes.last[s] = N; // none
    lanes.inside[s] = Lanes<A>::of(lanes.first[s], lanes.last[s]);
  }
  return lanes;
}

// What each tap of a row reads, from `cells` on. Full: all lanes lie inside.
template <int K, int S, bool Full, class A>
inline void load_taps(const A *cells, const TapLanes<A, K> &lanes, Vec<A> *x) {
  constexpr int N = kLanes<A>;
  if constexpr (S == 2 && Full) {
#pragma GCC unroll 5
    for (int s = 0; s < K; s += 2) {
      const bool pair = s + 1 < K; // else the very last element may lie outside
      const Vec<A> low = load(cells + s), high = pair ? load(cells + s + N) : load_lanes(cells + s + N, 0, N - 1);
      x[s] = every_second<A, 0>(low, high, std::make_index_sequence<N>());
      if (pair)
        x[s + 1] = every_second<A, 1>(low, high, std::make_index_sequence<N>());
    }
  } else {
#pragma GCC unroll 5
    for (int s = 0; s < K; ++s)
      if constexpr (S == 2)
        x[s] = load_every_second(cells + s, lanes.first[s], lanes.last[s]);
      else
        x[s] = Full ? load(cells + s) : load_lanes(cells + s, lanes.inside[s]);
  }
}

// One vector of columns, from `x` on, down the plane. K: taps along each axis; S: the stride. `rows`: those that are
// read, of the first plane, null where zeros are; this one is `plane` elements on.
template <int K, int S, bool Full, class A>
void depthwise_columns(const Conv &conv, const A *weights, const A *const *rows, int64_t plane, int64_t x, A bias,
                       A *output, const A *add) {
  constexpr int D = (K - 1) / S + 1; // rows of the output that a row of the input is part of
  const int64_t offset = plane + x * S - conv.x.before;
  const TapLanes<A, K> lanes = find_lanes<K, S, A>(conv, x);
  Vec<A> weight[K * K], sum[D];
#pragma GCC unroll 25
  for (int t = 0; t < K * K; ++t)
    weight[t] = broadcast(weights[t]);
  for (int d = 0; d < D; ++d)
    sum[d] = broadcast(bias);
  // Step y reads the last rows that row y of the output needs. The steps before row 0 only begin sums.
  for (int64_t y = 1 - D; y < conv.out_height; ++y) {
#pragma GCC unroll 2
    for (int q = 0; q < S; ++q) {
      const int64_t row = S * y + K - S + q;
      if (row < 0 || rows[row] == nullptr)
        continue;
      Vec<A> cells[K];
      load_taps<K, S, Full>(rows[row] + offset, lanes, cells);
#pragma GCC unroll 5
      for (int d = 0; d < D; ++d) {
        const int r = K - S + q - S * d;
        if (r < 0)
          continue;
#pragma GCC unroll 5
        for (int s = 0; s < K; ++s)
          sum[d] += cells[s] * weight[r * K + s];
      }
    }
    if (y >= 0) {
      Vec<A> result = sum[0];
      const int64_t at = y * conv.out_width + x;
      if (add != nullptr)
        result += load_lanes(add + at, 0, lanes.valid);
      store_lanes(output + at, activate<A>(result, conv.shape.activation), 0, lanes.valid);
    }
#pragma GCC unroll 5
    for (int d = 1; d < D; ++d)
      sum[d - 1] = sum[d];
    sum[D - 1] = broadcast(bias);
  }
}

template <int K, int S, class A>
void depthwise_plane(const Conv &conv, const A *weights, const A *const *rows, int64_t plane, A bias, A *output,
                     const A *add) {
  constexpr int N = kLanes<A>;
  for (int64_t x = 0; x < conv.out_width; x += N) {
    const int64_t left = x * S - conv.x.before;
    if (x + N <= conv.out_width && left >= 0 && left + K - 1 + S * (N - 1) < conv.x.input)
      depthwise_columns<K, S, true>(conv, weights, rows, plane, x, bias, output, add);
    else
      depthwise_columns<K, S, false>(conv, weights, rows, plane, x, bias, output, add);
  }
}

template <class A> void run_depthwise(const Conv &conv, const DepthwiseShare &share) {
  const ConvShape &s = conv.shape;
  const bool small = s.kernel[0] == 3, dense = conv.x.stride == 1;
  const auto plane = small ? (dense ? depthwise_plane<3, 1, A> : depthwise_plane<3, 2, A>)
                           : (dense ? depthwise_plane<5, 1, A> : depthwise_plane<5, 2, A>);
  const int64_t taps = s.kernel[0] * s.kernel[1], multiplier = s.out_channels / s.channels;
  for (int64_t channel = share.first; channel < share.last; ++channel) {
    plane(conv, (const A *)conv.values + channel * taps, (const A *const *)share.rows,
          channel / multiplier * s.input_plane, conv.bias ? ((const A *)conv.bias)[channel] : A(0),
          (A *)share.output + channel * s.output_plane,
          share.add ? (const A *)share.add + channel * s.add_plane : nullptr);
  }
}

} // namespace fxsparse::FXSPARSE_ISA
