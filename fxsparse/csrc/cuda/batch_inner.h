// What a region does besides convolutions, on images stored batch-innermost (tiled_conv2d.h): changes of layout,
// poolings, additions. No torch: device pointers, numbers and a stream in, a launch status out. Nothing here waits for
// the device or allocates. All pointers are 16-byte aligned.
//
// Roofline: all of these move bytes and nothing else. A warp reads and writes runs of 64 bytes or more on both sides.
#pragma once

#include "tiled_conv2d.h"

namespace fxsparse::cuda {

struct Images {
  int64_t batch, channels, height, width;
};

// How torch stores images: [N][C][H][W] or [N][H][W][C].
enum class ImageLayout { kContiguous, kChannelsLast };

struct MaxPool {
  Images in;
  int64_t out_height, out_width, kernel[2], stride[2], pad[2], dilation[2]; // (vertical, horizontal)
  Activation activation; // of the input: one that never falls (kNone, kRelu, kRelu6), so that it can come last
};

cudaError_t launch_to_batch_inner(const Images &images, ImageLayout from, TiledType type, const void *input,
                                  void *output, cudaStream_t stream);
cudaError_t launch_from_batch_inner(const Images &images, ImageLayout to, TiledType type, const void *input,
                                    void *output, cudaStream_t stream);

// Whether `launch_pool_to_batch_inner` can read images of this layout.
bool pools_from(const Images &images, ImageLayout from, TiledType type);
// Pools images that torch stores, into batch-innermost ones.
cudaError_t launch_pool_to_batch_inner(const MaxPool &pool, TiledType type, const void *input, void *output,
                                       cudaStream_t stream);
cudaError_t launch_max_pool(const MaxPool &pool, TiledType type, const void *input, void *output, cudaStream_t stream);
// The mean of each plane; summed in float. `leaves`: stored as torch does, [batch][channels].
cudaError_t launch_average(const Images &images, TiledType type, const void *input, bool leaves, void *output,
                           cudaStream_t stream);
// activation(input + add) of `count` elements, a multiple of 8; `add` may be null.
cudaError_t launch_add(int64_t count, Activation activation, TiledType type, const void *input, const void *add,
                       void *output, cudaStream_t stream);

} // namespace fxsparse::cuda
