// Sparse convolution of few images as torch stores them: what the bindings call. No torch: device pointers, numbers and
// a stream in, a launch status out. Nothing here waits for the device or allocates.
//
// The weight is in tiles (tiled_conv2d.h). Input, output and what is added have strides of their own. Where rows of odd
// width have an even pitch, in the output and in what is added, the element behind each row is written and read, too.
#pragma once

#include "plane_images.h"

namespace fxsparse::cuda {

// How a CTA of eight warps computes: `rows` (32 or 64) of a row tile times `positions` (8 or 16) a warp; so many warps
// (1, 2, 4 or 8) share the columns of the same positions. Zeros: chosen from the sizes.
struct PlaneTile {
  int rows, positions, split;
};

struct PlaneConv {
  Conv2dGeometry geometry; // padding_mode must be kZeros
  TiledType type;          // of input, values, bias, add and output; sums are float
  PlaneTile tile;
  bool overlap; // the kernel may start, and read weights, while the one before it on the stream still runs
  bool pools;   // as TiledConv's
  bool allow_tf32;
  ImageStrides in, add, out;
};

// Why this cannot run on the current device, for an error message, or null. `tile_rows`: of the weight.
const char *plane_conv2d_refusal(const PlaneConv &conv, int64_t tile_rows);

// Computes activation(conv2d(input, weight, bias) + add). Tables that point outside the tensors stop the kernel with a
// trap.
cudaError_t launch_plane_conv2d(const PlaneConv &conv, const TiledWeight &weight, const TiledTensors &tensors,
                                cudaStream_t stream);

} // namespace fxsparse::cuda
