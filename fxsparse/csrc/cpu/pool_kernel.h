// Max pooling, and additions and activations of whole tensors: what stands between convolutions.
//
// Memory-bound: each input is read once for each window row that covers it. A window's rows are reduced first, by
// vectors along the row, then its columns.
#pragma once

#include "cpu/activation.h"
#include "cpu/gather_input.h"

namespace fxsparse::FXSPARSE_ISA {

// The larger one, or NaN, as in PyTorch.
template <class A> inline Vec<A> larger(Vec<A> a, Vec<A> b) { return (a > b) | (a != a) ? a : b; }

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

template <class T, class A>
void max_pool(const PoolShape &s, const PlaneRows &rows, const void *input, void *output, void *scratch) {
  constexpr int N = kLanes<A>;
  const A lowest = -A(__builtin_inf());
  A *row = (A *)scratch, *inside = row + s.pad[1];
  for (int64_t i = 0; i < s.row_elements; ++i)
    row[i] = lowest;
  for (int64_t plane = 0; plane < rows.planes; ++plane) {
    const T *in = (const T *)input + plane * rows.input_plane;
    T *out = (T *)output + plane * rows.output_plane + rows.first * s.out_width;
    for (int64_t oy = rows.first; oy < rows.last; ++oy, out += s.out_width) {
      const int64_t top = oy * s.stride[0] - s.pad[0];
      for (int64_t x = 0; x < s.width; x += N) {
        const int valid = int(minimum(N, s.width - x));
        Vec<A> best = broadcast(lowest);
        for (int64_t i = 0; i < s.kernel[0]; ++i) {
          const int64_t y = top + i * s.dilation[0];
          if (y >= 0 && y < s.height)
            best = larger<A>(load_lanes(in + y * s.width + x, 0, valid), best);
        }
        store_lanes(inside + x, best, 0, valid);
      }
      for (int64_t x = 0; x < s.out_width; x += N) {
        const int valid = int(minimum(N, s.out_width - x));
        const A *from = row + x * s.stride[1];
        Vec<A> best = load_strided<A>(from, s.stride[1], valid);
        for (int64_t j = 1; j < s.kernel[1]; ++j)
          best = larger<A>(load_strided<A>(from + j * s.dilation[1], s.stride[1], valid), best);
        store_lanes(out + x, best, 0, valid);
      }
    }
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
