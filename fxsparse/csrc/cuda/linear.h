// A linear layer on images of one pixel, of any storage: the classifier behind a region's convolutions. No torch:
// device pointers, numbers and a stream in, a launch status out. Nothing here waits for the device or allocates.
#pragma once

#include "plane_images.h"

namespace fxsparse::cuda {

struct Linear {
  int64_t images, channels, outputs;
  ImageStrides in, out; // from one image or channel to the next; the rest does not count
  TiledType type;       // of everything; sums are float
  bool overlap;         // as that of PlaneConv
};

struct LinearTensors {
  const void *input;
  const void *weight; // [outputs][channels], 4-byte aligned
  const void *bias;   // [outputs] or null
  void *output;
};

cudaError_t launch_linear(const Linear &linear, const LinearTensors &tensors, cudaStream_t stream);

} // namespace fxsparse::cuda
