// The launches behind launch_tiled_conv2d, one for each kind of device; each in a source of its own, so that they
// compile side by side.
#pragma once

#include "tiled_conv2d.h"

namespace fxsparse::cuda {

// Compute capability 9.0; T: __half or __nv_bfloat16; kernel: not kPortable.
template <typename T>
cudaError_t launch_tiled_wgmma(const TiledConv &conv, const TiledWeight &weight, const TiledTensors &tensors,
                               int multiprocessors, cudaStream_t stream);

// Compute capability 8.0 and later.
template <typename T>
cudaError_t launch_tiled_mma(const TiledConv &conv, const TiledWeight &weight, const TiledTensors &tensors,
                             cudaStream_t stream);

// float32: exact, without tensor cores; or where conv.allow_tf32, in TF32.
cudaError_t launch_tiled_float(const TiledConv &conv, const TiledWeight &weight, const TiledTensors &tensors,
                               int multiprocessors, cudaStream_t stream);

} // namespace fxsparse::cuda
