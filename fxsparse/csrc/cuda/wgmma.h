// Warpgroup matrix products (sm_90a): D[64][kColumns] (+)= A[64][16] B[16][kColumns], A and B in shared memory, B with
// its columns contiguous.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <type_traits>

namespace fxsparse::cuda {

// A matrix in shared memory; the strides are between its 8x16-byte (swizzled: 8x128-byte) pieces.
template <bool kSwizzled>
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes) {
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t(leading_bytes >> 4) << 16 | uint64_t(stride_bytes >> 4) << 32 |
         uint64_t(kSwizzled) << 62;
}

__device__ __forceinline__ void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending> __device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Makes what other threads have copied to shared memory visible to products.
__device__ __forceinline__ void fence_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// clang-format off
#define FXSPARSE_D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])

#define FXSPARSE_PRODUCT_64(type) \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0;\n" \
               "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " \
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, " \
               "%32, %33, p, 1, 1, 0, 1;}\n" \
               : FXSPARSE_D8(0), FXSPARSE_D8(8), FXSPARSE_D8(16), FXSPARSE_D8(24) : "l"(a), "l"(b), "r"(accumulate))

#define FXSPARSE_PRODUCT_128(type) \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0;\n" \
               "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " \
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, " \
               "%64, %65, p, 1, 1, 0, 1;}\n" \
               : FXSPARSE_D8(0), FXSPARSE_D8(8), FXSPARSE_D8(16), FXSPARSE_D8(24), FXSPARSE_D8(32), FXSPARSE_D8(40), FXSPARSE_D8(48), FXSPARSE_D8(56) : "l"(a), "l"(b), "r"(accumulate))

// clang-format on

// D = A B, or D += A B where `accumulate` is not 0. D is 4 values a thread for each 8 columns: rows lane / 4 and 8
// more, columns lane % 4 * 2 and the next, of the warp's 16 rows.
template <typename T> __device__ __forceinline__ void multiply(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
  if constexpr (std::is_same_v<T, __half>)
    FXSPARSE_PRODUCT_64("f16");
  else
    FXSPARSE_PRODUCT_64("bf16");
}

template <typename T> __device__ __forceinline__ void multiply(float (&d)[64], uint64_t a, uint64_t b, int accumulate) {
  if constexpr (std::is_same_v<T, __half>)
    FXSPARSE_PRODUCT_128("f16");
  else
    FXSPARSE_PRODUCT_128("bf16");
}

} // namespace fxsparse::cuda
