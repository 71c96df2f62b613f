// Writes a block kernel's tile to the rows it belongs to: a transpose in registers turns lanes into positions, then
// `add` and the activation are applied and each row's positions are stored, once.
#pragma once

#include <utility>

#include "cpu/activation.h"
#include "cpu/block_kernel.h"

namespace fxsparse::FXSPARSE_ISA {

// Positions [begin, end) of a tile that are contiguous in the output: position p is element output + p of its row.
struct Segment {
  int begin, end;
  int64_t output;
};

struct TileOutput {
  int positions, num_segments;
  Segment segments[kMaxTileHeight];
};

// Swaps the odd blocks of D lanes of `a` with the even ones of `b`.
template <class A, int D, size_t... I> inline void exchange(Vec<A> &a, Vec<A> &b, std::index_sequence<I...>) {
  constexpr size_t N = kLanes<A>;
  const Vec<A> low = __builtin_shufflevector(a, b, ((I & D) ? N + I - D : I)...);
  const Vec<A> high = __builtin_shufflevector(a, b, ((I & D) ? N + I : I + D)...);
  a = low;
  b = high;
}

template <class A, int D = kLanes<A> / 2> inline void transpose(Vec<A> *r) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<A>; ++i)
    if (!(i & D))
      exchange<A, D>(r[i], r[i | D], std::make_index_sequence<kLanes<A>>());
  if constexpr (D > 1)
    transpose<A, D / 2>(r);
}

// The transpose of N vectors at `from`: r[i] is lane i of each.
template <class A> inline void load_transposed(const A *from, Vec<A> *r) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    // The exchange of blocks of 8 and of 4 lanes by inserts from memory, which spare the one port that shuffles.
#pragma GCC unroll 4
    for (int block = 0; block < 4; ++block)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const A *p = from + i * 16 + block * 4;
        __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(p));
        v = _mm512_insertf32x4(v, _mm_loadu_ps(p + 64), 1);
        v = _mm512_insertf32x4(v, _mm_loadu_ps(p + 128), 2);
        r[block * 4 + i] = (Vec<A>)_mm512_insertf32x4(v, _mm_loadu_ps(p + 192), 3);
      }
    transpose<A, 2>(r);
    return;
  }
#endif
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<A>; ++i)
    r[i] = load(from + i * kLanes<A>);
  transpose<A>(r);
}

// Elements of a tile's memory: the transpose reads whole squares of vectors.
template <class A> constexpr int kTileElements = (kMaxVectors * kMaxPositions + kLanes<A>)*kLanes<A>;

// outputs[lane]: the row's first element, or null for a padding lane; adds: likewise, or null altogether.
template <class T, class A>
void store_tile(const A *tile, int lanes, const TileOutput &shape, T *const *outputs, const T *const *adds,
                Activation activation) {
  constexpr int N = kLanes<A>;
  for (int first_lane = 0; first_lane < lanes; first_lane += N, tile += shape.positions * N) {
    for (int first = 0; first < shape.positions; first += N) {
      Vec<A> r[N];
      load_transposed(tile + first * N, r);
      for (int s = 0; s < shape.num_segments; ++s) {
        const Segment &segment = shape.segments[s];
        const int begin = segment.begin > first ? segment.begin - first : 0;
        const int end = segment.end - first < N ? segment.end - first : N;
        if (begin >= end)
          continue;
        const int64_t offset = segment.output + first;
        for (int i = 0; i < N; ++i) {
          T *output = outputs[first_lane + i];
          if (output == nullptr)
            continue;
          Vec<A> v = r[i];
          if (adds != nullptr) {
            v += load_lanes(adds[first_lane + i] + offset, begin, end);
            __builtin_prefetch(adds[first_lane + i] + offset + shape.positions); // for the next tile
          }
          store_lanes(output + offset, activate<A>(v, activation), begin, end);
        }
      }
    }
  }
}

} // namespace fxsparse::FXSPARSE_ISA
