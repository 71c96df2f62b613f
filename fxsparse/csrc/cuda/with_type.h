// From a type's name to the type itself.
#pragma once

#include "tiled_conv2d.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace fxsparse::cuda {

// Calls `body` with a value of the type.
template <typename Body> cudaError_t with_type(TiledType type, const Body &body) {
  switch (type) {
  case TiledType::kBFloat16:
    return body(__nv_bfloat16());
  case TiledType::kHalf:
    return body(__half());
  default:
    return body(float());
  }
}

} // namespace fxsparse::cuda
