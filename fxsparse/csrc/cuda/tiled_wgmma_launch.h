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
  const WgmmaCall call{GatherShape::of(conv.geometry, 8), weight, tensors, conv.geometry.activation};
  const int position_tiles = (call.shape.out_units + Tile::kUnits - 1) / Tile::kUnits;
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

template <typename T>
cudaError_t launch_tiled_wgmma(const TiledConv &conv, const TiledWeight &weight, const TiledTensors &tensors,
                               int multiprocessors, cudaStream_t stream) {
  const auto launch = [&](auto tile) {
    return launch_wgmma_tile<T, decltype(tile)>(conv, weight, tensors, multiprocessors, stream);
  };
  if (weight.tile_rows == 128)
    return launch(WgmmaTile<128, 2, 2>());
  switch (conv.kernel) {
  case TiledKernel::kWgmma64:
    return launch(WgmmaTile<64, 1, 2>());
  case TiledKernel::kWgmma256:
    return launch(WgmmaTile<256, 1, 2>());
  case TiledKernel::kWgmma64Half:
    return launch(WgmmaTile<64, 1, 1>());
  case TiledKernel::kWgmma128Half:
    return launch(WgmmaTile<128, 1, 1>());
  default:
    return launch(WgmmaTile<128, 1, 2>());
  }
}

} // namespace fxsparse::cuda
