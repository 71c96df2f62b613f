// Launches tiled_float_kernel.h.
#include "shared_memory.h"
#include "tiled_float_kernel.h"
#include "tiled_kernels.h"

namespace fxsparse::cuda {

cudaError_t launch_tiled_float(const TiledConv &conv, const TiledWeight &weight, const TiledTensors &tensors,
                               cudaStream_t stream) {
  static std::atomic<uint64_t> allowed{0};
  const cudaError_t status = allow_shared_memory(tiled_float_kernel, kFloatSharedBytes, allowed);
  if (status != cudaSuccess)
    return status;
  const TiledCall call{GatherShape::of(conv.geometry, 4), weight, tensors, conv.geometry.activation};
  const unsigned grid = tiled_grid(call.shape, weight, kFloatUnits);
  if (grid == 0)
    return cudaErrorInvalidConfiguration;
  tiled_float_kernel<<<grid, kFloatThreads, kFloatSharedBytes, stream>>>(call);
  return cudaGetLastError();
}

} // namespace fxsparse::cuda
