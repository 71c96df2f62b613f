// Launches that may begin while the kernel before them on the stream still runs (programmatic dependent launch).
#pragma once

#include <cuda_runtime.h>

namespace fxsparse::cuda {

// Every kernel that is launched so calls this first: nothing that an earlier kernel reads or writes is touched before.
// Only then may the next one begin, which may read weights before it waits: writes to these have ended by now.
__device__ __forceinline__ void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// For a kernel that reads nothing but weights and tables before it calls `wait_after_trigger`: the next one begins
// while this one still waits, so that its own loads of weights are long under way when its turn comes. The first of
// such a chain is launched without overlap: all that wrote weights has ended then.
__device__ __forceinline__ void let_next_kernel_begin() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}
__device__ __forceinline__ void wait_after_trigger() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// `overlap`: false for the first of a chain.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_if_overlapping(bool overlap, void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes,
                                  cudaStream_t stream, const Arguments &...arguments) {
  int device = 0, major = 0;
  if (const cudaError_t status = cudaGetDevice(&device); status != cudaSuccess)
    return status;
  if (const cudaError_t status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
      status != cudaSuccess)
    return status;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute; // unknown to devices before compute capability 9.0
  config.numAttrs = overlap && major >= 9;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch_overlapping(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes,
                               cudaStream_t stream, const Arguments &...arguments) {
  return launch_if_overlapping(true, kernel, grid, threads, shared_bytes, stream, arguments...);
}

} // namespace fxsparse::cuda
