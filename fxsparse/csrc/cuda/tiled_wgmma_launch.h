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
  const cudaError_t status = allow_shared_memory(kernel, kSharedBytes, allowed);
  if (status != cudaSuccess)
    return status;
  const WgmmaCall call{GatherShape::of(conv.geometry, 8), weight, tensors, conv.geometry.activation};
  const int position_tiles = (call.shape.out_units + Tile::kUnits - 1) / Tile::kUnits;
  const int64_t tiles = int64_t(position_tiles) * weight.tile_count;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(tiles < multiprocessors ? tiles : multiprocessors));
  config.blockDim = dim3(kWgmmaThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = conv.overlap ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, call, position_tiles);
}

template <typename T>
cudaError_t launch_tiled_wgmma(const TiledConv &conv, const TiledWeight &weight, const TiledTensors &tensors,
                               int multiprocessors, cudaStream_t stream) {
  if (weight.tile_rows == 128)
    return launch_wgmma_tile<T, WgmmaTile<128, 2>>(conv, weight, tensors, multiprocessors, stream);
  if (conv.kernel == TiledKernel::kWgmma64)
    return launch_wgmma_tile<T, WgmmaTile<64, 1>>(conv, weight, tensors, multiprocessors, stream);
  if (conv.kernel == TiledKernel::kWgmma256)
    return launch_wgmma_tile<T, WgmmaTile<256, 1>>(conv, weight, tensors, multiprocessors, stream);
  return launch_wgmma_tile<T, WgmmaTile<128, 1>>(conv, weight, tensors, multiprocessors, stream);
}

} // namespace fxsparse::cuda
