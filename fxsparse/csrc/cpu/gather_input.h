// Copies the input into the canonical form (see Axis in plan.h): padded, de-interleaved by the stride, in the
// accumulators' type. Memory-bound: each stored cell is written once and each needed input read once.
#pragma once

#include <utility>

#include "cpu/plan.h"
#include "cpu/simd.h"

namespace fxsparse::FXSPARSE_ISA {

inline int64_t slot_phase(const Axis &axis, int64_t slot) { return slot * axis.dilation % axis.stride; }

// Where padded coordinate `p` comes from in the input, or -1 for a zero.
inline int64_t source_index(const Axis &axis, PaddingMode mode, int64_t p) {
  const int64_t i = p - axis.before, n = axis.input;
  if (i >= 0 && i < n)
    return i;
  // Cells past the padded input fill up the last phases; no output reads them.
  if (mode == PaddingMode::kZeros || p >= axis.padded)
    return -1;
  switch (mode) {
  case PaddingMode::kReflect:
    return i < 0 ? -i : 2 * (n - 1) - i;
  case PaddingMode::kReplicate:
    return i < 0 ? 0 : n - 1;
  default:
    return i < 0 ? i + n : i - n;
  }
}

template <class A> inline void fill_zeros(A *to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>)
    store(to + i, Vec<A>{});
  if (i < count)
    store_lanes(to + i, Vec<A>{}, 0, int(count - i));
}

template <class A, size_t... I> inline Vec<A> even_lanes(Vec<A> a, Vec<A> b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (2 * I)...);
}

// N elements at every second place, of which the first `count` exist; the others read as zero.
template <class A> inline Vec<A> load_every_second(const A *from, int count) {
  constexpr int N = kLanes<A>;
  const int used = 2 * count - 1;
  const Vec<A> low = load_lanes(from, 0, used < N ? used : N);
  const Vec<A> high = used > N ? load_lanes(from + N, 0, used - N) : Vec<A>{};
  return even_lanes<A>(low, high, std::make_index_sequence<N>());
}

// One row of cells: [begin, end) lie inside the input, where `from` is the first of them; the others are zero.
struct RowShape {
  int64_t begin, end, cells, stride;
};

// Cells [i, i + N) of a row. S: the stride, or 0 for any.
template <int S, class T, class A> inline void copy_vector(const T *from, A *to, RowShape row, int64_t i) {
  constexpr int N = kLanes<A>;
  const int first = int(maximum(0, minimum(row.begin - i, N))), last = int(maximum(first, minimum(row.end - i, N)));
  Vec<A> v = {};
  if constexpr (S == 1) {
    v = load_lanes(from + (i - row.begin), first, last);
  } else {
    for (int lane = first; lane < last; ++lane)
      v[lane] = to_accumulator(from[(i - row.begin + lane) * row.stride]);
  }
  store_lanes(to + i, v, 0, int(minimum(N, row.cells - i)));
}

template <int S, class T, class A> inline void copy_row(const T *from, A *to, RowShape row) {
  constexpr int N = kLanes<A>;
  int64_t i = 0;
  if constexpr (S == 2) {
    fill_zeros(to, row.begin);
    for (i = row.begin; i < row.end; i += N)
      store_lanes(to + i, load_every_second(from + (i - row.begin) * 2, int(minimum(N, row.end - i))), 0,
                  int(minimum(N, row.cells - i)));
    fill_zeros(to + i, row.cells - i);
    return;
  }
  for (; i < row.begin; i += N)
    copy_vector<S>(from, to, row, i);
  if constexpr (S == 1)
    for (; i + N <= row.end; i += N)
      store(to + i, load(from + (i - row.begin)));
  for (; i < row.cells; i += N)
    copy_vector<S>(from, to, row, i);
}

template <int S, class T, class A>
inline void copy_rows(const T *from, int64_t from_step, A *to, int64_t count, RowShape row) {
  if (S == 1 && row.cells <= kLanes<A>) {
    const int begin = int(row.begin), end = int(row.end), cells = int(row.cells);
    for (int64_t i = 0; i < count; ++i, from += from_step, to += cells)
      store_lanes(to, load_lanes(from - begin, begin, end), 0, cells);
    return;
  }
  for (int64_t i = 0; i < count; ++i, from += from_step, to += row.cells)
    copy_row<S>(from, to, row);
}

template <class T, class A>
inline void copy_rows(const T *from, int64_t from_step, A *to, int64_t count, RowShape row) {
  if (row.stride == 1)
    return copy_rows<1>(from, from_step, to, count, row);
  if constexpr (sizeof(T) == sizeof(A))
    if (row.stride == 2)
      return copy_rows<2>(from, from_step, to, count, row);
  copy_rows<0>(from, from_step, to, count, row);
}

// Padding cells [first, last) of a row, for the modes that repeat the input.
template <class T, class A>
inline void copy_mapped(const Axis &axis, PaddingMode mode, int64_t phase, const T *from, A *to, int64_t first,
                        int64_t last) {
  for (int64_t cell = first; cell < last; ++cell) {
    const int64_t source = source_index(axis, mode, cell * axis.stride + phase);
    to[cell] = source < 0 ? A(0) : A(to_accumulator(from[source]));
  }
}

// Cells of a phase that lie inside the input: [begin, end).
inline RowShape row_shape(const Axis &axis, int64_t phase) {
  const int64_t first = axis.before - phase + axis.stride - 1;
  const int64_t begin = minimum(axis.cells, maximum(0, first / axis.stride));
  const int64_t end = minimum(axis.cells, (first + axis.input) / axis.stride);
  return {begin, maximum(begin, end), axis.cells, axis.stride};
}

// One plane of one phase; `from` is the input's plane.
template <class T, class A>
void gather_plane(const Axis &ay, const Axis &ax, PaddingMode mode, int64_t phase_y, int64_t phase_x, const T *from,
                  A *to) {
  const RowShape rows = row_shape(ay, phase_y), row = row_shape(ax, phase_x);
  const int64_t first_y = rows.begin * rows.stride + phase_y - ay.before;
  const int64_t first_x = row.begin * row.stride + phase_x - ax.before;
  const int64_t width = ax.input;
  if (mode == PaddingMode::kZeros) {
    fill_zeros(to, rows.begin * row.cells);
    copy_rows(from + first_y * width + first_x, rows.stride * width, to + rows.begin * row.cells, rows.end - rows.begin,
              row);
    fill_zeros(to + rows.end * row.cells, (rows.cells - rows.end) * row.cells);
    return;
  }
  for (int64_t y = 0; y < rows.cells; ++y, to += row.cells) {
    const int64_t source = source_index(ay, mode, y * ay.stride + phase_y);
    if (source < 0) {
      fill_zeros(to, row.cells);
      continue;
    }
    copy_rows(from + source * width + first_x, 0, to, 1, row);
    copy_mapped(ax, mode, phase_x, from + source * width, to, 0, row.begin);
    copy_mapped(ax, mode, phase_x, from + source * width, to, row.end, row.cells);
  }
}

template <class T, class A>
void gather_input(const Conv &conv, const void *input, int64_t images, int64_t first, int64_t last, void *buffer) {
  const Axis ay = conv.y, ax = conv.x;
  const int64_t plane = ay.input * ax.input, slots = ay.slots * ax.slots;
  for (int64_t ci = first * slots; ci < last * slots; ++ci) {
    const int64_t phase_y = slot_phase(ay, ci % slots / ax.slots), phase_x = slot_phase(ax, ci % ax.slots);
    const T *from = (const T *)input + ci / slots * plane;
    A *to = (A *)buffer + ci * conv.group_images * conv.plane;
    for (int64_t image = 0; image < images; ++image, from += conv.shape.channels * plane, to += conv.plane)
      gather_plane(ay, ax, conv.shape.mode, phase_y, phase_x, from, to);
    // The zeros that the next plane would begin with, where none follows.
    if (images < conv.group_images || ci + 1 == conv.shape.channels * slots)
      fill_zeros(to, ay.spill * ax.cells + ax.spill);
  }
}

} // namespace fxsparse::FXSPARSE_ISA
