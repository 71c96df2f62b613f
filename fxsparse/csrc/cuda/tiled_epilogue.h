// What the tiled kernels do with a sum before it is stored, and conversions of pairs.
#pragma once

#include "../conv2d_geometry.h"

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace fxsparse::cuda {

// Limits that keep NaN, as torch does (fmaxf and fminf drop it).
__device__ __forceinline__ float clamp_keeping_nan(float value, float low, float high) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(value), "f"(low));
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(result), "f"(high));
  return result;
}

// Applies an activation to some sums; the branch is uniform over the grid.
template <int kCount> __device__ __forceinline__ void activate(Activation activation, float (&values)[kCount]) {
  if (activation == Activation::kRelu || activation == Activation::kRelu6) {
    const float high = activation == Activation::kRelu ? __int_as_float(0x7f800000) : 6.f;
#pragma unroll
    for (float &value : values)
      value = clamp_keeping_nan(value, 0.f, high);
  } else if (activation == Activation::kSilu) {
#pragma unroll
    for (float &value : values)
      value = value / (1.f + expf(-value));
  } else if (activation == Activation::kHardswish) {
#pragma unroll
    for (float &value : values)
      value = value * clamp_keeping_nan(value + 3.f, 0.f, 6.f) / 6.f;
  }
}

// The same for sums that are rounded to 16 bits next: a few instructions a value, wrong by a few units of float's last
// place. What takes code takes instruction fetches from everything else.
template <int kCount> __device__ __forceinline__ void activate_rounded(Activation activation, float (&values)[kCount]) {
  if (activation == Activation::kRelu || activation == Activation::kRelu6) {
    const float high = activation == Activation::kRelu ? __int_as_float(0x7f800000) : 6.f;
#pragma unroll
    for (float &value : values)
      value = clamp_keeping_nan(value, 0.f, high);
  } else if (activation == Activation::kSilu) {
#pragma unroll
    for (float &value : values)
      value = __fdividef(value, 1.f + __expf(-value));
  } else if (activation == Activation::kHardswish) {
#pragma unroll
    for (float &value : values)
      value = value * (1.f / 6.f) * clamp_keeping_nan(value + 3.f, 0.f, 6.f);
  }
}

template <typename T> __device__ __forceinline__ float widen(T value) { return static_cast<float>(value); }

template <typename T> struct Pair;

template <> struct Pair<__nv_bfloat16> {
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t &>(pair);
  }
  static __device__ __forceinline__ float2 unpack(uint32_t pair) {
    return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162 &>(pair));
  }
};

template <> struct Pair<__half> {
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t &>(pair);
  }
  static __device__ __forceinline__ float2 unpack(uint32_t pair) {
    return __half22float2(reinterpret_cast<const __half2 &>(pair));
  }
};

} // namespace fxsparse::cuda
