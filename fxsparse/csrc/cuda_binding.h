// What the CUDA bindings share: the current stream, and checks around a launch.
#pragma once

#include "conv2d_arguments.h"

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/shim_utils.h>

// Only libtorch_cuda.so has it. Weak, so that a CPU-only torch can still load this library.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void **);

namespace fxsparse {

inline cudaStream_t current_stream(const Tensor &tensor) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "This torch has no CUDA support. Install a CUDA build of torch.");
  void *stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Torch picks CUDA kernels as soon as one tensor is on a CUDA device.
inline void check_cuda(const char *name, const Tensor &tensor) {
  STD_TORCH_CHECK(tensor.is_cuda(), "'", name, "' is on ", device_text(tensor),
                  ", expected the CUDA device where another tensor is");
}

// Whether kernels can read 16 bytes at a time.
inline bool is_aligned(const Tensor &tensor) { return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0; }

inline Tensor aligned_contiguous(const Tensor &tensor) {
  const Tensor contiguous = torch::stable::contiguous(tensor);
  return is_aligned(contiguous) ? contiguous : torch::stable::clone(contiguous);
}

inline void check_launch(cudaError_t status) {
  STD_TORCH_CHECK(status == cudaSuccess, "The CUDA launch failed: ", cudaGetErrorString(status));
}

} // namespace fxsparse
