// The Hopper kernels for float16 (compiled for sm_90a alone).
#include "tiled_wgmma_launch.h"

namespace fxsparse::cuda {

template cudaError_t launch_tiled_wgmma<__half>(const TiledConv &, const TiledWeight &, const TiledTensors &, int,
                                                cudaStream_t);

} // namespace fxsparse::cuda
