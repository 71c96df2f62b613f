// Changes of layout between torch's images and batch-innermost ones, the first maximum pooling on the way.
//
// Two kernels. `move_tiles` transposes 8 images x 8 channels of 16-bit elements in registers; it needs channels_last
// and channels in eights. `transpose` takes everything else through shared memory, in tiles of 64 images x 64 elements
// of an image. Both are bound by memory: one read and one write of the images (of the larger side, where it pools).
#include "batch_inner.h"
#include "overlapping_launch.h"
#include "packed_pairs.h"

#include <algorithm>

namespace fxsparse::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kSide = 64; // of a tile in shared memory

// Elements of one image in torch's order; an image is `elements` of them. As batch-innermost, element (c, h, w) is row
// (h * W + w) * C + c: the same number where torch has channels_last.
struct Transpose {
  int64_t batch, padded_batch, elements;
  uint32_t channels, plane;
  bool channels_last;
};

__device__ __forceinline__ int64_t row_of(const Transpose &t, int64_t element) {
  if (t.channels_last)
    return element;
  // A division of 64 bits takes longer than the loads that wait for it.
  const bool small = t.elements <= UINT32_MAX;
  const int64_t channel = small ? uint32_t(element) / t.plane : element / t.plane;
  return (element - channel * t.plane) * t.channels + channel;
}

// Word: an unsigned integer of the elements' size.
template <typename Word, bool kInward>
__global__ void __launch_bounds__(kThreads)
    transpose(const Transpose t, const Word *__restrict__ input, Word *__restrict__ output) {
  // 33 words of 4 bytes (or 65) apart, so that a warp reads a column without bank conflicts.
  __shared__ Word tile[kSide][kSide + 4 / sizeof(Word)]; // [image][element]
  wait_for_earlier_kernels();
  const int64_t first = int64_t(blockIdx.x) * kSide, first_image = int64_t(blockIdx.y) * kSide;
  const int lane = threadIdx.x % kSide, line = threadIdx.x / kSide;
  constexpr int kLines = kThreads / kSide;
#pragma unroll // all loads are under way before the first is stored
  for (int k = 0; k < kSide / kLines; ++k) {
    const int i = line + k * kLines;
    if constexpr (kInward) {
      const int64_t image = first_image + i, element = first + lane;
      tile[i][lane] = image < t.batch && element < t.elements ? input[image * t.elements + element] : Word(0);
    } else {
      const int64_t image = first_image + lane, element = first + i;
      Word word(0);
      if (image < t.batch && element < t.elements)
        word = input[row_of(t, element) * t.padded_batch + image];
      tile[lane][i] = word;
    }
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kSide / kLines; ++k) {
    const int i = line + k * kLines;
    if constexpr (kInward) {
      const int64_t image = first_image + lane, element = first + i;
      if (image < t.padded_batch && element < t.elements)
        output[row_of(t, element) * t.padded_batch + image] = tile[lane][i];
    } else {
      const int64_t image = first_image + i, element = first + lane;
      if (image < t.batch && element < t.elements)
        output[image * t.elements + element] = tile[i][lane];
    }
  }
}

template <typename Word, bool kInward>
cudaError_t launch_transpose(const Images &images, ImageLayout layout, const void *input, void *output,
                             cudaStream_t stream) {
  const int64_t plane = images.height * images.width;
  const Transpose t = {images.batch,
                       padded_batch(images.batch),
                       images.channels * plane,
                       uint32_t(images.channels),
                       uint32_t(plane),
                       layout == ImageLayout::kChannelsLast || plane == 1};
  const dim3 grid((t.elements + kSide - 1) / kSide, (t.padded_batch + kSide - 1) / kSide);
  return launch_overlapping(transpose<Word, kInward>, grid, kThreads, stream, t, static_cast<const Word *>(input),
                            static_cast<Word *>(output));
}

// A warp takes `1 << images` chunks of eight images, `1 << channels` chunks of eight channels, and positions with the
// lanes that are left, so that both sides are read and written in long runs.
struct Lanes {
  int images, channels, positions; // log2
};

Lanes lanes_of(int64_t image_chunks, int64_t channel_chunks) {
  const auto log2 = [](int64_t most, int limit) {
    int bits = 0;
    while (bits < limit && 2 << bits <= most)
      ++bits;
    return bits;
  };
  const int images = log2(image_chunks, 3);
  const int channels = log2(channel_chunks, 5 - images);
  return {images, channels, 5 - images - channels};
}

// Eight by eight 16-bit elements: row i, element j becomes row j, element i.
__device__ __forceinline__ void transpose_eight(const uint4 (&rows)[8], uint4 (&columns)[8]) {
  const uint32_t *words = reinterpret_cast<const uint32_t *>(rows);
  uint32_t *result = reinterpret_cast<uint32_t *>(columns);
#pragma unroll
  for (int j = 0; j < 8; ++j)
#pragma unroll
    for (int pair = 0; pair < 4; ++pair)
      result[j * 4 + pair] = __byte_perm(words[pair * 8 + j / 2], words[pair * 8 + 4 + j / 2], j % 2 ? 0x7632 : 0x5410);
}

struct Place { // of a thread: its eight images, its eight channels, and its position
  int64_t image, channel, position;
  bool inside;
};

__device__ __forceinline__ Place place_of(const Lanes &lanes, int64_t padded_batch, int64_t channels,
                                          int64_t positions) {
  const uint32_t lane = threadIdx.x % 32, warp = blockIdx.x * kWarps + threadIdx.x / 32;
  const uint32_t image_tiles = (uint32_t(padded_batch / 8) + (1u << lanes.images) - 1) >> lanes.images;
  const uint32_t channel_tiles = (uint32_t(channels / 8) + (1u << lanes.channels) - 1) >> lanes.channels;
  const uint32_t image = (warp % image_tiles << lanes.images) + (lane & ((1u << lanes.images) - 1));
  const uint32_t rest = warp / image_tiles;
  const uint32_t channel =
      (rest % channel_tiles << lanes.channels) + (lane >> lanes.images & ((1u << lanes.channels) - 1));
  const uint32_t position = (rest / channel_tiles << lanes.positions) + (lane >> (lanes.images + lanes.channels));
  return {int64_t(image) * 8, int64_t(channel) * 8, position,
          image * 8 < padded_batch && channel * 8 < channels && position < positions};
}

dim3 grid_of(const Lanes &lanes, int64_t padded_batch, int64_t channels, int64_t positions) {
  const auto tiles = [](int64_t count, int bits) { return (count + (int64_t(1) << bits) - 1) >> bits; };
  const int64_t warps =
      tiles(padded_batch / 8, lanes.images) * tiles(channels / 8, lanes.channels) * tiles(positions, lanes.positions);
  return dim3((warps + kWarps - 1) / kWarps);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    pool_tiles(const MaxPool p, const Lanes lanes, const T *__restrict__ input, T *__restrict__ output) {
  wait_for_earlier_kernels();
  const int64_t padded = (p.in.batch + 7) / 8 * 8;
  const Place at = place_of(lanes, padded, p.in.channels, p.out_height * p.out_width);
  if (!at.inside)
    return;
  uint4 most[8], columns[8];
  for (uint4 &value : most)
    value = lowest<T>();
  const uint32_t y = uint32_t(at.position) / uint32_t(p.out_width);
  const uint32_t x = uint32_t(at.position) - y * uint32_t(p.out_width);
  for (int r = 0; r < int(p.kernel[0]); ++r)
    for (int s = 0; s < int(p.kernel[1]); ++s) {
      const int64_t row = y * p.stride[0] - p.pad[0] + r * p.dilation[0];
      const int64_t column = x * p.stride[1] - p.pad[1] + s * p.dilation[1];
      if (row < 0 || row >= p.in.height || column < 0 || column >= p.in.width)
        continue;
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const int64_t image = at.image + k;
        if (image < p.in.batch)
          keep_larger<T>(most[k],
                         *reinterpret_cast<const uint4 *>(
                             input + ((image * p.in.height + row) * p.in.width + column) * p.in.channels + at.channel));
      }
    }
  if (p.activation != Activation::kNone)
    for (uint4 &value : most)
      clamp<T>(value, p.activation == Activation::kRelu6);
  transpose_eight(most, columns);
#pragma unroll
  for (int c = 0; c < 8; ++c)
    *reinterpret_cast<uint4 *>(output + (at.position * p.in.channels + at.channel + c) * padded + at.image) =
        columns[c];
}

__global__ void __launch_bounds__(kThreads)
    leave_tiles(const Images images, const Lanes lanes, const uint16_t *__restrict__ input,
                uint16_t *__restrict__ output) {
  wait_for_earlier_kernels();
  const int64_t padded = (images.batch + 7) / 8 * 8, plane = images.height * images.width;
  const Place at = place_of(lanes, padded, images.channels, plane);
  if (!at.inside)
    return;
  uint4 rows[8], columns[8];
#pragma unroll
  for (int c = 0; c < 8; ++c)
    rows[c] =
        *reinterpret_cast<const uint4 *>(input + (at.position * images.channels + at.channel + c) * padded + at.image);
  transpose_eight(rows, columns);
#pragma unroll
  for (int k = 0; k < 8; ++k)
    if (at.image + k < images.batch)
      *reinterpret_cast<uint4 *>(output + ((at.image + k) * plane + at.position) * images.channels + at.channel) =
          columns[k];
}

} // namespace

bool pools_from(const Images &images, ImageLayout from, TiledType type) {
  return from == ImageLayout::kChannelsLast && images.channels % 8 == 0 && type != TiledType::kFloat;
}

cudaError_t launch_pool_to_batch_inner(const MaxPool &pool, TiledType type, const void *input, void *output,
                                       cudaStream_t stream) {
  const int64_t padded = padded_batch(pool.in.batch), positions = pool.out_height * pool.out_width;
  const Lanes lanes = lanes_of(padded / 8, pool.in.channels / 8);
  const dim3 grid = grid_of(lanes, padded, pool.in.channels, positions);
  if (type == TiledType::kHalf)
    return launch_overlapping(pool_tiles<__half>, grid, kThreads, stream, pool, lanes,
                              static_cast<const __half *>(input), static_cast<__half *>(output));
  return launch_overlapping(pool_tiles<__nv_bfloat16>, grid, kThreads, stream, pool, lanes,
                            static_cast<const __nv_bfloat16 *>(input), static_cast<__nv_bfloat16 *>(output));
}

cudaError_t launch_to_batch_inner(const Images &images, ImageLayout from, TiledType type, const void *input,
                                  void *output, cudaStream_t stream) {
  if (type == TiledType::kFloat)
    return launch_transpose<uint32_t, true>(images, from, input, output, stream);
  if (!pools_from(images, from, type))
    return launch_transpose<uint16_t, true>(images, from, input, output, stream);
  // A window of one position.
  const MaxPool pool = {images, images.height, images.width, {1, 1}, {1, 1}, {0, 0}, {1, 1}, Activation::kNone};
  return launch_pool_to_batch_inner(pool, type, input, output, stream);
}

cudaError_t launch_from_batch_inner(const Images &images, ImageLayout to, TiledType type, const void *input,
                                    void *output, cudaStream_t stream) {
  if (type == TiledType::kFloat)
    return launch_transpose<uint32_t, false>(images, to, input, output, stream);
  if (!pools_from(images, to, type))
    return launch_transpose<uint16_t, false>(images, to, input, output, stream);
  const int64_t padded = padded_batch(images.batch);
  const Lanes lanes = lanes_of(padded / 8, images.channels / 8);
  const dim3 grid = grid_of(lanes, padded, images.channels, images.height * images.width);
  return launch_overlapping(leave_tiles, grid, kThreads, stream, images, lanes, static_cast<const uint16_t *>(input),
                            static_cast<uint16_t *>(output));
}

} // namespace fxsparse::cuda
