// Copies the input into the canonical form (see Axis in plan.h): padded, de-interleaved by the stride, in the
// accumulators' type. Memory-bound: each stored cell is written once and each needed input read once.
#pragma once

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

template <class T, class A> inline void copy_cells(const T *from, A *to, int64_t count, int64_t stride) {
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kLanes<A> <= count; i += kLanes<A>)
      store(to + i, load(from + i));
    if (i < count)
      store_lanes(to + i, load_lanes(from + i, 0, int(count - i)), 0, int(count - i));
  } else if (stride == 2 && sizeof(T) == sizeof(A)) {
    for (; i < count; ++i)
      to[i] = A(to_accumulator(from[2 * i]));
  } else {
    for (; i < count; ++i)
      to[i] = to_accumulator(from[stride * i]);
  }
}

// Padding cells [first, last) of a row.
template <class T, class A>
inline void copy_mapped(const Axis &axis, PaddingMode mode, int64_t phase, const T *from, A *to, int64_t first,
                        int64_t last) {
  for (int64_t cell = first; cell < last; ++cell) {
    const int64_t source = source_index(axis, mode, cell * axis.stride + phase);
    to[cell] = source < 0 ? A(0) : A(to_accumulator(from[source]));
  }
}

template <class T, class A>
void gather_input(const Conv &conv, const void *input, int64_t images, int64_t first, int64_t last, void *buffer) {
  const Axis &ay = conv.y, &ax = conv.x;
  const PaddingMode mode = conv.shape.mode;
  const int64_t height = ay.input, width = ax.input, channels = conv.shape.channels;
  const int64_t slots = ay.slots * ax.slots;
  for (int64_t ci = first * slots; ci < last * slots; ++ci) {
    const int64_t channel = ci / slots, phase_y = slot_phase(ay, ci % slots / ax.slots);
    const int64_t phase_x = slot_phase(ax, ci % ax.slots);
    // Cells [begin, end) of a row lie inside the input.
    const int64_t begin = minimum(ax.cells, maximum(0, (ax.before - phase_x + ax.stride - 1) / ax.stride));
    const int64_t end =
        maximum(begin, minimum(ax.cells, (ax.before + width - phase_x + ax.stride - 1) / ax.stride));
    const int64_t first_x = begin * ax.stride + phase_x - ax.before;
    A *to = (A *)buffer + ci * conv.group_images * conv.plane;
    for (int64_t image = 0; image < images; ++image) {
      const T *plane = (const T *)input + (image * channels + channel) * height * width;
      for (int64_t row = 0; row < ay.cells; ++row, to += ax.cells) {
        const int64_t y = source_index(ay, mode, row * ay.stride + phase_y);
        if (y < 0) {
          fill_zeros(to, ax.cells);
          continue;
        }
        const T *from = plane + y * width;
        copy_cells(from + first_x, to + begin, end - begin, ax.stride);
        if (mode == PaddingMode::kZeros) {
          fill_zeros(to, begin);
          fill_zeros(to + end, ax.cells - end);
          continue;
        }
        copy_mapped(ax, mode, phase_x, from, to, 0, begin);
        copy_mapped(ax, mode, phase_x, from, to, end, ax.cells);
      }
    }
    // The zeros that the next plane would begin with, where none follows.
    if (images < conv.group_images || ci + 1 == channels * slots)
      fill_zeros(to, ay.spill * ax.cells + ax.spill);
  }
}

} // namespace fxsparse::FXSPARSE_ISA
