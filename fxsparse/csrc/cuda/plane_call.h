// What a call of the kernel for few images is told, and where its positions lie.
#pragma once

#include "plane_conv.h"
#include "tiled_gather.h"

namespace fxsparse::cuda {

inline constexpr int kPlaneThreads = 256, kPlaneWarps = kPlaneThreads / 32, kPlaneChunk = 16;
inline constexpr int kPlaneTable = 1024; // columns that are decoded at a time

struct StoredPosition {
  int image, y, x; // of what is stored
  int part;        // of a pooling's window
};

// Strides of what is written, or added, in elements.
struct StoreSteps {
  uint32_t row, channel, image, x;

  static StoreSteps of(const ImageStrides &s) {
    return {uint32_t(s.row), uint32_t(s.channel), uint32_t(s.image), uint32_t(s.x)};
  }

  // Of channel 0.
  __device__ __forceinline__ uint32_t at(const StoredPosition &p) const {
    return uint32_t(p.image) * image + uint32_t(p.y) * row + uint32_t(p.x) * x;
  }
};

struct PlaneCall {
  GatherShape shape; // units are elements
  TiledWeight weight;
  TiledTensors tensors;
  Activation activation;
  uint32_t in_image, in_row, in_x;
  StoreSteps add, out;
  Divider by_image; // stored positions of one image
  int positions;    // of all images; of a pooling four for each stored one, a window side by side
  int split;
  bool tf32;              // of float32: factors are rounded
  int table;              // columns that shared memory has room for: a multiple of a chunk
  bool stores_pairs;      // positions of even number and the next lie side by side, in the output and in what is added
  int log_threads_of_row; // how many threads store a CTA's positions of one row: a power of two
};

// How many CTAs a multiprocessor holds, and the chunks whose loads are under way together: what the registers allow. In
// TF32 weights take twice as many.
__host__ __device__ constexpr int plane_ctas(int rows, int units, bool tf32) {
  return rows == 64 && units == 1 && !tf32 ? 3 : 2;
}
__host__ __device__ constexpr int plane_batch(int rows, int units, bool tf32) {
  return rows == 32 ? (tf32 ? 2 : 4) / units : 1;
}

// Floats between the sums of two rows in shared memory.
__host__ __device__ constexpr int sums_pitch(int positions) { return positions <= 16 ? positions : positions + 4; }

inline int plane_shared_bytes(int rows, int positions, int split, int table) {
  return split * rows * sums_pitch(kPlaneWarps / split * positions) * int(sizeof(float)) + table * int(sizeof(Column));
}

__device__ __forceinline__ StoredPosition stored_position(const PlaneCall &call, int position) {
  const int stored = call.shape.window == 2 ? position / 4 : position, image = call.by_image(stored);
  const int rest = stored - image * int(call.by_image.divisor), y = call.shape.by_out_width(rest);
  return {image, y, rest - y * int(call.shape.by_out_width.divisor),
          position - stored * (call.shape.window == 2 ? 4 : 1)};
}

__device__ __forceinline__ Position gathered_position(const PlaneCall &call, int position) {
  if (position >= call.positions)
    return {0, 0};
  const GatherShape &s = call.shape;
  const StoredPosition p = stored_position(call, position);
  const int y = (p.y * s.window + p.part / 2) * s.stride_y - s.pad_top;
  const int x = (p.x * s.window + p.part % 2) * s.stride_x - s.pad_left;
  return {uint32_t(p.image) * call.in_image + uint32_t(y) * call.in_row + uint32_t(x) * call.in_x, taps_met(s, y, x)};
}

} // namespace fxsparse::cuda
