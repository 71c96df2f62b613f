#include "overlapping_launch.h"
#include "row_lanes.h"
#include "row_lanes_kernels.h"
#include "with_type.h"

namespace fxsparse::cuda {
namespace {

constexpr int kWarps = kRowThreads / 32;

template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    unfold_rows(const RowUnits units, const ImageStrides strides, const RowTaps taps, int width,
                const T *__restrict__ input, uint4 *__restrict__ output) {
  wait_for_earlier_kernels();
  const uint32_t index = blockIdx.x * kRowThreads + threadIdx.x;
  if (index < units.count)
    unfold_unit<T>(index, units, strides, taps, width, input, output);
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads) leave_rows(const RowUnits units, const ImageStrides strides, int width,
                                                          const uint4 *__restrict__ input, T *__restrict__ output) {
  wait_for_earlier_kernels();
  const uint32_t index = blockIdx.x * kRowThreads + threadIdx.x;
  if (index < units.count)
    leave_unit<T>(index, units, strides, width, input, output);
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    pool_rows(const RowUnits units, const ImageStrides strides, const MaxPool pool, const T *__restrict__ input,
              uint4 *__restrict__ output) {
  wait_for_earlier_kernels();
  const uint32_t index = blockIdx.x * kRowThreads + threadIdx.x;
  if (index < units.count)
    pool_unit<T>(index, units, strides, pool, input, output);
}

// A warp takes a plane. `to`: where the means go.
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    average_rows(const Images images, const ImageStrides strides, const ImageStrides to, const T *__restrict__ input,
                 T *__restrict__ output) {
  wait_for_earlier_kernels();
  const uint32_t plane = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t image = plane % uint32_t(images.batch), channel = plane / uint32_t(images.batch);
  if (channel >= images.channels)
    return;
  const T *from = input + channel * strides.channel + image * strides.image;
  const uint32_t width = uint32_t(images.width), positions = uint32_t(images.height) * width;
  float sum = 0;
#pragma unroll 4
  for (uint32_t position = lane; position < positions; position += 32) {
    const uint32_t y = position / width;
    sum += float(from[y * strides.row + (position - y * width)]);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2)
    sum += __shfl_xor_sync(~0u, sum, step);
  if (lane == 0)
    output[channel * to.channel + image * to.image] = T(sum / float(positions));
}

template <typename T> RowUnits units_of(const Images &images, int64_t columns) {
  const int64_t lane_units = padded_width(images.width) / kUnitLanes<T>;
  const int64_t count = images.height * columns * images.channels * images.batch * lane_units;
  return {uint32_t(lane_units), uint32_t(images.batch), uint32_t(images.channels), uint32_t(columns), uint32_t(count)};
}

unsigned blocks(const RowUnits &units) { return (units.count + kRowThreads - 1) / kRowThreads; }

} // namespace

ImageStrides strides_in_row_lanes(const Images &images) {
  const int64_t image = padded_width(images.width), channel = images.batch * image;
  return {images.channels * channel, channel, image, 1};
}

ImageStrides strides_in_torch(const Images &images, ImageLayout layout) {
  const int64_t plane = images.height * images.width, image = images.channels * plane;
  if (layout == ImageLayout::kChannelsLast)
    return {images.width * images.channels, 1, image, images.channels};
  return {images.width, plane, image, 1};
}

bool reads_rows_as_they_lie(const Conv2dGeometry &g) {
  return g.kernel_width == 1 && g.stride_x == 1 && g.pad_left == 0 && g.pad_right == 0;
}

RowTaps row_taps(const Conv2dGeometry &g) {
  return {g.kernel_width, g.stride_x, g.dilation_x, g.pad_left, g.out_width};
}

Conv2dGeometry on_row_lanes(const Conv2dGeometry &geometry) {
  Conv2dGeometry g = geometry;
  g.batch = geometry.batch * padded_width(geometry.out_width);
  g.in_width = geometry.kernel_width;
  g.stride_x = g.dilation_x = g.out_width = 1;
  g.pad_left = g.pad_right = 0;
  return g;
}

cudaError_t launch_unfold(const Images &images, const ImageStrides &strides, const RowTaps &taps, TiledType type,
                          const void *input, void *output, cudaStream_t stream) {
  return with_type(type, [&](auto element) {
    using T = decltype(element);
    const RowUnits units = units_of<T>({images.batch, images.channels, images.height, taps.out_width}, taps.count);
    return launch_overlapping(unfold_rows<T>, dim3(blocks(units)), kRowThreads, 0, stream, units, strides, taps,
                              int(images.width), static_cast<const T *>(input), static_cast<uint4 *>(output));
  });
}

cudaError_t launch_from_row_lanes(const Images &images, ImageLayout to, TiledType type, const void *input, void *output,
                                  cudaStream_t stream) {
  return with_type(type, [&](auto element) {
    using T = decltype(element);
    const RowUnits units = units_of<T>(images, 1);
    return launch_overlapping(leave_rows<T>, dim3(blocks(units)), kRowThreads, 0, stream, units,
                              strides_in_torch(images, to), int(images.width), static_cast<const uint4 *>(input),
                              static_cast<T *>(output));
  });
}

cudaError_t launch_row_max_pool(const MaxPool &pool, TiledType type, const void *input, void *output,
                                cudaStream_t stream) {
  return with_type(type, [&](auto element) {
    using T = decltype(element);
    const RowUnits units = units_of<T>({pool.in.batch, pool.in.channels, pool.out_height, pool.out_width}, 1);
    return launch_overlapping(pool_rows<T>, dim3(blocks(units)), kRowThreads, 0, stream, units,
                              strides_in_row_lanes(pool.in), pool, static_cast<const T *>(input),
                              static_cast<uint4 *>(output));
  });
}

cudaError_t launch_row_average(const Images &images, TiledType type, const void *input, bool leaves, void *output,
                               cudaStream_t stream) {
  return with_type(type, [&](auto element) {
    using T = decltype(element);
    const Images means = {images.batch, images.channels, 1, 1};
    const ImageStrides to = leaves ? strides_in_torch(means, ImageLayout::kContiguous) : strides_in_row_lanes(means);
    const unsigned grid = unsigned((images.channels * images.batch + kWarps - 1) / kWarps);
    return launch_overlapping(average_rows<T>, dim3(grid), kRowThreads, 0, stream, images, strides_in_row_lanes(images),
                              to, static_cast<const T *>(input), static_cast<T *>(output));
  });
}

} // namespace fxsparse::cuda
