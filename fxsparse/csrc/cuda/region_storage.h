// The two ways in which a region stores its values, under the same names: batch-innermost, and in row lanes. No torch.
#pragma once

#include "row_lanes.h"

namespace fxsparse::cuda {

// batch_inner.h
class BatchInner {
public:
  static constexpr bool kPoolsInputs = true;  // poolings that begin the region read the inputs where they lie
  static constexpr bool kPoolsInConvs = true; // where the device can
  static constexpr bool kUnfolds = false;

  BatchInner(TiledType type, cudaStream_t stream) : type_(type), stream_(stream) {}

  static int64_t count(const Images &images) {
    return images.channels * images.height * images.width * padded_batch(images.batch);
  }
  static Conv2dGeometry geometry(const Conv2dGeometry &geometry) { return geometry; }

  cudaError_t enter(const Images &images, ImageLayout layout, const void *from, void *to) const {
    return launch_to_batch_inner(images, layout, type_, from, to, stream_);
  }
  cudaError_t leave(const Images &images, ImageLayout layout, const void *from, void *to) const {
    return launch_from_batch_inner(images, layout, type_, from, to, stream_);
  }
  cudaError_t max_pool(const MaxPool &pool, const void *from, void *to) const {
    return launch_max_pool(pool, type_, from, to, stream_);
  }
  cudaError_t average(const Images &images, const void *from, bool leaves, void *to) const {
    return launch_average(images, type_, from, leaves, to, stream_);
  }

private:
  TiledType type_;
  cudaStream_t stream_;
};

// row_lanes.h
class RowLanes {
public:
  static constexpr bool kPoolsInputs = false, kPoolsInConvs = false, kUnfolds = true;

  RowLanes(TiledType type, cudaStream_t stream) : type_(type), stream_(stream) {}

  static int64_t count(const Images &images) { return row_lanes_count(images); }
  static Conv2dGeometry geometry(const Conv2dGeometry &geometry) { return on_row_lanes(geometry); }

  cudaError_t enter(const Images &images, ImageLayout layout, const void *from, void *to) const {
    const RowTaps one = {1, 1, 1, 0, images.width};
    return launch_unfold(images, strides_in_torch(images, layout), one, type_, from, to, stream_);
  }
  cudaError_t unfold(const Images &images, const ImageStrides &strides, const RowTaps &taps, const void *from,
                     void *to) const {
    return launch_unfold(images, strides, taps, type_, from, to, stream_);
  }
  cudaError_t leave(const Images &images, ImageLayout layout, const void *from, void *to) const {
    return launch_from_row_lanes(images, layout, type_, from, to, stream_);
  }
  cudaError_t max_pool(const MaxPool &pool, const void *from, void *to) const {
    return launch_row_max_pool(pool, type_, from, to, stream_);
  }
  cudaError_t average(const Images &images, const void *from, bool leaves, void *to) const {
    return launch_row_average(images, type_, from, leaves, to, stream_);
  }

private:
  TiledType type_;
  cudaStream_t stream_;
};

} // namespace fxsparse::cuda
