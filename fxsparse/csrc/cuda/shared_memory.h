// Permission for more than 48 KB of dynamic shared memory.
#pragma once

#include <atomic>
#include <cstdint>
#include <cuda_runtime.h>

namespace fxsparse::cuda {

// The permission belongs to a kernel on a device; the bits of `done` are devices.
template <class Kernel> cudaError_t allow_shared_memory(Kernel kernel, int bytes, std::atomic<uint64_t> &done) {
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess)
    return status;
  const uint64_t bit = device < 64 ? uint64_t(1) << device : 0;
  if ((done.load(std::memory_order_relaxed) & bit) != 0)
    return cudaSuccess;
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status == cudaSuccess)
    done.fetch_or(bit, std::memory_order_relaxed);
  return status;
}

} // namespace fxsparse::cuda
