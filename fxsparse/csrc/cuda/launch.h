// What the binding calls. The kernels know no torch: device pointers, numbers and a stream in, a launch
// status out. All pointers are to contiguous tensors on the current device. Nothing here waits for the device
// or allocates.
#pragma once

#include "../conv2d_geometry.h"

#include <cstdint>
#include <cuda_runtime.h>

namespace fxsparse::cuda {

// As an int: 64-bit index arithmetic on shared memory is not free.
inline constexpr int kLanes = static_cast<int>(kPanelLanes);

struct PackedTables {
  const int32_t *columns;
  const int64_t *panels;
  const int64_t *rows;
  int64_t column_count;
  int64_t panel_count;
  int64_t value_count;
};

// `bias` and `add` may be null. T: float, double, __half or __nv_bfloat16.
template <typename T> struct Conv2dTensors {
  const T *input;
  const T *values;
  const T *bias;
  const T *add;
  T *output;
};

template <typename T>
cudaError_t launch_conv2d(const Conv2dGeometry &geometry, const PackedTables &tables, const Conv2dTensors<T> &tensors,
                          cudaStream_t stream);

// Writes the dense [out_channels, row_columns] weight matrix.
template <typename T>
cudaError_t launch_unpack(const PackedTables &tables, int64_t out_channels, int64_t row_columns, const T *values,
                          T *weight, cudaStream_t stream);

// Writes `tables.value_count` packed values.
template <typename T>
cudaError_t launch_repack(const PackedTables &tables, int64_t out_channels, int64_t row_columns, const T *weight,
                          T *values, cudaStream_t stream);

} // namespace fxsparse::cuda
