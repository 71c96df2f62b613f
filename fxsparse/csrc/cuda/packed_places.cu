// Launches unpack and repack, see packed_places_kernel.h.
#include "packed_places_kernel.h"

#include <climits>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace fxsparse::cuda {
namespace {

template <typename T, PlacesCopy Copy>
cudaError_t launch_copy(const PackedTables &tables, int64_t out_channels, int64_t row_columns, const T *source,
                        T *destination, int64_t destination_count, cudaStream_t stream) {
  if (destination_count == 0)
    return cudaSuccess;
  // All-zero bits are the number zero in every dtype.
  const cudaError_t cleared = cudaMemsetAsync(destination, 0, destination_count * sizeof(T), stream);
  if (cleared != cudaSuccess || tables.panel_count == 0)
    return cleared;
  if (tables.panel_count > INT_MAX)
    return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(tables.panel_count), kPlacesSlices);
  copy_packed_places<T, Copy>
      <<<grid, kPlacesThreads, 0, stream>>>(tables, out_channels, row_columns, source, destination);
  return cudaGetLastError();
}

} // namespace

template <typename T>
cudaError_t launch_unpack(const PackedTables &tables, int64_t out_channels, int64_t row_columns, const T *values,
                          T *weight, cudaStream_t stream) {
  return launch_copy<T, PlacesCopy::kUnpack>(tables, out_channels, row_columns, values, weight,
                                             out_channels * row_columns, stream);
}

template <typename T>
cudaError_t launch_repack(const PackedTables &tables, int64_t out_channels, int64_t row_columns, const T *weight,
                          T *values, cudaStream_t stream) {
  return launch_copy<T, PlacesCopy::kRepack>(tables, out_channels, row_columns, weight, values, tables.value_count,
                                             stream);
}

#define FXSPARSE_INSTANTIATE(T)                                                                                        \
  template cudaError_t launch_unpack<T>(const PackedTables &, int64_t, int64_t, const T *, T *, cudaStream_t);         \
  template cudaError_t launch_repack<T>(const PackedTables &, int64_t, int64_t, const T *, T *, cudaStream_t);
FXSPARSE_INSTANTIATE(float)
FXSPARSE_INSTANTIATE(double)
FXSPARSE_INSTANTIATE(__half)
FXSPARSE_INSTANTIATE(__nv_bfloat16)
#undef FXSPARSE_INSTANTIATE

} // namespace fxsparse::cuda
