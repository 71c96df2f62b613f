// The residual kernel: one row of the weight matrix as a sparse row, consecutive cells in vector lanes.
//
// Tile: one row x V vectors of cells, all in registers. Per weight: one broadcast, V unaligned loads, V FMAs. The loads
// (half of them cross a cache line) bound it: about a quarter of the FMA peak from L1, less from L2.
#pragma once

#include "cpu/activation.h"
#include "cpu/simd.h"

namespace fxsparse::FXSPARSE_ISA {

constexpr int kMaxResidualVectors = 8;

// Adds weights[k] * cells[offsets[k] + lane] to V vectors at `sums`; vector V - 1 begins at `last`, which may overlap
// the one before. With `initial`, the sums start from it, else from what `sums` holds.
template <class A>
using ResidualKernel = void (*)(const A *cells, const uint32_t *offsets, const A *weights, int64_t count, int64_t last,
                                const A *initial, A *sums);

template <class A, int V>
void residual_kernel(const A *cells, const uint32_t *offsets, const A *weights, int64_t count, int64_t last,
                     const A *initial, A *sums) {
  constexpr int lanes = kLanes<A>;
  // Short tiles take several weights at a time, to hide the latency of the FMA.
  constexpr int KU = V >= 6 ? 1 : V >= 3 ? 2 : V == 2 ? 4 : 8;
  Vec<A> sum[KU][V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    sum[0][v] = initial ? broadcast(*initial) : load(sums + (v == V - 1 ? last : v * lanes));
#pragma GCC unroll 8
    for (int u = 1; u < KU; ++u)
      sum[u][v] = Vec<A>{};
  }
  int64_t k = 0;
  for (; k + KU <= count; k += KU) {
#pragma GCC unroll 8
    for (int u = 0; u < KU; ++u) {
      const A *x = cells + uint64_t(offsets[k + u]);
      const Vec<A> weight = broadcast(weights[k + u]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v)
        sum[u][v] += weight * load(x + (v == V - 1 ? last : v * lanes));
    }
  }
  if (KU > 1)
    for (; k < count; ++k)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v)
        sum[0][v] += broadcast(weights[k]) * load(cells + uint64_t(offsets[k]) + (v == V - 1 ? last : v * lanes));
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    Vec<A> total = sum[0][v];
#pragma GCC unroll 8
    for (int u = 1; u < KU; ++u)
      total += sum[u][v];
    store(sums + (v == V - 1 ? last : v * lanes), total);
  }
}

template <class A>
inline constexpr ResidualKernel<A> kResidualKernels[kMaxResidualVectors + 1] = {
    nullptr,
    residual_kernel<A, 1>,
    residual_kernel<A, 2>,
    residual_kernel<A, 3>,
    residual_kernel<A, 4>,
    residual_kernel<A, 5>,
    residual_kernel<A, 6>,
    residual_kernel<A, 7>,
    residual_kernel<A, 8>,
};

// Results [0, count) of one row, complete but for `add` and the activation, to the output.
template <class T, class A>
inline void store_row(const A *results, int64_t count, T *output, const T *add, Activation activation) {
  for (int64_t i = 0; i < count; i += kLanes<A>) {
    const int valid = int(minimum(count - i, kLanes<A>));
    Vec<A> v = load_lanes(results + i, 0, valid);
    if (add != nullptr)
      v += load_lanes(add + i, 0, valid);
    store_lanes(output + i, activate<A>(v, activation), 0, valid);
  }
}

} // namespace fxsparse::FXSPARSE_ISA
