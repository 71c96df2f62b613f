// What a warp of the kernel for few images gathers, and how it multiplies that with the weights of its rows.
#pragma once

#include "plane_call.h"
#include "tiled_float_product.h"
#include "tiled_mma_kernel.h"

namespace fxsparse::cuda {

// Four columns of a chunk at one position, for each of a warp's units of eight positions.
template <typename T, int kUnits> struct Gathered {
  T values[kUnits][4];

  // `columns`: a lane's, decoded.
  __device__ __forceinline__ void load(const T *input, const Position (&positions)[kUnits], const Column *columns) {
    const uint4 two[2] = {reinterpret_cast<const uint4 *>(columns)[0], reinterpret_cast<const uint4 *>(columns)[1]};
    const Column own[4] = {{two[0].x, two[0].y}, {two[0].z, two[0].w}, {two[1].x, two[1].y}, {two[1].z, two[1].w}};
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int u = 0; u < kUnits; ++u)
        values[u][k] = positions[u].meets(own[k]) ? input[positions[u].base + own[k].offset] : T(0.f);
  }
};

// Sums of kRows x 8 positions in a warp's registers, and how to multiply a chunk. `kTf32`: float32 in TF32.
template <typename T, int kRows, bool kTf32> struct PlaneProduct {
  static constexpr int kParts = kRows / 16;
  static constexpr bool kHoldsPairs = true; // a lane: 2t and 2t + 1
  // The row of a lane's i-th pair.
  static __device__ __forceinline__ int row(int i, int lane) { return i * 8 + lane / 4; }
  float sums[kParts][4] = {};

  struct Weights {
    uint2 values[kParts][2];

    // `of`: the tile's values, from its first row on.
    __device__ __forceinline__ void load(const void *of, int chunk, int tile_rows, int lane) {
      const uint2 *from =
          static_cast<const uint2 *>(of) + ((chunk * 2 + lane % 4 / 2) * tile_rows + lane / 4) * 2 + lane % 2;
#pragma unroll
      for (int m = 0; m < kParts; ++m) {
        values[m][0] = __ldg(from + m * 32);
        values[m][1] = __ldg(from + m * 32 + 16);
      }
    }
  };

  static __device__ __forceinline__ const void *values_of(const TiledWeight &weight, const RowTile &tile, int row) {
    return static_cast<const uint4 *>(weight.values) + tile.first_value / 8 + row;
  }

  static __device__ __forceinline__ uint32_t pair(T low, T high) {
    return uint32_t(reinterpret_cast<const uint16_t &>(low)) | uint32_t(reinterpret_cast<const uint16_t &>(high)) << 16;
  }

  __device__ __forceinline__ void multiply(const Weights &weights, const T (&gathered)[4], int) {
    const uint32_t b[2] = {pair(gathered[0], gathered[1]), pair(gathered[2], gathered[3])};
#pragma unroll
    for (int m = 0; m < kParts; ++m) {
      const uint2 &upper = weights.values[m][0], &lower = weights.values[m][1];
      const uint32_t a[4] = {upper.x, lower.x, upper.y, lower.y};
      multiply_fragments<T>(sums[m], a, b[0], b[1]);
    }
  }

  // `to`: [kRows][pitch], from the unit's first position on.
  __device__ __forceinline__ void store(float *to, int pitch, int lane) const {
#pragma unroll
    for (int i = 0; i < kParts * 2; ++i)
      *reinterpret_cast<float2 *>(to + row(i, lane) * pitch + lane % 4 * 2) =
          make_float2(sums[i / 2][i % 2 * 2], sums[i / 2][i % 2 * 2 + 1]);
  }
};

// In TF32. A lane takes four rows at once, so its rows of 32 are 4g to 4g + 3 (tiled_float_product.h), and what the
// instruction means by columns t and t + 4 are two of its own four.
template <int kRows> struct PlaneProduct<float, kRows, true> {
  static constexpr int kParts = kRows / 16;
  static constexpr bool kHoldsPairs = true;
  static __device__ __forceinline__ int row(int i, int lane) { return i / 4 * 32 + lane / 4 * 4 + i % 4; }
  float sums[kParts][4] = {};

  struct Weights {
    float4 values[kRows / 32][4]; // four rows of each column

    __device__ __forceinline__ void load(const void *of, int chunk, int tile_rows, int lane) {
      const float *from =
          static_cast<const float *>(of) + int64_t(chunk * kPlaneChunk + lane % 4 * 4) * tile_rows + lane / 4 * 4;
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int m = 0; m < kRows / 32; ++m)
          values[m][k] = __ldg(reinterpret_cast<const float4 *>(from + k * tile_rows + m * 32));
    }
  };

  static __device__ __forceinline__ const void *values_of(const TiledWeight &weight, const RowTile &tile, int row) {
    return static_cast<const float *>(weight.values) + tile.first_value + row;
  }

  __device__ __forceinline__ void multiply(const Weights &weights, const float (&gathered)[4], int) {
#pragma unroll
    for (int k = 0; k < 4; k += 2) {
      const float b0 = rounded_to_tf32(gathered[k]), b1 = rounded_to_tf32(gathered[k + 1]);
#pragma unroll
      for (int m = 0; m < kRows / 32; ++m) {
        const float4 &first = weights.values[m][k], &second = weights.values[m][k + 1];
        float (&even)[4] = sums[m * 2], (&odd)[4] = sums[m * 2 + 1];
        multiply_tf32(even[0], even[1], even[2], even[3], rounded_to_tf32(first.x), rounded_to_tf32(first.y),
                      rounded_to_tf32(second.x), rounded_to_tf32(second.y), b0, b1);
        multiply_tf32(odd[0], odd[1], odd[2], odd[3], rounded_to_tf32(first.z), rounded_to_tf32(first.w),
                      rounded_to_tf32(second.z), rounded_to_tf32(second.w), b0, b1);
      }
    }
  }

  __device__ __forceinline__ void store(float *to, int pitch, int lane) const {
#pragma unroll
    for (int i = 0; i < kParts * 2; ++i)
      *reinterpret_cast<float2 *>(to + row(i, lane) * pitch + lane % 4 * 2) =
          make_float2(sums[i / 2][i % 2 * 2], sums[i / 2][i % 2 * 2 + 1]);
  }
};

// Exact: without tensor cores. Lane 4g + t sums a quarter of the rows, from t on, at position g.
template <int kRows> struct PlaneProduct<float, kRows, false> {
  static constexpr int kOwn = kRows / 4;
  static constexpr bool kHoldsPairs = false;
  float sums[kOwn] = {};

  struct Weights {
    const float *values;
    int tile_rows;

    __device__ __forceinline__ void load(const void *of, int chunk, int rows, int lane) {
      values = static_cast<const float *>(of) + int64_t(chunk) * kPlaneChunk * rows + lane % 4 * kOwn;
      tile_rows = rows;
    }
  };

  static __device__ __forceinline__ const void *values_of(const TiledWeight &weight, const RowTile &tile, int row) {
    return static_cast<const float *>(weight.values) + tile.first_value + row;
  }

  __device__ __forceinline__ void multiply(const Weights &weights, const float (&gathered)[4], int lane) {
#pragma unroll 1
    for (int owner = 0; owner < 4; ++owner)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float value = __shfl_sync(~0u, gathered[k], (lane & ~3) + owner);
        const float4 *from = reinterpret_cast<const float4 *>(weights.values + (owner * 4 + k) * weights.tile_rows);
#pragma unroll
        for (int i = 0; i < kOwn / 4; ++i) {
          const float4 four = __ldg(from + i);
          sums[i * 4] = fmaf(four.x, value, sums[i * 4]);
          sums[i * 4 + 1] = fmaf(four.y, value, sums[i * 4 + 1]);
          sums[i * 4 + 2] = fmaf(four.z, value, sums[i * 4 + 2]);
          sums[i * 4 + 3] = fmaf(four.w, value, sums[i * 4 + 3]);
        }
      }
  }

  __device__ __forceinline__ void store(float *to, int pitch, int lane) const {
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
      to[(lane % 4 * kOwn + i) * pitch + lane / 4] = sums[i];
  }
};

} // namespace fxsparse::cuda
