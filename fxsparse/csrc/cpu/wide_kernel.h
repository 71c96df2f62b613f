// The wide kernel: consecutive positions in vector lanes, weights broadcast.
//
// Tile: R rows of the weight matrix x V vectors of positions, all in registers (AVX-512: 8 x 3, AVX2: 4 x 3). Per
// column: V unaligned loads, R broadcasts and R * V FMAs. Its results lie as the output does, so that storing costs a
// few cycles a vector, where the block kernel's transpose and row stores cost about 300 a tile: with few columns on
// wide planes, as in 1x1 expansions, that is most of the block kernel's time. Lanes past the end of a row are lost, so
// narrow planes are left to the block kernel.
#pragma once

#include "cpu/activation.h"
#include "cpu/plan.h"
#include "cpu/simd.h"

namespace fxsparse::FXSPARSE_ISA {

constexpr int kWideVectors = 3;
constexpr int kWideRows = kVectorRegisters >= 32 ? 8 : 4;
// Some rows compute so many tiles before the next rows do, if what these read is no more than half of L1: few streams
// are written at a time. Where a tile has many rows, each is told of early instead.
constexpr bool kPrefetchesOutputs = kWideRows > 4;
constexpr int kWideTiles = kPrefetchesOutputs ? 1 : 16;
constexpr int64_t kWideInputBytes = 16 * 1024;

// positions[v]: the cells of vector v; offsets[k]: column k's offset in cells; weights[r]: row r at column 0, the next
// column kPanelLanes elements on; initial[r]: what row r starts from; tile: [r][v][lane].
template <class A>
using WideKernel = void (*)(const A *const *positions, const uint32_t *offsets, const A *weights, int64_t columns,
                            const A *initial, A *tile);

template <class A, int V>
void wide_kernel(const A *const *positions, const uint32_t *offsets, const A *weights, int64_t columns,
                 const A *initial, A *tile) {
  constexpr int R = kWideRows;
  Vec<A> sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v)
      sum[r][v] = broadcast(initial[r]);
  const A *x[V];
  for (int v = 0; v < V; ++v)
    x[v] = positions[v];
  for (int64_t k = 0; k < columns; ++k, weights += kPanelLanes) {
    const uint64_t offset = offsets[k];
    Vec<A> cells[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v)
      cells[v] = load(x[v] + offset);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Vec<A> weight = broadcast(weights[r]);
      if (V > 1)
        keep_in_register<A>(weight);
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v)
        sum[r][v] += weight * cells[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v)
      store(tile + (r * V + v) * kLanes<A>, sum[r][v]);
}

template <class A>
inline constexpr WideKernel<A> kWideKernels[kWideVectors + 1] = {nullptr, wide_kernel<A, 1>, wide_kernel<A, 2>,
                                                                 wide_kernel<A, 3>};

// A vector of positions: of its lanes [begin, end) are outputs, lane 0 would be element `output` of its row.
struct Stretch {
  int begin, end;
  int64_t output;
};

// Cycles that a position of 32 rows costs beyond its FMAs: with the block kernel, and with this one.
constexpr int64_t kBlockStoreCost = 24, kWideStoreCost = 8;
// Of the FMAs' own: this kernel's loads cross cache lines.
constexpr int64_t kWidePercent = 105;

// Tells whether rows of `width` positions and so many columns are better computed by this kernel.
template <class A> inline bool wide_is_faster(int64_t width, int64_t columns) {
  const int64_t computed = (width + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
  return columns * (kWidePercent * computed - 100 * width) < 100 * width * (kBlockStoreCost - kWideStoreCost);
}

} // namespace fxsparse::FXSPARSE_ISA
