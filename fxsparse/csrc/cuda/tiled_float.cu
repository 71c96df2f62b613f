// Launches tiled_float_kernel.h.
#include "overlapping_launch.h"
#include "shared_memory.h"
#include "tiled_float_kernel.h"
#include "tiled_kernels.h"

namespace fxsparse::cuda {

namespace {

template <class Tile> cudaError_t launch_float_tile(const TiledCall &call, cudaStream_t stream) {
  static std::atomic<uint64_t> allowed{0};
  const cudaError_t status = allow_shared_memory(tiled_float_kernel<Tile>, Tile::kSharedBytes, allowed);
  if (status != cudaSuccess)
    return status;
  const unsigned grid = tiled_grid(call.shape, call.weight, Tile::kUnits);
  if (grid == 0)
    return cudaErrorInvalidConfiguration;
  return launch_overlapping(tiled_float_kernel<Tile>, dim3(grid), kFloatThreads, Tile::kSharedBytes, stream, call);
}

} // namespace

cudaError_t launch_tiled_float(const TiledConv &conv, const TiledWeight &weight, const TiledTensors &tensors,
                               int multiprocessors, cudaStream_t stream) {
  const TiledCall call{GatherShape::of(conv.geometry, 4), weight, tensors, conv.geometry.activation};
  // Two CTAs run on an SM at a time. A small tile is a fourth of a large one, and takes a little more than that.
  const int64_t at_once = 2 * int64_t(multiprocessors);
  const int64_t large = tiled_grid(call.shape, weight, FloatTile<1>::kUnits);
  const int64_t small = tiled_grid(call.shape, weight, FloatTile<4>::kUnits); // 0: too many for a grid
  if (small != 0 && (small + at_once - 1) / at_once * 9 < (large + at_once - 1) / at_once * 32)
    return launch_float_tile<FloatTile<4>>(call, stream);
  return launch_float_tile<FloatTile<1>>(call, stream);
}

} // namespace fxsparse::cuda
