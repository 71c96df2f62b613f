// The block kernel: rows of the weight matrix in vector lanes, inputs broadcast.
//
// Tile: NV vectors of rows x PH rows of PW positions, all in registers (AVX-512: 2 x 14, AVX2: 2 x 6). Per column:
// NV vector loads of weights, PW * PH broadcasts, NV * PW * PH FMAs, so it is bound by the FMA units from about four
// positions on, wherever the inputs lie in L1 or L2. Nothing is gathered and no lane idles on narrow planes.
#pragma once

#include "cpu/plan.h"
#include "cpu/simd.h"

namespace fxsparse::FXSPARSE_ISA {

constexpr int kMaxVectors = 2;    // NV
constexpr int kMaxTileHeight = 7; // PH
constexpr int kMaxPositions = (kVectorRegisters - kMaxVectors - 2) / kMaxVectors;

// Tiles of fewer positions have no time to prefetch inputs, or weights.
constexpr int kPrefetchedPositions = 12, kStreamedPositions = 4;
constexpr int kWeightsAhead = 48; // columns

// rows[h]: cells of the tile's row h; offsets[k]: column k's offset in cells; weights[v]: vector v at column 0, the
// next column kPanelLanes elements on; initial[v]: what vector v starts from; tile: [v][h * PW + j][lane].
template <class A>
using BlockKernel = void (*)(const A *const *rows, const uint32_t *offsets, const A *const *weights, int64_t columns,
                             const A *initial, A *tile);

template <class A, int NV, int PW, int PH>
void block_kernel(const A *const *rows, const uint32_t *offsets, const A *const *weights, int64_t columns,
                  const A *initial, A *tile) {
  constexpr int P = PW * PH, lanes = kLanes<A>;
  // Small tiles take several columns at a time: about eight independent sums hide the latency of the FMA.
  constexpr int KU = NV * P >= 8 ? 1 : NV * P >= 4 ? 2 : 4;
  Vec<A> sum[KU][NV][P];
  for (int v = 0; v < NV; ++v)
    for (int p = 0; p < P; ++p) {
      sum[0][v][p] = load(initial + v * lanes);
      for (int u = 1; u < KU; ++u)
        sum[u][v][p] = Vec<A>{};
    }
  const A *x[PH], *w[NV];
  for (int h = 0; h < PH; ++h)
    x[h] = rows[h];
  for (int v = 0; v < NV; ++v)
    w[v] = weights[v];
  int64_t k = 0;
  for (; k + KU <= columns; k += KU) {
#pragma GCC unroll 4
    for (int u = 0; u < KU; ++u) {
      const uint64_t offset = offsets[k + u];
      // Columns lie anywhere in a buffer of the size of L2, where no prefetcher of the hardware finds them.
      if (P >= kPrefetchedPositions)
#pragma GCC unroll 7
        for (int h = 0; h < PH; ++h) {
          const A *ahead = x[h] + uint64_t(offsets[k + u + kColumnsAhead]);
          __builtin_prefetch(ahead);
          __builtin_prefetch(ahead + PW - 1);
        }
      Vec<A> weight[NV];
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v)
        weight[v] = load(w[v] + (k + u) * kPanelLanes);
      // Weights are read once from beyond L2, whose prefetcher stops at every page.
      if (P >= kStreamedPositions)
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v)
          __builtin_prefetch(w[v] + (k + u + kWeightsAhead) * kPanelLanes, 0, 2);
#pragma GCC unroll 7
      for (int h = 0; h < PH; ++h)
#pragma GCC unroll 14
        for (int j = 0; j < PW; ++j) {
          Vec<A> b = broadcast(x[h][offset + j]);
          if (NV > 1)
            keep_in_register<A>(b);
#pragma GCC unroll 2
          for (int v = 0; v < NV; ++v)
            sum[u][v][h * PW + j] += weight[v] * b;
        }
    }
  }
  if (KU > 1)
    for (; k < columns; ++k)
      for (int v = 0; v < NV; ++v)
        for (int p = 0; p < P; ++p)
          sum[0][v][p] += load(w[v] + k * kPanelLanes) * broadcast(x[p / PW][uint64_t(offsets[k]) + p % PW]);
  for (int v = 0; v < NV; ++v)
    for (int p = 0; p < P; ++p) {
      Vec<A> total = sum[0][v][p];
      for (int u = 1; u < KU; ++u)
        total += sum[u][v][p];
      store(tile + (v * P + p) * lanes, total);
    }
}

// Heights that a tile of PW positions may have: few, as each is a function of its own. A tile of fewer rows repeats
// its last row in the next height up.
template <class A> struct BlockKernels {
  BlockKernel<A> table[kMaxVectors][kMaxPositions + 1][kMaxTileHeight + 1] = {};

  template <int NV, int PW, int PH> constexpr void add() {
    if constexpr (PW * PH <= kMaxPositions)
      table[NV - 1][PW][PH] = block_kernel<A, NV, PW, PH>;
  }
  template <int NV, int PW> constexpr void add_widths() {
    add<NV, PW, 1>();
    if constexpr (PW < kMaxPositions)
      add_widths<NV, PW + 1>();
  }
  template <int NV> constexpr void add_all() {
    add_widths<NV, 1>();
    add<NV, 1, 2>(), add<NV, 1, 4>(), add<NV, 1, 6>(), add<NV, 1, 7>();
    add<NV, 2, 2>(), add<NV, 2, 3>(), add<NV, 2, 4>(), add<NV, 2, 7>();
    add<NV, 3, 2>(), add<NV, 3, 4>();
    add<NV, 4, 2>(), add<NV, 4, 3>();
    add<NV, 5, 2>(), add<NV, 6, 2>(), add<NV, 7, 2>();
  }
  constexpr BlockKernels() {
    add_all<kMaxVectors>();
    if constexpr (kLanes<A> == kPanelLanes) // the odd panel
      add_all<1>();
  }
};

template <class A> inline constexpr BlockKernels<A> kBlockKernels;

template <class A> inline int kernel_height(int64_t width, int64_t rows) {
  int height = int(rows);
  while (kBlockKernels<A>.table[kMaxVectors - 1][width][height] == nullptr)
    ++height;
  return height;
}

} // namespace fxsparse::FXSPARSE_ISA
