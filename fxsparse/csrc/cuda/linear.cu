// Tile: 16 outputs x 8 images a CTA; its eight warps share the channels, 16 at a time, and their sums meet in shared
// memory. The weight is read as torch stores it, straight into mma.sync's registers; float32 by plain products.
//
// Roofline: ten classes of 512 channels are 10 KB of weights and nothing to compute, so latencies bind: of a launch, of
// one load of weights (under the end of the kernel before) and of one of images. Large layers are better left to
// cuBLAS.
#include "linear.h"
#include "overlapping_launch.h"
#include "tiled_mma_kernel.h"
#include "with_type.h"

namespace fxsparse::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kRows = 16, kImages = 8, kStep = 16; // of one product
constexpr int kAhead = 4;                          // products whose weights are loaded at once

// Two values beside each other along the channels, zeros behind the last.
template <typename T>
__device__ __forceinline__ uint32_t load_pair(const T *row, int64_t stride, int first, int channels, bool real) {
  static_assert(sizeof(T) == 2);
  const auto one = [&](int channel) {
    const bool there = real && channel < channels;
    return there ? uint32_t(reinterpret_cast<const uint16_t *>(row)[channel * stride]) : 0u;
  };
  return one(first) | one(first + 1) << 16;
}

// A product's weights: rows g and g + 8, channels 2t, 2t + 1 and 8 more, of lane 4g + t.
template <typename T>
__device__ __forceinline__ void load_weights(uint32_t (&a)[4], const Linear &call, const T *weight, int row,
                                             int channel) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int own = row + i % 2 * 8, first = channel + i / 2 * 8;
    const T *from = weight + own * call.channels;
    const bool real = own < call.outputs;
    if (call.channels % 2 == 0) // pairs are aligned
      a[i] = real && first < call.channels ? __ldg(reinterpret_cast<const uint32_t *>(from + first)) : 0;
    else
      a[i] = load_pair(from, 1, first, int(call.channels), real);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    linear(const Linear call, const T *input, const T *__restrict__ weight, const T *__restrict__ bias, T *output) {
  __shared__ float parts[kWarps][kImages][kRows + 1];
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, group = lane / 4, pair = lane % 4;
  const int first_image = int(blockIdx.x) * kImages, first_row = int(blockIdx.y) * kRows;
  const int channels = int(call.channels);
  float sums[4] = {}; // rows g (0, 1) and g + 8 (2, 3), images 2t (0, 2) and 2t + 1 (1, 3)
  if constexpr (sizeof(T) == 2) {
    const int image = first_image + group;
    const bool real = image < call.images;
    const T *own = input + (real ? image * call.in.image : 0);
    uint32_t a[kAhead][4];
    const auto load = [&](int first) {
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
        load_weights(a[j], call, weight, first_row + group, first + j * kWarps * kStep + pair * 2);
    };
    load(warp * kStep);
    let_next_kernel_begin();
    wait_after_trigger();
#pragma unroll 1
    for (int first = warp * kStep; first < channels; first += kAhead * kWarps * kStep) {
      if (first >= kWarps * kStep)
        load(first);
      uint32_t b[kAhead][2];
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          b[j][i] = load_pair(own, call.in.channel, first + j * kWarps * kStep + pair * 2 + i * 8, channels, real);
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
        multiply_fragments<T>(sums, a[j], b[j][0], b[j][1]);
    }
  } else {
    let_next_kernel_begin();
    wait_after_trigger();
#pragma unroll 4
    for (int channel = warp; channel < channels; channel += kWarps) {
      float w[2], x[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = first_row + group + i * 8, image = first_image + pair * 2 + i;
        w[i] = row < call.outputs ? __ldg(weight + row * call.channels + channel) : 0;
        x[i] = image < call.images ? input[image * call.in.image + channel * call.in.channel] : 0;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums[i] = fmaf(w[i / 2], x[i % 2], sums[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    parts[warp][pair * 2 + i % 2][group + i / 2 * 8] = sums[i];
  __syncthreads();
  if (threadIdx.x >= kRows * kImages)
    return;
  const int row = first_row + int(threadIdx.x) % kRows, image = first_image + int(threadIdx.x) / kRows;
  if (row >= call.outputs || image >= call.images)
    return;
  float sum = bias == nullptr ? 0.f : float(__ldg(bias + row));
#pragma unroll
  for (int w = 0; w < kWarps; ++w)
    sum += parts[w][threadIdx.x / kRows][threadIdx.x % kRows];
  output[image * call.out.image + row * call.out.channel] = T(sum);
}

} // namespace

cudaError_t launch_linear(const Linear &call, const LinearTensors &tensors, cudaStream_t stream) {
  return with_type(call.type, [&](auto value) {
    using T = decltype(value);
    const dim3 grid(unsigned((call.images + kImages - 1) / kImages), unsigned((call.outputs + kRows - 1) / kRows));
    return launch_if_overlapping(call.overlap, linear<T>, grid, kThreads, 0, stream, call,
                                 static_cast<const T *>(tensors.input), static_cast<const T *>(tensors.weight),
                                 static_cast<const T *>(tensors.bias), static_cast<T *>(tensors.output));
  });
}

} // namespace fxsparse::cuda
