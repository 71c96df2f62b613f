// Poolings, and additions and activations of whole tensors: what stands between convolutions.
//
// Memory-bound: each input is read once for each window row that covers it. A window's rows are reduced first, by
// vectors along the row, then its columns.
#pragma once

#include "cpu/activation.h"
#include "cpu/gather_input.h"

namespace fxsparse::FXSPARSE_ISA {

// The larger one. With a NaN it is NaN, as in PyTorch, if Exact; else either.
template <bool Exact, class A> inline Vec<A> larger(Vec<A> a, Vec<A> b) {
  if constexpr (Exact)
    return (a > b) | (a != a) ? a : b;
  return a > b ? a : b; // one instruction
}

// Lane i is from[i * stride], for `count` lanes; reads at most two vectors from `from` on where stride <= 2.
template <class A> inline Vec<A> load_strided(const A *from, int64_t stride, int count) {
  if (stride == 1)
    return load(from);
  if (stride == 2)
    return load_every_second(from, 0, kLanes<A>);
  Vec<A> v = {};
  for (int i = 0; i < count; ++i)
    v[i] = from[i * stride];
  return v;
}

// Rows [first, last) of one plane's output. Tells whether all that was read is finite, unless Exact.
template <bool Exact, class T, class A>
bool pool_plane(const PoolShape &s, int64_t first, int64_t last, const T *in, T *out, A *row) {
  constexpr int N = kLanes<A>;
  const A lowest = -A(__builtin_inf());
  A *inside = row + s.pad[1];
  Vec<A> probe = {}; // NaN once something was not finite
  for (int64_t oy = first; oy < last; ++oy, out += s.out_width) {
    const int64_t top = oy * s.stride[0] - s.pad[0];
    for (int64_t x = 0; x < s.width; x += N) {
      const int valid = int(minimum(N, s.width - x));
      Vec<A> best = broadcast(lowest);
      for (int64_t i = 0; i < s.kernel[0]; ++i) {
        const int64_t y = top + i * s.dilation[0];
        if (y < 0 || y >= s.height)
          continue;
        const Vec<A> cell = load_lanes(in + y * s.width + x, 0, valid);
        best = larger<Exact, A>(cell, best);
        if (!Exact)
          probe += cell * A(0);
      }
      store_lanes(inside + x, best, 0, valid);
    }
    for (int64_t x = 0; x < s.out_width; x += N) {
      const int valid = int(minimum(N, s.out_width - x));
      const A *from = row + x * s.stride[1];
      Vec<A> best = load_strided<A>(from, s.stride[1], valid);
      for (int64_t j = 1; j < s.kernel[1]; ++j)
        best = larger<Exact, A>(load_strided<A>(from + j * s.dilation[1], s.stride[1], valid), best);
      store_lanes(out + x, best, 0, valid);
    }
  }
  A sum = 0;
  for (int lane = 0; lane < N; ++lane)
    sum += probe[lane];
  return sum == sum;
}

// Windows of 2 x 2 side by side, as `pool_plane` does them: nothing waits in memory.
template <bool Exact, class T, class A>
bool pool_squares(const PoolShape &s, int64_t first, int64_t last, const T *in, T *out) {
  constexpr int N = kLanes<A>;
  constexpr auto lanes = std::make_index_sequence<N>();
  Vec<A> probe = {};
  for (int64_t oy = first; oy < last; ++oy, out += s.out_width)
    for (int64_t x = 0; x < s.out_width; x += N) {
      const int valid = int(minimum(N, s.out_width - x));
      const T *top = in + 2 * oy * s.width + 2 * x, *bottom = top + s.width;
      Vec<A> half[2];
      for (int h = 0; h < 2; ++h) {
        const int read = int(maximum(0, minimum(N, 2 * valid - h * N)));
        const Vec<A> above = load_lanes(top + h * N, 0, read), below = load_lanes(bottom + h * N, 0, read);
        half[h] = larger<Exact, A>(below, above);
        if (!Exact)
          probe += above * A(0) + below * A(0);
      }
      const Vec<A> left = every_second<A, 0>(half[0], half[1], lanes),
                   right = every_second<A, 1>(half[0], half[1], lanes);
      store_lanes(out + x, larger<Exact, A>(right, left), 0, valid);
    }
  A sum = 0;
  for (int lane = 0; lane < N; ++lane)
    sum += probe[lane];
  return sum == sum;
}

inline bool pools_squares(const PoolShape &s) {
  bool squares = s.out_height <= s.height / 2 && s.out_width <= s.width / 2; // not with ceil_mode and odd sizes
  for (int axis = 0; axis < 2; ++axis)
    squares = squares && s.kernel[axis] == 2 && s.stride[axis] == 2 && s.pad[axis] == 0 && s.dilation[axis] == 1;
  return squares;
}

template <class T, class A>
void max_pool(const PoolShape &s, const PlaneRows &rows, const void *input, void *output, void *scratch) {
  const bool squares = pools_squares(s);
  A *row = (A *)scratch;
  for (int64_t i = 0; i < s.row_elements; ++i)
    row[i] = -A(__builtin_inf());
  for (int64_t plane = 0; plane < rows.planes; ++plane) {
    const T *in = (const T *)input + plane * rows.input_plane;
    T *out = (T *)output + plane * rows.output_plane + rows.first * s.out_width;
    if (squares) {
      if (!pool_squares<false, T, A>(s, rows.first, rows.last, in, out))
        pool_squares<true, T, A>(s, rows.first, rows.last, in, out);
      continue;
    }
    if (!pool_plane<false, T, A>(s, rows.first, rows.last, in, out, row))
      pool_plane<true, T, A>(s, rows.first, rows.last, in, out, row);
  }
}

template <class T, class A>
void average_planes(int64_t count, const PlaneRows &planes, const void *input, void *output) {
  constexpr int N = kLanes<A>;
  for (int64_t plane = 0; plane < planes.planes; ++plane) {
    const T *in = (const T *)input + plane * planes.input_plane;
    Vec<A> sum = {};
    for (int64_t i = 0; i < count; i += N)
      sum += load_lanes(in + i, 0, int(minimum(N, count - i)));
    A total = 0;
    for (int lane = 0; lane < N; ++lane)
      total += sum[lane];
    store_lanes((T *)output + plane * planes.output_plane, broadcast(total / A(count)), 0, 1);
  }
}

// output = activation(a + b); b may be null.
template <class T, class A>
void add_activate(const void *a, const void *b, void *output, int64_t count, Activation activation) {
  constexpr int N = kLanes<A>;
  for (int64_t i = 0; i < count; i += N) {
    const int valid = int(minimum(N, count - i));
    Vec<A> v = load_lanes((const T *)a + i, 0, valid);
    if (b != nullptr)
      v += load_lanes((const T *)b + i, 0, valid);
    store_lanes((T *)output + i, activate<A>(v, activation), 0, valid);
  }
}

} // namespace fxsparse::FXSPARSE_ISA
