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

// Lane i is lane 2 * i + First of both.
template <class A, int First, size_t... I> inline Vec<A> every_second(Vec<A> a, Vec<A> b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (2 * I + First)...);
}

// Lane i is element 2 * i, for lanes [first, last); the others are zero.
template <class A> inline Vec<A> load_every_second(const A *from, int first, int last) {
  constexpr int N = kLanes<A>;
  if (first == 0 && last == N) // the very last element, at an odd place, may lie outside the row
    return every_second<A, 0>(load(from), load_lanes(from + N, 0, N - 1), std::make_index_sequence<N>());
  const int begin = 2 * first, end = 2 * last - 1;
  const Vec<A> low = begin < N ? load_lanes(from, begin, end < N ? end : N) : Vec<A>{};
  const Vec<A> high = end > N ? load_lanes(from + N, begin > N ? begin - N : 0, end - N) : Vec<A>{};
  return every_second<A, 0>(low, high, std::make_index_sequence<N>());
}

// One row of cells: [begin, end) lie inside the input, where `from` is the first of them; the others are zero.
struct RowShape {
  int64_t begin, end, cells, stride;
};

// `count` rows, `from_step` apart in the input. S: the stride, or 0 for any. One vector of all the rows at a time, so
// that its lanes are found once.
template <int S, class T, class A>
inline void copy_rows(const T *from, int64_t from_step, A *to, int64_t count, RowShape row) {
  constexpr int N = kLanes<A>;
  for (int64_t i = 0; i < row.cells; i += N, to += N) {
    const int first = int(maximum(0, minimum(row.begin - i, N))), last = int(maximum(first, minimum(row.end - i, N)));
    const int stored = int(minimum(N, row.cells - i));
    const T *source = from + (i - row.begin) * row.stride;
    for (int64_t y = 0; y < count; ++y, source += from_step) {
      Vec<A> v = {};
      if constexpr (S == 1) {
        v = load_lanes(source, first, last);
      } else if constexpr (S == 2) {
        if (first < last)
          v = load_every_second(source, first, last);
      } else {
        for (int lane = first; lane < last; ++lane)
          v[lane] = to_accumulator(source[lane * row.stride]);
      }
      store_lanes(to + y * row.cells, v, 0, stored);
    }
  }
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

// Which of the cells of a phase, from `first` on, lie inside the input.
inline RowShape row_shape(const Axis &axis, int64_t phase, int64_t first) {
  const int64_t before = axis.before - phase + axis.stride - 1;
  const int64_t begin = minimum(axis.cells, maximum(0, before / axis.stride - first));
  const int64_t end = minimum(axis.cells, (before + axis.input) / axis.stride - first);
  return {begin, maximum(begin, end), axis.cells, axis.stride};
}

// One phase: rows [first_row, first_row + cells) of it.
struct PlaneShape {
  int64_t phase_y, phase_x, first_row;
  RowShape rows, row;
};

inline PlaneShape plane_shape(const Axis &ay, const Axis &ax, int64_t slot, int64_t first_row) {
  const int64_t phase_y = slot_phase(ay, slot / ax.slots), phase_x = slot_phase(ax, slot % ax.slots);
  return {phase_y, phase_x, first_row, row_shape(ay, phase_y, first_row), row_shape(ax, phase_x, 0)};
}

// The row of the phase that is the first to lie in row `y` of the input, or below it.
inline int64_t row_from(const Axis &axis, const PlaneShape &shape, int64_t y) {
  return (y + axis.before - shape.phase_y + axis.stride - 1) / axis.stride - shape.first_row;
}

// What `from` has of the planes of one phase with zeros around: planes `from_step` apart in the input, `to_step` in the
// buffer. The rows between `first` and `last` are there.
template <class T, class A>
inline void gather_rows(const Axis &ay, const Axis &ax, const PlaneShape &shape, int64_t first, int64_t last,
                        const T *from, int64_t from_step, A *to, int64_t to_step, int64_t planes) {
  const RowShape rows = shape.rows, row = shape.row;
  const int64_t begin = maximum(rows.begin, row_from(ay, shape, first));
  const int64_t end = minimum(rows.end, row_from(ay, shape, last)), width = ax.input;
  if (begin >= end)
    return;
  from += ((shape.first_row + begin) * rows.stride + shape.phase_y - ay.before) * width + row.begin * row.stride +
          shape.phase_x - ax.before;
  for (int64_t plane = 0; plane < planes; ++plane, from += from_step, to += to_step)
    copy_rows(from, rows.stride * width, to + begin * row.cells, end - begin, row);
}

// One plane of one phase whose surroundings repeat it; `from` is the input's plane.
template <class T, class A>
inline void gather_mapped(const Axis &ay, const Axis &ax, PaddingMode mode, const PlaneShape &shape, const T *from,
                          A *to) {
  const RowShape rows = shape.rows, row = shape.row;
  const int64_t first_x = row.begin * row.stride + shape.phase_x - ax.before;
  const int64_t width = ax.input;
  for (int64_t y = 0; y < rows.cells; ++y, to += row.cells) {
    const int64_t source = source_index(ay, mode, (shape.first_row + y) * ay.stride + shape.phase_y);
    if (source < 0) {
      fill_zeros(to, row.cells);
      continue;
    }
    copy_rows(from + source * width + first_x, 0, to, 1, row);
    copy_mapped(ax, mode, shape.phase_x, from + source * width, to, 0, row.begin);
    copy_mapped(ax, mode, shape.phase_x, from + source * width, to, row.end, row.cells);
  }
}

#if defined(__AVX2__)
// How a narrow plane becomes its cells, a vector at a time: the cells of a vector that lie inside the plane are
// elements in a row of it, so one load spreads them.
template <class A> struct NarrowPlane {
  static constexpr int64_t N = kLanes<A>, kMostVectors = 32;
  int64_t vectors = 0;
  Spread<A> inside[kMostVectors];
  int64_t first[kMostVectors]; // of the elements

  // Whether a plane, of which all rows are there, is one.
  template <class T> static bool is_one(const Conv &conv, const Gathering &what) {
    const Axis &ay = conv.y, &ax = conv.x;
    const RowShape row = row_shape(ax, 0, 0);
    return sizeof(T) == sizeof(A) && conv.shape.mode == PaddingMode::kZeros && ay.stride == 1 && ax.stride == 1 &&
           row.end - row.begin == ax.input && row.cells <= N && conv.plane <= kMostVectors * N &&
           what.num_inputs == 1 && what.first_row == 0 && what.inputs[0].first == 0 && what.inputs[0].last == ay.input;
  }

  void find(const Conv &conv) {
    vectors = (conv.plane + N - 1) / N;
    const RowShape rows = row_shape(conv.y, 0, 0), row = row_shape(conv.x, 0, 0);
    uint32_t lanes[kMostVectors + 1] = {};
    for (int64_t y = rows.begin; y < rows.end; ++y) { // a row lies in two vectors at the most
      const int64_t cell = y * row.cells + row.begin, vector = cell / N;
      const uint64_t bits = ((uint64_t(1) << (row.end - row.begin)) - 1) << cell % N;
      lanes[vector] |= uint32_t(bits & ((uint64_t(1) << N) - 1));
      lanes[vector + 1] |= uint32_t(bits >> N);
    }
    int64_t next = (rows.begin - conv.y.before) * conv.x.input;
    for (int64_t i = 0; i < vectors; ++i) {
      inside[i] = Spread<A>::over(lanes[i]);
      first[i] = next;
      next += __builtin_popcount(lanes[i]);
    }
  }

  void spread(const A *from, A *to, int64_t cells) const {
    for (int64_t i = 0; i < vectors; ++i, to += N)
      store_lanes(to, load_spread(from + first[i], inside[i]), 0, int(minimum(N, cells - i * N)));
  }
};
#endif

// Channels whose phases are found together: few, so that a plane is still in the cache for its next phase.
constexpr int64_t kGatherChannels = 8;

template <class T, class A> void gather_input(const Conv &conv, const Gathering &what, void *buffer) {
  const Axis ay = conv.y, ax = conv.x;
  const bool zeros = conv.shape.mode == PaddingMode::kZeros;
  const int64_t plane = conv.shape.input_plane, group_plane = conv.group_images * conv.plane;
#if defined(__AVX2__)
  const bool is_narrow = NarrowPlane<A>::template is_one<T>(conv, what);
  NarrowPlane<A> narrow;
  if (is_narrow)
    narrow.find(conv);
#endif
  for (int64_t block = what.first; block < what.last; block += kGatherChannels) {
    const int64_t channels = minimum(what.last - block, kGatherChannels);
    A *block_to = (A *)buffer + block * conv.channel_stride;
    for (int64_t slot = 0; slot < ay.slots * ax.slots; ++slot, block_to += group_plane) {
      const PlaneShape shape = plane_shape(ay, ax, slot, what.first_row);
      const RowShape rows = shape.rows;
      for (int64_t image = 0; image < what.images; ++image) {
        const int64_t from = ((what.first_image + image) * conv.shape.channels + block) * plane;
        A *to = block_to + image * conv.plane;
#if defined(__AVX2__)
        if constexpr (sizeof(T) == sizeof(A))
          if (is_narrow) {
            for (int64_t channel = 0; channel < channels; ++channel, to += conv.channel_stride)
              narrow.spread((const T *)what.inputs[0].at + from + channel * plane, to, conv.plane);
            continue;
          }
#endif
        for (int64_t channel = 0; channel < channels; ++channel, to += conv.channel_stride)
          if (zeros) {
            fill_zeros(to, rows.begin * ax.cells);
            fill_zeros(to + rows.end * ax.cells, (rows.cells - rows.end) * ax.cells);
          } else { // all rows are in one piece
            gather_mapped(ay, ax, conv.shape.mode, shape, (const T *)what.inputs[0].at + from + channel * plane, to);
          }
        to = block_to + image * conv.plane;
        for (int64_t i = 0; zeros && i < what.num_inputs; ++i)
          gather_rows(ay, ax, shape, what.inputs[i].first, what.inputs[i].last, (const T *)what.inputs[i].at + from,
                      plane, to, conv.channel_stride, channels);
      }
      // The zeros that the next plane would begin with, where none follows.
      for (int64_t channel = 0; channel < channels; ++channel) {
        A *end = block_to + channel * conv.channel_stride + what.images * conv.plane;
        const bool alone = conv.schedule == Schedule::kByGroup && block + channel + 1 == what.last;
        if (alone || what.images < conv.group_images || end == (A *)buffer + conv.shape.channels * conv.channel_stride)
          fill_zeros(end, ay.spill * ax.cells + ax.spill);
      }
    }
  }
}

} // namespace fxsparse::FXSPARSE_ISA
