// Column indices of the weight matrix -> offsets of cells in the canonical input.
#pragma once

#include "cpu/plan.h"
#include "cpu/simd.h"

namespace fxsparse::FXSPARSE_ISA {

#if defined(__AVX512F__)
// (column + 1/2) * (1 / taps) is off its true value by less than 1/2 / taps, so truncation divides exactly.
constexpr int64_t kExactColumns = int64_t(1) << 21;
constexpr int64_t kTableTaps = 32;

inline int64_t decode_vectors(const int32_t *columns, int64_t first, int64_t last, uint32_t taps,
                              const uint32_t *tap_offsets, uint32_t channel_stride, uint32_t *offsets) {
  using Index = Vec<int32_t>;
  uint32_t table[kTableTaps] = {};
  std::memcpy(table, tap_offsets, taps * sizeof(uint32_t));
  const __m512i low = _mm512_loadu_si512(table), high = _mm512_loadu_si512(table + 16);
  const float inverse = 1.0f / float(taps);
  int64_t i = first;
  for (; i + 16 <= last; i += 16) {
    const Index column = (Index)_mm512_loadu_si512(columns + i);
    const Index channel =
        __builtin_convertvector((__builtin_convertvector(column, Vec<float>) + 0.5f) * inverse, Index);
    const Index tap = column - channel * int32_t(taps);
    const WordVec in_plane = (WordVec)_mm512_permutex2var_epi32(low, (__m512i)tap, high);
    _mm512_storeu_si512(offsets + i, (__m512i)((WordVec)channel * channel_stride + in_plane));
  }
  return i;
}
#endif

inline void decode_columns(const Conv &conv, const int32_t *columns, const uint32_t *tap_offsets, int64_t first,
                           int64_t last, uint32_t *offsets) {
  const uint32_t taps = uint32_t(conv.shape.kernel[0] * conv.shape.kernel[1]);
  const uint32_t channel_stride = uint32_t(conv.channel_stride);
  int64_t i = first;
  if (taps == 1) {
    for (; i < last; ++i)
      offsets[i] = uint32_t(columns[i]) * channel_stride + tap_offsets[0];
    return;
  }
#if defined(__AVX512F__)
  if (taps <= kTableTaps && conv.shape.weight_columns <= kExactColumns)
    i = decode_vectors(columns, first, last, taps, tap_offsets, channel_stride, offsets);
#endif
  for (; i < last; ++i) {
    const uint32_t column = uint32_t(columns[i]), channel = column / taps;
    offsets[i] = channel * channel_stride + tap_offsets[column - channel * taps];
  }
}

} // namespace fxsparse::FXSPARSE_ISA
