// Where a tile's reads and writes lie in images stored batch-innermost. Everything counts in *units* of 16 bytes (8
// lanes of the batch, or 4 in float32): 32 bits then reach 2^31 units. Sums of offsets may wrap on the way; what is
// read is inside the tensor. Of images as torch stores them a unit is one element (plane_conv_kernel.h).
#pragma once

#include "tiled_conv2d.h"

namespace fxsparse::cuda {

inline constexpr int kUnitBytes = 16;

// Division by an invariant of numbers below 2^31 (Granlund and Montgomery 1994, figure 4.1).
struct Divider {
  uint32_t divisor, multiplier, shift;

  static Divider by(int64_t divisor) {
    uint32_t shift = 0;
    while ((int64_t(1) << shift) < divisor)
      ++shift;
    const uint64_t excess = (uint64_t(1) << shift) - uint64_t(divisor);
    return {uint32_t(divisor), uint32_t((excess << 32) / uint64_t(divisor) + 1), shift};
  }
#ifdef __CUDACC__
  __device__ __forceinline__ int operator()(int number) const {
    return int((__umulhi(uint32_t(number), multiplier) + uint32_t(number)) >> shift);
  }
#endif
};

// The numbers of a call that the kernels use.
struct GatherShape {
  int in_height, in_width, in_channels, out_channels;
  int kernel_height, kernel_width, stride_y, stride_x, pad_top, pad_left;
  int units;                   // of a pixel and channel
  int window;                  // of the pooling in each direction; 1: none
  int out_units;               // of one stored channel: height * width * units
  uint32_t row_step, tap_step; // units from one kernel row or column to the next
  uint32_t channel_step;       // and from one input channel to the next
  Divider by_units, by_out_width, by_dilation_y, by_dilation_x;

  static GatherShape of(const Conv2dGeometry &g, int lanes_per_unit, bool pools = false) {
    GatherShape s{};
    s.window = pools ? 2 : 1;
    s.in_height = int(g.in_height), s.in_width = int(g.in_width);
    s.in_channels = int(g.in_channels), s.out_channels = int(g.out_channels);
    s.kernel_height = int(g.kernel_height), s.kernel_width = int(g.kernel_width);
    s.stride_y = int(g.stride_y), s.stride_x = int(g.stride_x);
    s.pad_top = int(g.pad_top), s.pad_left = int(g.pad_left);
    s.units = int(padded_batch(g.batch) / lanes_per_unit);
    s.out_units = int(g.out_height / s.window * (g.out_width / s.window) * s.units);
    s.tap_step = uint32_t(g.dilation_x * g.in_channels * s.units);
    s.row_step = uint32_t(g.dilation_y * g.in_width * g.in_channels * s.units);
    s.channel_step = uint32_t(s.units);
    s.by_units = Divider::by(s.units), s.by_out_width = Divider::by(g.out_width / s.window);
    s.by_dilation_y = Divider::by(g.dilation_y), s.by_dilation_x = Divider::by(g.dilation_x);
    return s;
  }
};

#ifdef __CUDACC__

// A column: units from a position's first tap to what it meets, and its bits in a position's mask of taps.
struct Column {
  uint32_t offset, mask;
};

// A unit of output positions: where its first tap lies (before the tensor inside the padding), and a bit for each
// kernel row (bits 0 to 14) and kernel column (bits 16 to 30) that is inside the image.
struct Position {
  uint32_t base, mask;

  __device__ __forceinline__ bool meets(Column column) const { return (mask & column.mask) == column.mask; }
};

// The part [first, last) of a kernel's rows (or columns) that is inside the image at `start`.
struct TapRange {
  int first, last;
};

__device__ __forceinline__ TapRange taps_inside(int start, int size, int kernel, const Divider &by_dilation) {
  int first = max(-start, 0), last = max(size - start, 0);
  if (by_dilation.divisor != 1) { // uniform over the grid
    const int below = int(by_dilation.divisor) - 1;
    first = by_dilation(min(first, 1 << 30) + below);
    last = by_dilation(min(last, 1 << 30) + below);
  }
  return {min(first, kernel), min(last, kernel)};
}

__device__ __forceinline__ uint32_t bits_of(TapRange range) {
  return ((1u << range.last) - 1u) & ~((1u << range.first) - 1u);
}

// A position's mask of taps; `y` and `x`: of its first tap.
__device__ __forceinline__ uint32_t taps_met(const GatherShape &s, int y, int x) {
  const TapRange rows = taps_inside(y, s.in_height, s.kernel_height, s.by_dilation_y);
  const TapRange columns = taps_inside(x, s.in_width, s.kernel_width, s.by_dilation_x);
  return bits_of(rows) | bits_of(columns) << 16;
}

// The stored pixel that a unit belongs to.
struct Pixel {
  int y, x, index, lane_unit;
};

__device__ __forceinline__ Pixel pixel_of(const GatherShape &s, int unit) {
  const int index = s.by_units(unit), y = s.by_out_width(index);
  return {y, index - y * int(s.by_out_width.divisor), index, unit - index * s.units};
}

// Of a pooling's window `part` says which position: row times 2, plus column. Units behind the last meet nothing.
__device__ __forceinline__ Position position_of(const GatherShape &s, int unit, int part = 0) {
  if (unit >= s.out_units)
    return {0, 0};
  const Pixel pixel = pixel_of(s, unit);
  const int y = (pixel.y * s.window + part / 2) * s.stride_y - s.pad_top;
  const int x = (pixel.x * s.window + part % 2) * s.stride_x - s.pad_left;
  const uint32_t pixel_at = uint32_t(y) * uint32_t(s.in_width) + uint32_t(x);
  return {pixel_at * uint32_t(s.in_channels) * uint32_t(s.units) + uint32_t(pixel.lane_unit), taps_met(s, y, x)};
}

// Where a unit of output channel 0 is stored, or -1 behind the last. Channels are `units` apart.
__device__ __forceinline__ int stored_at(const GatherShape &s, int unit) {
  if (unit >= s.out_units)
    return -1;
  const int pixel = s.by_units(unit);
  return pixel * s.out_channels * s.units + (unit - pixel * s.units);
}

// Kernel rows that are inside the image for any unit in [first, last].
__device__ __forceinline__ TapRange kernel_rows_met(const GatherShape &s, int first, int last) {
  const int top = pixel_of(s, first).y * s.window * s.stride_y - s.pad_top;
  const int last_row = pixel_of(s, min(last, s.out_units - 1)).y * s.window + s.window - 1;
  const int bottom = last_row * s.stride_y - s.pad_top;
  return {taps_inside(bottom, s.in_height, s.kernel_height, s.by_dilation_y).first,
          taps_inside(top, s.in_height, s.kernel_height, s.by_dilation_y).last};
}

__device__ __forceinline__ int kernel_row_of(int32_t word) { return word >> kColumnRowShift; }

// Stops the kernel where a word is no column of the weight: nothing outside the input is ever read.
__device__ __forceinline__ Column decode_column(const GatherShape &s, int32_t word) {
  const int r = kernel_row_of(word), tap = (word >> kColumnTapShift) & 15, channel = word & (kMaxChannels - 1);
  if (word == kPaddingColumn)
    return {0, ~0u}; // no position has all bits
  if (word < 0 || r >= s.kernel_height || tap >= s.kernel_width || channel >= s.in_channels)
    __trap();
  return {uint32_t(r) * s.row_step + uint32_t(tap) * s.tap_step + uint32_t(channel) * s.channel_step,
          1u << r | 0x10000u << tap};
}

// One row tile, read from the tables and held against their sizes.
struct RowTile {
  int64_t first_column, first_value;
  int columns, padded_columns, most_columns;
};

__device__ __forceinline__ RowTile row_tile(const TiledWeight &weight, int64_t index) {
  const longlong2 *fields = reinterpret_cast<const longlong2 *>(weight.tiles + index * kTileFields);
  const longlong2 columns = __ldg(fields), rest = __ldg(fields + 1);
  const int64_t first = columns.x, count = columns.y, value = rest.x, most = rest.y;
  const bool counted = count >= 0 && count <= weight.column_count;
  const int padded = counted ? max(int((count + kColumnStep - 1) / kColumnStep), 1) * kColumnStep : 0;
  const bool inside = counted && first >= 0 && first <= weight.column_count - padded && value >= 0 && value % 8 == 0 &&
                      value <= weight.value_count - padded * weight.tile_rows && padded <= most &&
                      most <= weight.column_count;
  if (!inside)
    __trap();
  return {first, value, int(count), padded, int(most)};
}

// The output channel of a lane, -1 in the padding.
__device__ __forceinline__ int output_channel(const GatherShape &s, const TiledWeight &weight, int lane) {
  const int channel = weight.rows[lane];
  if (channel >= s.out_channels)
    __trap();
  return max(channel, -1);
}

#endif // __CUDACC__

} // namespace fxsparse::cuda
