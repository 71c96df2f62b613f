// The numbers of one convolution call and of the packed form. Free of torch, so that kernels can take them.
#pragma once

#include <cstdint>

namespace fxsparse {

// Rows of one panel of the packed form.
inline constexpr int64_t kPanelLanes = 16;

// Columns of the tables `panels` and `rows`; docs/architecture.md defines them.
enum PanelField { kFirstColumn, kColumnCount, kFirstValue, kFirstChannel, kPanelFields };
enum RowField { kOutChannel, kFirstResidual, kResidualCount, kFirstResidualValue, kRowFields };

enum class PaddingMode { kZeros, kReflect, kReplicate, kCircular };
enum class Activation { kNone, kRelu, kRelu6, kSilu, kHardswish };

// Spatial numbers (sizes of the padded input included) and K = (C / groups) * kh * kw are checked to fit in
// 31 bits. Products such as N * C * H * W are not: they need 64.
struct Conv2dGeometry {
  int64_t batch, in_channels, in_height, in_width;
  int64_t out_channels, group_channels, kernel_height, kernel_width;
  int64_t stride_y, stride_x, dilation_y, dilation_x;
  int64_t pad_top, pad_bottom, pad_left, pad_right;
  int64_t groups, out_height, out_width;
  PaddingMode padding_mode;
  Activation activation;
};

} // namespace fxsparse
