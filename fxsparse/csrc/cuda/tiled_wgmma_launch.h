// Launches tiled_wgmma_kernel.h for one type.
#pragma once

#include "shared_memory.h"
#include "tiled_kernels.h"
#include "tiled_wgmma_kernel.h"

namespace fxsparse::cuda {

template <typename T, class Tile>
cudaError_t launch_wgmma_tile(const TiledConv &conv, const TiledWeight &weight, const TiledTensors &tensors,
                              int multiprocessors, cudaStream_t stream) {
  static std::atomic<uint64_t> allowed{0};
  const auto kernel = tiled_wgmma_kernel<T, Tile>;
  const cudaError_t status = allow_shared_memory(kernel, Tile::kSharedBytes, allowed);
  if (status != cudaSuccess)
    return status;
  const WgmmaCall call{GatherShape::of(conv.geometry, 8, conv.pools), weight, tensors, conv.geometry.activation};
  const int units = stored_units<Tile>(call.shape);
  const int position_tiles = (call.shape.out_units + units - 1) / units;
  const int64_t tiles = int64_t(position_tiles) * weight.tile_count;
  const int64_t most_ctas = multiprocessors * (3 - Tile::kPairs);
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(tiles < most_ctas ? tiles : most_ctas));
  config.blockDim = dim3(Tile::kThreads);
  config.dynamicSmemBytes = Tile::kSharedBytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = conv.overlap ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, call, position_tiles);
}

// Whether the weights of a row tile with so many columns can stay in shared memory.
template <class Tile> bool stays(int64_t columns) {
  return (kRingBytes<Tile> - columns * (Tile::kRows * 2 + int64_t(sizeof(Column)))) /
             (Tile::kPairs * Tile::kInputBytes) >=
         kFewestResidentStages;
}

// Long stages cost fewer barriers, short ones leave more room for weights.
template <typename T, int kPositions, int kRowBlocks, int kPairs>
cudaError_t launch_wgmma_stages(const TiledConv &conv, const TiledWeight &weight, const TiledTensors &tensors,
                                int multiprocessors, cudaStream_t stream) {
  using Long = WgmmaTile<kPositions, kRowBlocks, kPairs, 64>;
  using Short = WgmmaTile<kPositions, kRowBlocks, kPairs, 32>;
  // The host knows the columns of all tiles together; which fits is worked out again on the device, tile by tile.
  const int64_t columns = weight.column_count / weight.tile_count;
  if (stays<Long>(columns) || !stays<Short>(columns))
    return launch_wgmma_tile<T, Long>(conv, weight, tensors, multiprocessors, stream);
  return launch_wgmma_tile<T, Short>(conv, weight, tensors, multiprocessors, stream);
}

// Positions of a tile: the more, the fewer bytes of weights a position costs; but most SMs should have a tile. Two CTAs
// on an SM begin and end at different times, and run under those of the next launch; one has more room.
inline TiledKernel choose_wgmma(const TiledConv &conv, const TiledWeight &weight, int multiprocessors) {
  const Conv2dGeometry &g = conv.geometry;
  const int64_t columns = weight.column_count / weight.tile_count, pairs = 2 * multiprocessors;
  const int64_t tiles = g.out_height * g.out_width * padded_batch(g.batch) * weight.tile_count / 128;
  if (tiles * 4 < multiprocessors * 3)
    return stays<WgmmaTile<64, 1, 1, 64>>(columns) ? TiledKernel::kWgmma64Half : TiledKernel::kWgmma64;
  const bool half =
      stays<WgmmaTile<128, 1, 1, 64>>(columns) || (tiles <= pairs && stays<WgmmaTile<128, 1, 1, 32>>(columns));
  return half ? TiledKernel::kWgmma128Half : TiledKernel::kWgmma128;
}

template <typename T>
cudaError_t launch_tiled_wgmma(const TiledConv &conv, const TiledWeight &weight, const TiledTensors &tensors,
                               int multiprocessors, cudaStream_t stream) {
  if (weight.tile_rows == 128)
    return launch_wgmma_stages<T, 128, 2, 2>(conv, weight, tensors, multiprocessors, stream);
  const TiledKernel kernel =
      conv.kernel == TiledKernel::kChosen ? choose_wgmma(conv, weight, multiprocessors) : conv.kernel;
  switch (kernel) {
  case TiledKernel::kWgmma64:
    return launch_wgmma_tile<T, WgmmaTile<64, 1, 2, 64>>(conv, weight, tensors, multiprocessors, stream);
  case TiledKernel::kWgmma64Half:
    return launch_wgmma_tile<T, WgmmaTile<64, 1, 1, 64>>(conv, weight, tensors, multiprocessors, stream);
  case TiledKernel::kWgmma128Half:
    return launch_wgmma_stages<T, 128, 1, 1>(conv, weight, tensors, multiprocessors, stream);
  default:
    return launch_wgmma_stages<T, 128, 1, 2>(conv, weight, tensors, multiprocessors, stream);
  }
}

} // namespace fxsparse::cuda
