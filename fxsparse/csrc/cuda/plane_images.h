// Few images, as torch stores them: what a region does besides convolutions (plane_conv.h), and their strides. No
// torch: device pointers, numbers and a stream in, a launch status out. Nothing here waits for the device or allocates.
//
// Of few images most lanes of a batch-innermost layout (tiled_conv2d.h) would be padding. Here nothing is padded and
// nothing changes its layout: kernels read and write through strides, so that a region begins and ends in torch's own
// tensors.
//
// Roofline: these move bytes, few of them: an image of 64 x 56 x 56 is 0.4 MB in 16 bits. Launches and latencies bind.
#pragma once

#include "batch_inner.h"

namespace fxsparse::cuda {

// Elements from one row, channel, image or position of a row to the next.
struct ImageStrides {
  int64_t row, channel, image, x;
};

ImageStrides strides_in_torch(const Images &images, ImageLayout layout);

// Whether the kernels can count such images' elements in 32 bits.
bool are_few(const Images &images);

// `overlap` as that of PlaneConv.
cudaError_t launch_plane_max_pool(const MaxPool &pool, const ImageStrides &from, const ImageStrides &to, TiledType type,
                                  bool overlap, const void *input, void *output, cudaStream_t stream);
// The mean of each plane; summed in float.
cudaError_t launch_plane_average(const Images &images, const ImageStrides &from, const ImageStrides &to, TiledType type,
                                 bool overlap, const void *input, void *output, cudaStream_t stream);
// activation(input + add); `add` may be null.
cudaError_t launch_plane_add(const Images &images, const ImageStrides &from, const ImageStrides &added,
                             const ImageStrides &to, Activation activation, TiledType type, bool overlap,
                             const void *input, const void *add, void *output, cudaStream_t stream);

} // namespace fxsparse::cuda
