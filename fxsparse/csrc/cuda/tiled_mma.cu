// Launches tiled_mma_kernel.h.
#include "tiled_kernels.h"
#include "tiled_mma_kernel.h"

namespace fxsparse::cuda {

template <typename T>
cudaError_t launch_tiled_mma(const TiledConv &conv, const TiledWeight &weight, const TiledTensors &tensors,
                             cudaStream_t stream) {
  const TiledCall call{GatherShape::of(conv.geometry, 8), weight, tensors, conv.geometry.activation};
  const unsigned grid = tiled_grid(call.shape, weight, kMmaUnits);
  if (grid == 0)
    return cudaErrorInvalidConfiguration;
  tiled_mma_kernel<T><<<grid, kMmaThreads, kMmaSharedBytes, stream>>>(call);
  return cudaGetLastError();
}

template cudaError_t launch_tiled_mma<__half>(const TiledConv &, const TiledWeight &, const TiledTensors &,
                                              cudaStream_t);
template cudaError_t launch_tiled_mma<__nv_bfloat16>(const TiledConv &, const TiledWeight &, const TiledTensors &,
                                                     cudaStream_t);

} // namespace fxsparse::cuda
