// Launches the gather convolution of conv2d_kernel.h.
#include "conv2d_kernel.h"

#include <climits>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace fxsparse::cuda {

template <typename T>
cudaError_t launch_conv2d(const Conv2dGeometry &geometry, const PackedTables &tables, const Conv2dTensors<T> &tensors,
                          cudaStream_t stream) {
  const int64_t positions = geometry.batch * geometry.out_height * geometry.out_width;
  if (positions == 0 || tables.panel_count == 0)
    return cudaSuccess;
  const int64_t tiles = (positions + kConv2dThreads - 1) / kConv2dThreads;
  // Only gridDim.x reaches 2^31 - 1, so both axes of the problem share it.
  if (tables.panel_count > INT_MAX || tiles > INT_MAX / tables.panel_count)
    return cudaErrorInvalidConfiguration;
  const auto kernel = geometry.padding_mode == PaddingMode::kZeros ? conv2d_kernel<T, true> : conv2d_kernel<T, false>;
  const auto grid = static_cast<unsigned>(tiles * tables.panel_count);
  kernel<<<grid, kConv2dThreads, 0, stream>>>(geometry, tables, tensors);
  return cudaGetLastError();
}

template cudaError_t launch_conv2d<float>(const Conv2dGeometry &, const PackedTables &, const Conv2dTensors<float> &,
                                          cudaStream_t);
template cudaError_t launch_conv2d<double>(const Conv2dGeometry &, const PackedTables &, const Conv2dTensors<double> &,
                                           cudaStream_t);
template cudaError_t launch_conv2d<__half>(const Conv2dGeometry &, const PackedTables &, const Conv2dTensors<__half> &,
                                           cudaStream_t);
template cudaError_t launch_conv2d<__nv_bfloat16>(const Conv2dGeometry &, const PackedTables &,
                                                  const Conv2dTensors<__nv_bfloat16> &, cudaStream_t);

} // namespace fxsparse::cuda
