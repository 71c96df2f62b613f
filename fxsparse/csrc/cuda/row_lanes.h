// Few images: a row's positions take the lanes that the images of a batch have otherwise. No torch: device pointers,
// numbers and a stream in, a launch status out. Nothing here waits for the device or allocates.
//
// An image tensor [N, C, H, W] lies in memory as [H][C][N][Wp], Wp = W rounded up to a multiple of 8, 16-byte aligned.
// That is how tiled_conv2d.h wants N * Wp images of one column each, so its kernels compute convolutions whose kernels
// have one column. For others the taps along a row are unfolded first, each into a column of its own,
// [H][taps][C][N][Wp of the output]: stride, dilation and padding along the row are gone then. Lanes W to Wp - 1 may
// hold anything; a lane never reaches another.
//
// Roofline: all of this moves bytes, few of them: an image of 64 x 56 x 56 is 0.4 MB in 16 bits. Launches bind.
#pragma once

#include "batch_inner.h"

namespace fxsparse::cuda {

// Wp.
inline int64_t padded_width(int64_t width) { return (width + 7) / 8 * 8; }

// Elements of images stored so.
inline int64_t row_lanes_count(const Images &images) {
  return images.height * images.channels * images.batch * padded_width(images.width);
}

// Elements from one row, channel, image or position to the next.
struct ImageStrides {
  int64_t row, channel, image, x;
};

ImageStrides strides_in_row_lanes(const Images &images);
ImageStrides strides_in_torch(const Images &images, ImageLayout layout);

// The taps of a convolution along a row.
struct RowTaps {
  int64_t count, stride, dilation, pad, out_width;
};

// Whether a convolution reads its input as it lies: one tap along the row, one position after the other.
bool reads_rows_as_they_lie(const Conv2dGeometry &geometry);
RowTaps row_taps(const Conv2dGeometry &geometry);
// The same convolution as the kernels of tiled_conv2d.h see it.
Conv2dGeometry on_row_lanes(const Conv2dGeometry &geometry);

// Unfolds images of any strides. With one tap, stride 1 and no padding that is the change of layout.
cudaError_t launch_unfold(const Images &images, const ImageStrides &strides, const RowTaps &taps, TiledType type,
                          const void *input, void *output, cudaStream_t stream);
cudaError_t launch_from_row_lanes(const Images &images, ImageLayout to, TiledType type, const void *input, void *output,
                                  cudaStream_t stream);
cudaError_t launch_row_max_pool(const MaxPool &pool, TiledType type, const void *input, void *output,
                                cudaStream_t stream);
// The mean of each plane; summed in float. `leaves`: stored as torch does, [batch][channels].
cudaError_t launch_row_average(const Images &images, TiledType type, const void *input, bool leaves, void *output,
                               cudaStream_t stream);

} // namespace fxsparse::cuda
