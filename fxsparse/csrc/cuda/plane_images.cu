#include "overlapping_launch.h"
#include "plane_images.h"
#include "tiled_epilogue.h"
#include "tiled_gather.h"
#include "with_type.h"

#include <climits>

namespace fxsparse::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// Strides in 32 bits.
struct Steps {
  uint32_t row, channel, image, x;

  static Steps of(const ImageStrides &s) {
    return {uint32_t(s.row), uint32_t(s.channel), uint32_t(s.image), uint32_t(s.x)};
  }
};

// The elements of some images in the order [batch][channels][height][width], a thread each.
struct Elements {
  uint32_t count;
  Divider by_width, by_height, by_channels;

  static Elements of(const Images &i) {
    return {uint32_t(i.batch * i.channels * i.height * i.width), Divider::by(i.width), Divider::by(i.height),
            Divider::by(i.channels)};
  }
};

struct Element {
  int image, channel, y, x;

  __device__ __forceinline__ uint32_t in(const Steps &s) const {
    return uint32_t(image) * s.image + uint32_t(channel) * s.channel + uint32_t(y) * s.row + uint32_t(x) * s.x;
  }
};

__device__ __forceinline__ Element element(const Elements &all, uint32_t index) {
  const int row = all.by_width(int(index)), plane = all.by_height(row), image = all.by_channels(plane);
  return {image, plane - image * int(all.by_channels.divisor), row - plane * int(all.by_height.divisor),
          int(index) - row * int(all.by_width.divisor)};
}

unsigned blocks(uint32_t threads) { return (threads + kThreads - 1) / kThreads; }

// NaN wins, as in torch.
template <typename T> __device__ __forceinline__ T larger_of(T most, T value) {
  const float a = float(most), b = float(value);
  return b > a || b != b ? value : most;
}

// kSide: of a square window that is known when this is compiled, so that all of it is loaded before the first is
// compared; or 0.
template <typename T, int kSide>
__global__ void __launch_bounds__(kThreads)
    max_pool(const MaxPool p, const Elements all, const Steps from, const Steps to, const T *input, T *output) {
  let_next_kernel_begin();
  const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
  if (index >= all.count)
    return;
  const Element e = element(all, index);
  const int height = int(p.in.height), width = int(p.in.width);
  const int top = e.y * int(p.stride[0]) - int(p.pad[0]), left = e.x * int(p.stride[1]) - int(p.pad[1]);
  const T lowest = T(-__int_as_float(0x7f800000));
  const auto tap = [&](int r, int s) {
    const Element at = {e.image, e.channel, top + r * int(p.dilation[0]), left + s * int(p.dilation[1])};
    const bool inside = uint32_t(at.y) < uint32_t(height) && uint32_t(at.x) < uint32_t(width);
    return inside ? input[at.in(from)] : lowest;
  };
  wait_after_trigger();
  T most = lowest;
  if constexpr (kSide > 0) {
    T window[kSide * kSide];
#pragma unroll
    for (int k = 0; k < kSide * kSide; ++k)
      window[k] = tap(k / kSide, k % kSide);
#pragma unroll
    for (const T value : window)
      most = larger_of(most, value);
  } else {
    for (int r = 0; r < int(p.kernel[0]); ++r)
      for (int s = 0; s < int(p.kernel[1]); ++s)
        most = larger_of(most, tap(r, s));
  }
  output[e.in(to)] = most;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) add(const Elements all, const Steps from, const Steps added, const Steps to,
                                                Activation activation, const T *input, const T *other, T *output) {
  let_next_kernel_begin();
  const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
  if (index >= all.count)
    return;
  const Element e = element(all, index);
  wait_after_trigger();
  float sum[1] = {float(input[e.in(from)])};
  if (other != nullptr)
    sum[0] += float(other[e.in(added)]);
  activate(activation, sum);
  output[e.in(to)] = T(sum[0]);
}

// A warp takes a plane.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    average(const Images images, const Steps from, const Steps to, const T *input, T *output) {
  let_next_kernel_begin();
  const uint32_t plane = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t image = plane / uint32_t(images.channels), channel = plane - image * uint32_t(images.channels);
  if (image >= uint32_t(images.batch))
    return;
  const T *first = input + uint32_t(image * from.image + channel * from.channel);
  const uint32_t width = uint32_t(images.width), positions = uint32_t(images.height) * width;
  wait_after_trigger();
  float sum = 0;
#pragma unroll 4
  for (uint32_t position = lane; position < positions; position += 32) {
    const uint32_t y = position / width;
    sum += float(first[y * from.row + (position - y * width) * from.x]);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2)
    sum += __shfl_xor_sync(~0u, sum, step);
  if (lane == 0)
    output[uint32_t(channel * to.channel + image * to.image)] = T(sum / float(positions));
}

} // namespace

ImageStrides strides_in_torch(const Images &images, ImageLayout layout) {
  const int64_t plane = images.height * images.width, image = images.channels * plane;
  if (layout == ImageLayout::kChannelsLast)
    return {images.width * images.channels, 1, image, images.channels};
  return {images.width, plane, image, 1};
}

bool are_few(const Images &images) {
  const auto count = static_cast<__int128>(images.batch) * images.channels * images.height * images.width;
  return count <= INT_MAX / 4; // with rows of an even pitch, and sums of two positions, too
}

cudaError_t launch_plane_max_pool(const MaxPool &pool, const ImageStrides &from, const ImageStrides &to, TiledType type,
                                  bool overlap, const void *input, void *output, cudaStream_t stream) {
  const Elements all = Elements::of({pool.in.batch, pool.in.channels, pool.out_height, pool.out_width});
  return with_type(type, [&](auto value) {
    using T = decltype(value);
    const auto side = [&](int64_t size) { return pool.kernel[0] == size && pool.kernel[1] == size; };
    const auto kernel = side(3) ? max_pool<T, 3> : side(2) ? max_pool<T, 2> : max_pool<T, 0>;
    return launch_if_overlapping(overlap, kernel, dim3(blocks(all.count)), kThreads, 0, stream, pool, all,
                                 Steps::of(from), Steps::of(to), static_cast<const T *>(input),
                                 static_cast<T *>(output));
  });
}

cudaError_t launch_plane_average(const Images &images, const ImageStrides &from, const ImageStrides &to, TiledType type,
                                 bool overlap, const void *input, void *output, cudaStream_t stream) {
  return with_type(type, [&](auto value) {
    using T = decltype(value);
    const unsigned grid = unsigned((images.channels * images.batch + kWarps - 1) / kWarps);
    return launch_if_overlapping(overlap, average<T>, dim3(grid), kThreads, 0, stream, images, Steps::of(from),
                                 Steps::of(to), static_cast<const T *>(input), static_cast<T *>(output));
  });
}

cudaError_t launch_plane_add(const Images &images, const ImageStrides &from, const ImageStrides &added,
                             const ImageStrides &to, Activation activation, TiledType type, bool overlap,
                             const void *input, const void *other, void *output, cudaStream_t stream) {
  const Elements all = Elements::of(images);
  return with_type(type, [&](auto value) {
    using T = decltype(value);
    return launch_if_overlapping(overlap, add<T>, dim3(blocks(all.count)), kThreads, 0, stream, all, Steps::of(from),
                                 Steps::of(added), Steps::of(to), activation, static_cast<const T *>(input),
                                 static_cast<const T *>(other), static_cast<T *>(output));
  });
}

} // namespace fxsparse::cuda
