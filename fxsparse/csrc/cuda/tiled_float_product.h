// How the warps of tiled_float_kernel.h multiply a stage: exactly, on CUDA cores, or in TF32, on tensor cores.
//
// A CTA of eight warps computes 64 output channels x 256 / kSlices positions: kSlices groups of warps share a stage's
// columns, and their sums are added in the end. A thread's sums are kRows rows x kRuns runs of kRun positions.
#pragma once

#include "ptx.h"

namespace fxsparse::cuda {

inline constexpr int kFloatThreads = 256;

// Roofline: per column a thread reads 64 bytes of shared memory for 64 multiply-adds, a warp's reads being half
// broadcasts: the FP32 units bind.
template <int kSlices_> struct ExactProduct {
  static constexpr int kSlices = kSlices_, kUnits = 64 / kSlices;
  static constexpr int kStageColumns = kSlices == 1 ? 16 : 32;
  static constexpr int kInputPitch = kUnits * 4, kWeightFloats = kStageColumns * 64; // of a column, of a stage
  static constexpr int kRows = 8, kRuns = 2, kRun = 4;
  static constexpr int kUnitBlocks = kUnits / 16; // a warp has 32 rows x 64 positions

  static __device__ __forceinline__ int slice(int warp) { return warp / 2 / kUnitBlocks; }
  static __device__ __forceinline__ int row(int i, int warp, int lane) { return warp % 2 * 32 + lane / 8 * 8 + i; }
  static __device__ __forceinline__ int position(int n, int warp, int lane) {
    return (warp / 2 % kUnitBlocks * 16 + lane % 8 + n * 8) * 4;
  }

  // A thread's share of a stage's weights, `values` being the stage's first, from the tile's first row on.
  static __device__ __forceinline__ void copy_weights(float *stage, const float *values, int64_t tile_rows) {
    const int thread = int(threadIdx.x);
#pragma unroll
    for (int column = 0; column < kStageColumns; column += 16)
      copy_unit_async(shared_address(stage + column * 64 + thread * 4),
                      values + (column + thread / 16) * tile_rows + thread % 16 * 4, true);
  }
  static __device__ __forceinline__ void prepare_weights(float *) {}

  static __device__ __forceinline__ void multiply(float (&sums)[kRows][kRuns][kRun], const float *weights,
                                                  const float *inputs, int warp, int lane) {
    constexpr int kColumns = kStageColumns / kSlices;
    const int first = slice(warp) * kColumns;
    const float *a = weights + first * 64 + row(0, warp, lane);
    const float *b = inputs + first * kInputPitch + position(0, warp, lane);
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      float w[kRows], x[kRuns][kRun];
#pragma unroll
      for (int m = 0; m < kRows; m += 4)
        *reinterpret_cast<float4 *>(w + m) = *reinterpret_cast<const float4 *>(a + k * 64 + m);
#pragma unroll
      for (int n = 0; n < kRuns; ++n)
        *reinterpret_cast<float4 *>(x[n]) = *reinterpret_cast<const float4 *>(b + k * kInputPitch + n * 32);
#pragma unroll
      for (int m = 0; m < kRows; ++m)
#pragma unroll
        for (int n = 0; n < kRuns; ++n)
#pragma unroll
          for (int i = 0; i < kRun; ++i)
            sums[m][n][i] = fmaf(w[m], x[n][i], sums[m][n][i]);
    }
  }
};

// To TF32, to nearest: the tensor cores would cut off what is too much, all in one direction.
__device__ __forceinline__ float rounded_to_tf32(float value) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(value));
  return __uint_as_float(rounded);
}

// D[16][8] += A[16][8] B[8][8]. Lane 4g + t has A's rows g and g + 8 of column t (a0, a1) and of t + 4 (a2, a3), B's
// rows t and t + 4 of column g, and of D row g of columns 2t and 2t + 1 (d0, d1), and row g + 8 of these (d2, d3).
__device__ __forceinline__ void multiply_tf32(float &d0, float &d1, float &d2, float &d3, float a0, float a1, float a2,
                                              float a3, float b0, float b1) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)
               : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)),
                 "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

// A warp has 64 rows x 32 positions. Positions are the instruction's rows: a lane loads two of them, 2g and 2g + 1 of
// 16, and two columns at a time into registers that lie as the instruction wants them. Which two columns it means by t
// and t + 4 is free: they are half a stage apart, and the stage's weights lie in such pairs, [pair][64 rows][2].
// Pitches take the lanes that read at once to different banks.
//
// Roofline: per stage of 16 columns of the large tile 20 KB are gathered for 2^18 products. At 8 TB/s of L2 that takes
// about 590 cycles of a multiprocessor's share, shared memory 550, the products 512, the instructions 350.
template <int kSlices_> struct Tf32Product {
  static constexpr int kSlices = kSlices_, kUnits = 64 / kSlices;
  static constexpr int kStageColumns = kSlices == 1 ? 16 : 32, kPairs = kStageColumns / 2;
  static constexpr int kInputPitch = kUnits * 4 + 8, kPairPitch = 136, kWeightFloats = kPairs * kPairPitch;
  static constexpr int kRows = 16, kRuns = 2, kRun = 2;
  static constexpr int kWarpsOfSlice = 8 / kSlices, kSteps = kPairs / 4 / kSlices; // of eight columns

  static __device__ __forceinline__ int slice(int warp) { return warp / kWarpsOfSlice; }
  static __device__ __forceinline__ int row(int i, int, int lane) { return i / 2 * 8 + lane % 4 * 2 + i % 2; }
  static __device__ __forceinline__ int position(int n, int warp, int lane) {
    return warp % kWarpsOfSlice * 32 + n * 16 + lane / 4 * 2;
  }

  // Two rows of two columns, in the place where the four will lie in pairs.
  static __device__ __forceinline__ void copy_weights(float *stage, const float *values, int64_t tile_rows) {
    const int thread = int(threadIdx.x);
#pragma unroll
    for (int i = 0; i < kPairs; i += 8) {
      const int pair = i + thread / 32;
      const uint32_t to = shared_address(stage + pair * kPairPitch + thread % 32 * 4);
      const float *from = values + pair * tile_rows + thread % 32 * 2;
      copy_half_unit_async(to, from);
      copy_half_unit_async(to + 8, from + kPairs * tile_rows);
    }
  }
  // What this thread has copied itself.
  static __device__ __forceinline__ void prepare_weights(float *stage) {
    const int thread = int(threadIdx.x);
#pragma unroll
    for (int i = 0; i < kPairs; i += 8) {
      float4 *four = reinterpret_cast<float4 *>(stage + (i + thread / 32) * kPairPitch + thread % 32 * 4);
      const float4 raw = *four;
      *four =
          make_float4(rounded_to_tf32(raw.x), rounded_to_tf32(raw.z), rounded_to_tf32(raw.y), rounded_to_tf32(raw.w));
    }
  }

  static __device__ __forceinline__ void multiply(float (&sums)[kRows][kRuns][kRun], const float *weights,
                                                  const float *inputs, int warp, int lane) {
    const int first = slice(warp) * kSteps * 4 + lane % 4; // pair
    const float *a = inputs + first * kInputPitch + position(0, warp, lane);
    const float *b = weights + first * kPairPitch + lane / 4 * 2;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      float2 x[kRuns][2];
#pragma unroll
      for (int n = 0; n < kRuns; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float2 &two = x[n][half];
          two = *reinterpret_cast<const float2 *>(a + (step * 4 + half * kPairs) * kInputPitch + n * 16);
          two.x = rounded_to_tf32(two.x), two.y = rounded_to_tf32(two.y);
        }
#pragma unroll
      for (int m = 0; m < kRows; m += 2) {
        const float2 w = *reinterpret_cast<const float2 *>(b + step * 4 * kPairPitch + m * 8);
#pragma unroll
        for (int n = 0; n < kRuns; ++n)
          multiply_tf32(sums[m][n][0], sums[m + 1][n][0], sums[m][n][1], sums[m + 1][n][1], x[n][0].x, x[n][0].y,
                        x[n][1].x, x[n][1].y, w.x, w.y);
      }
    }
  }
};

} // namespace fxsparse::cuda
