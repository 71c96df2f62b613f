// The Hopper kernels for bfloat16 (compiled for sm_90a alone).
#include "tiled_wgmma_launch.h"

namespace fxsparse::cuda {

template cudaError_t launch_tiled_wgmma<__nv_bfloat16>(const TiledConv &, const TiledWeight &, const TiledTensors &,
                                                       int, cudaStream_t);

} // namespace fxsparse::cuda
