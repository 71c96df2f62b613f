// What a warp of the kernel for few images gathers, and how it multiplies that with the weights of its rows.
#pragma once

#include "plane_call.h"
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

// Sums of kRows x 8 positions in a warp's registers, and how to multiply a chunk.
template <typename T, int kRows> struct PlaneProduct {
  static constexpr int kParts = kRows / 16;
  static constexpr bool kHoldsPairs = true; // a lane: 2t and 2t + 1
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
      *reinterpret_cast<float2 *>(to + (i * 8 + lane / 4) * pitch + lane % 4 * 2) =
          make_float2(sums[i / 2][i % 2 * 2], sums[i / 2][i % 2 * 2 + 1]);
  }
};

// Exact: without tensor cores. Lane 4g + t sums a quarter of the rows, from t on, at position g.
template <int kRows> struct PlaneProduct<float, kRows> {
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
