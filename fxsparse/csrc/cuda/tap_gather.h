// Which input element a weight column meets at an output position: the index arithmetic of a convolution by
// gathers.
#pragma once

#include "../conv2d_geometry.h"

#include <cstdint>

#ifdef __CUDACC__
#define FXSPARSE_DEVICE __device__ __forceinline__
#else
#define FXSPARSE_DEVICE inline
#endif

namespace fxsparse::cuda {

// One column of the weight matrix, relative to the window of an output position.
struct Tap {
  int64_t offset; // elements; zero padding: of the tap itself; else: of its channel's plane
  int32_t y, x;
};

// The window of an output position. `y` and `x` (its corner) are negative inside the top and left padding.
struct Window {
  int64_t offset; // elements; zero padding: of the corner (may lie before the tensor); else: of the image
  int32_t y, x;
};

struct OutputPosition {
  int64_t image;
  int64_t pixel; // y * out_width + x
};

// Calls with zero padding address by one addition; the other modes map each coordinate into the image.
template <bool ZeroPadding>
FXSPARSE_DEVICE Tap tap_of_column(const Conv2dGeometry &g, int64_t first_channel, int32_t column) {
  const int32_t kernel_width = static_cast<int32_t>(g.kernel_width);
  const int32_t row = column / kernel_width;
  const int32_t channel = row / static_cast<int32_t>(g.kernel_height);
  const int32_t r = row - channel * static_cast<int32_t>(g.kernel_height);
  const int32_t s = column - row * kernel_width;
  Tap tap;
  // A tap lies inside the padded input, whose sizes fit in 31 bits.
  tap.y = static_cast<int32_t>(r * g.dilation_y);
  tap.x = static_cast<int32_t>(s * g.dilation_x);
  tap.offset = (first_channel + channel) * g.in_height * g.in_width;
  if constexpr (ZeroPadding)
    tap.offset += tap.y * g.in_width + tap.x;
  return tap;
}

FXSPARSE_DEVICE OutputPosition output_position(const Conv2dGeometry &g, int64_t index) {
  const int64_t area = g.out_height * g.out_width;
  const int64_t image = index / area;
  return {image, index - image * area};
}

template <bool ZeroPadding>
FXSPARSE_DEVICE Window window_of_position(const Conv2dGeometry &g, const OutputPosition &position) {
  const int64_t out_y = position.pixel / g.out_width;
  const int64_t out_x = position.pixel - out_y * g.out_width;
  Window window;
  window.y = static_cast<int32_t>(out_y * g.stride_y - g.pad_top);
  window.x = static_cast<int32_t>(out_x * g.stride_x - g.pad_left);
  window.offset = position.image * g.in_channels * g.in_height * g.in_width;
  if constexpr (ZeroPadding)
    window.offset += window.y * g.in_width + window.x;
  return window;
}

// The checks on padding (reflect: less than the size, circular: at most the size) make one step enough.
FXSPARSE_DEVICE int32_t index_inside(PaddingMode mode, int32_t index, int32_t size) {
  const int32_t last = size - 1;
  if (mode == PaddingMode::kReplicate)
    return index < 0 ? 0 : (index > last ? last : index);
  if (mode == PaddingMode::kReflect)
    return index < 0 ? -index : (index > last ? last - (index - last) : index);
  return index < 0 ? index + size : (index > last ? index - size : index);
}

template <typename Accumulator, bool ZeroPadding, typename T>
FXSPARSE_DEVICE Accumulator gather(const Conv2dGeometry &g, const T *input, const Window &window, const Tap &tap) {
  const int32_t y = window.y + tap.y, x = window.x + tap.x;
  const int32_t height = static_cast<int32_t>(g.in_height), width = static_cast<int32_t>(g.in_width);
  if constexpr (ZeroPadding) {
    const bool inside = static_cast<uint32_t>(y) < static_cast<uint32_t>(height) &&
                        static_cast<uint32_t>(x) < static_cast<uint32_t>(width);
    return inside ? static_cast<Accumulator>(input[window.offset + tap.offset]) : Accumulator(0);
  } else {
    const int64_t row = index_inside(g.padding_mode, y, height);
    return static_cast<Accumulator>(
        input[window.offset + tap.offset + row * width + index_inside(g.padding_mode, x, width)]);
  }
}

} // namespace fxsparse::cuda
