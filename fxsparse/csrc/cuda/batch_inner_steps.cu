// Poolings and additions of batch-innermost images. A position is one line of channels x images, so every thread takes
// 16 bytes of it and a warp 512 in a row; all are bound by memory.
#include "batch_inner.h"
#include "conv2d_kernel.h"
#include "overlapping_launch.h"
#include "packed_pairs.h"
#include "with_type.h"

namespace fxsparse::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T> inline constexpr int kVector = 16 / sizeof(T);

template <typename T> __device__ __forceinline__ void unpack(const uint4 &from, float (&values)[kVector<T>]) {
  const T *elements = reinterpret_cast<const T *>(&from);
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i)
    values[i] = float(elements[i]);
}

template <typename T> __device__ __forceinline__ uint4 packed(const float (&values)[kVector<T>]) {
  uint4 result;
  T *elements = reinterpret_cast<T *>(&result);
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i)
    elements[i] = T(values[i]);
  return result;
}

// `line`: vectors of one position. kSide: of a square window that is known when this is compiled, so that all of it is
// loaded before the first is compared; or 0.
template <typename T, int kSide>
__global__ void __launch_bounds__(kThreads)
    max_pool(const MaxPool p, int64_t line, const uint4 *__restrict__ input, uint4 *__restrict__ output) {
  wait_for_earlier_kernels();
  const int64_t place = int64_t(blockIdx.y) * kThreads + threadIdx.x;
  if (place >= line)
    return;
  const uint32_t position = blockIdx.x, y = position / uint32_t(p.out_width), x = position - y * uint32_t(p.out_width);
  uint4 most = lowest<T>();
  const auto tap = [&](int r, int s) {
    const int64_t row = y * p.stride[0] - p.pad[0] + r * p.dilation[0];
    const int64_t column = x * p.stride[1] - p.pad[1] + s * p.dilation[1];
    const bool inside = row >= 0 && row < p.in.height && column >= 0 && column < p.in.width;
    return inside ? input[(row * p.in.width + column) * line + place] : lowest<T>();
  };
  if constexpr (kSide > 0) {
    uint4 window[kSide * kSide];
#pragma unroll
    for (int k = 0; k < kSide * kSide; ++k)
      window[k] = tap(k / kSide, k % kSide);
#pragma unroll
    for (const uint4 &value : window)
      keep_larger<T>(most, value);
  } else {
    for (int r = 0; r < int(p.kernel[0]); ++r)
      for (int s = 0; s < int(p.kernel[1]); ++s)
        keep_larger<T>(most, tap(r, s));
  }
  if (p.activation != Activation::kNone)
    clamp<T>(most, p.activation == Activation::kRelu6);
  output[int64_t(position) * line + place] = most;
}

// Each warp sums the positions of its own for 32 vectors, then the first one sums over the warps. `images`: how many
// there are where the means are stored as torch does, [images][channels], and 0 where batch-innermost.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    average(int64_t positions, int64_t line, int64_t images, const uint4 *__restrict__ input, T *__restrict__ output) {
  constexpr int kWarps = kThreads / 32;
  __shared__ float parts[kWarps][32][kVector<T> + 1];
  wait_for_earlier_kernels();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t place = int64_t(blockIdx.x) * 32 + lane;
  float sums[kVector<T>] = {}, values[kVector<T>];
  if (place < line) {
#pragma unroll 8
    for (int64_t position = warp; position < positions; position += kWarps) {
      unpack<T>(input[position * line + place], values);
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i)
        sums[i] += values[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i)
    parts[warp][lane][i] = sums[i];
  __syncthreads();
  if (warp > 0 || place >= line)
    return;
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) {
    for (int other = 1; other < kWarps; ++other)
      sums[i] += parts[other][lane][i];
    sums[i] /= float(positions);
  }
  if (images == 0) {
    reinterpret_cast<uint4 *>(output)[place] = packed<T>(sums);
    return;
  }
  const int64_t vectors = (images + 7) / 8 * 8 / kVector<T>; // of one channel
  const int64_t first = place % vectors * kVector<T>, channel = place / vectors, channels = line / vectors;
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i)
    if (first + i < images)
      output[(first + i) * channels + channel] = T(sums[i]);
}

template <typename T, bool kAdds>
__global__ void __launch_bounds__(kThreads) add(int64_t vectors, Activation activation, const uint4 *__restrict__ input,
                                                const uint4 *__restrict__ added, uint4 *__restrict__ output) {
  wait_for_earlier_kernels();
  const int64_t place = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (place >= vectors)
    return;
  float values[kVector<T>];
  unpack<T>(input[place], values);
  if constexpr (kAdds) {
    float others[kVector<T>];
    unpack<T>(added[place], others);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i)
      values[i] += others[i];
  }
#pragma unroll
  for (float &value : values)
    value = activate(activation, value);
  output[place] = packed<T>(values);
}

unsigned blocks(int64_t vectors) { return unsigned((vectors + kThreads - 1) / kThreads); }

const uint4 *vectors_at(const void *pointer) { return static_cast<const uint4 *>(pointer); }

} // namespace

cudaError_t launch_max_pool(const MaxPool &pool, TiledType type, const void *input, void *output, cudaStream_t stream) {
  return with_type(type, [&](auto element) {
    using T = decltype(element);
    const int64_t line = pool.in.channels * padded_batch(pool.in.batch) / kVector<T>;
    const dim3 grid(unsigned(pool.out_height * pool.out_width), blocks(line));
    const bool square = pool.kernel[0] == pool.kernel[1];
    const auto kernel = square && pool.kernel[0] == 2   ? max_pool<T, 2>
                        : square && pool.kernel[0] == 3 ? max_pool<T, 3>
                                                        : max_pool<T, 0>;
    return launch_overlapping(kernel, grid, kThreads, 0, stream, pool, line, vectors_at(input),
                              static_cast<uint4 *>(output));
  });
}

cudaError_t launch_average(const Images &images, TiledType type, const void *input, bool leaves, void *output,
                           cudaStream_t stream) {
  return with_type(type, [&](auto element) {
    using T = decltype(element);
    const int64_t line = images.channels * padded_batch(images.batch) / kVector<T>;
    return launch_overlapping(average<T>, dim3(unsigned((line + 31) / 32)), kThreads, 0, stream,
                              images.height * images.width, line, leaves ? images.batch : 0, vectors_at(input),
                              static_cast<T *>(output));
  });
}

cudaError_t launch_add(int64_t count, Activation activation, TiledType type, const void *input, const void *added,
                       void *output, cudaStream_t stream) {
  return with_type(type, [&](auto element) {
    using T = decltype(element);
    const int64_t vectors = count / kVector<T>;
    const auto kernel = added == nullptr ? add<T, false> : add<T, true>;
    return launch_overlapping(kernel, dim3(blocks(vectors)), kThreads, 0, stream, vectors, activation,
                              vectors_at(input), vectors_at(added), static_cast<uint4 *>(output));
  });
}

} // namespace fxsparse::cuda
