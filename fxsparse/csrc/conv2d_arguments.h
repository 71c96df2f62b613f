// Checks the operators' arguments, in the same words on every device. The content of the tables is not
// checked here: on CUDA that would cost a synchronization.
#pragma once

#include "conv2d_geometry.h"

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

namespace fxsparse {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::headeronly::toString;
using torch::stable::Tensor;

inline std::string list_text(IntHeaderOnlyArrayRef list) {
  std::ostringstream text;
  text << '(';
  for (size_t i = 0; i < list.size(); ++i)
    text << (i ? ", " : "") << list[i];
  text << ')';
  return text.str();
}

inline std::string device_text(const Tensor &tensor) {
  const auto device = tensor.device();
  if (device.type() == torch::headeronly::DeviceType::CPU)
    return "cpu";
  if (device.type() == torch::headeronly::DeviceType::CUDA)
    return "cuda:" + std::to_string(device.index());
  return "another type of device";
}

inline void check_same_device(const char *name, const Tensor &tensor, const char *anchor_name, const Tensor &anchor) {
  STD_TORCH_CHECK(tensor.device() == anchor.device(), "'", name, "' is on ", device_text(tensor), ", expected ",
                  device_text(anchor), ", where '", anchor_name, "' is");
}

inline void check_float_dtype(const char *name, const Tensor &tensor) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
                      type == ScalarType::BFloat16,
                  "'", name, "' has dtype ", toString(type), ", expected float32, float64, bfloat16 or float16");
}

inline void check_like(const char *name, const Tensor &tensor, const char *anchor_name, const Tensor &anchor) {
  check_same_device(name, tensor, anchor_name, anchor);
  STD_TORCH_CHECK(tensor.scalar_type() == anchor.scalar_type(), "'", name, "' has dtype ",
                  toString(tensor.scalar_type()), ", expected that of '", anchor_name, "', ",
                  toString(anchor.scalar_type()));
}

inline void check_list(const char *name, IntHeaderOnlyArrayRef list, size_t length, int64_t least) {
  STD_TORCH_CHECK(list.size() == length, "'", name, "' is ", list_text(list), ", expected ", length, " integers");
  for (const int64_t entry : list)
    STD_TORCH_CHECK(entry >= least && entry <= std::numeric_limits<int32_t>::max(), "'", name, "' is ", list_text(list),
                    ", expected every entry to be at least ", least, " and below 2^31");
}

// Checks (O, C / groups, kh, kw) and returns the columns of the weight matrix.
inline int64_t checked_row_columns(IntHeaderOnlyArrayRef weight_shape) {
  check_list("weight_shape", weight_shape, 4, 1);
  int64_t columns = 1;
  for (size_t i = 1; i < 4; ++i) {
    columns *= weight_shape[i]; // both below 2^31, so that the product cannot overflow
    STD_TORCH_CHECK(columns <= std::numeric_limits<int32_t>::max(), "'weight_shape' is ", list_text(weight_shape),
                    ", whose rows have more than 2^31 - 1 weights, the most that int32 column indices reach");
  }
  return columns;
}

inline void check_vector(const char *name, const Tensor &tensor) {
  STD_TORCH_CHECK(tensor.dim() == 1, "'", name, "' has shape ", list_text(tensor.sizes()), ", expected one dimension");
}

inline void check_table(const char *name, const Tensor &table, int64_t width) {
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Long, "'", name, "' has dtype ", toString(table.scalar_type()),
                  ", expected Long");
  STD_TORCH_CHECK(table.dim() == 2 && table.size(1) == width, "'", name, "' has shape ", list_text(table.sizes()),
                  ", expected (any, ", width, ")");
}

inline void check_tables(const Tensor &columns, const Tensor &panels, const Tensor &rows, const char *anchor_name,
                         const Tensor &anchor) {
  check_same_device("columns", columns, anchor_name, anchor);
  check_same_device("panels", panels, anchor_name, anchor);
  check_same_device("rows", rows, anchor_name, anchor);
  STD_TORCH_CHECK(columns.scalar_type() == ScalarType::Int, "'columns' has dtype ", toString(columns.scalar_type()),
                  ", expected Int");
  check_vector("columns", columns);
  check_table("panels", panels, kPanelFields);
  check_table("rows", rows, kRowFields);
  const int64_t lanes = panels.size(0) * kPanelLanes;
  STD_TORCH_CHECK(rows.size(0) == lanes, "'rows' has shape ", list_text(rows.sizes()), ", expected (", lanes, ", ",
                  int64_t(kRowFields), "): ", kPanelLanes, " for each of ", panels.size(0), " panels");
}

inline PaddingMode padding_mode_of(const std::string &name) {
  if (name == "zeros")
    return PaddingMode::kZeros;
  if (name == "reflect")
    return PaddingMode::kReflect;
  if (name == "replicate")
    return PaddingMode::kReplicate;
  STD_TORCH_CHECK(name == "circular", "'padding_mode' is '", name,
                  "', expected 'zeros', 'reflect', 'replicate' or 'circular'");
  return PaddingMode::kCircular;
}

inline Activation activation_of(const std::string &name) {
  if (name == "none")
    return Activation::kNone;
  if (name == "relu")
    return Activation::kRelu;
  if (name == "relu6")
    return Activation::kRelu6;
  if (name == "silu")
    return Activation::kSilu;
  STD_TORCH_CHECK(name == "hardswish", "'activation' is '", name,
                  "', expected 'none', 'relu', 'relu6', 'silu' or 'hardswish'");
  return Activation::kHardswish;
}

inline void check_pad(int64_t pad, int64_t size, PaddingMode mode) {
  STD_TORCH_CHECK(mode != PaddingMode::kReflect || pad < size, "'padding' has ", pad,
                  ", expected less than the input's size ", size, " for padding_mode 'reflect'");
  STD_TORCH_CHECK(mode != PaddingMode::kCircular || pad <= size, "'padding' has ", pad,
                  ", expected at most the input's size ", size, " for padding_mode 'circular'");
  STD_TORCH_CHECK(mode != PaddingMode::kReplicate || size > 0,
                  "'input' is empty, which padding_mode 'replicate' cannot pad");
}

// `axis` is "height" or "width".
// `partial`: a last window that begins before the padding after the input, and ends past it, counts too.
inline int64_t checked_output_size(const char *axis, int64_t size, int64_t before, int64_t after, int64_t kernel,
                                   int64_t stride, int64_t dilation, bool partial = false) {
  const int64_t most = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(size <= most - before - after, "The ", axis, " of the padded input is ", size, " + ", before, " + ",
                  after, ", expected it below 2^31");
  const int64_t padded = size + before + after;
  const int64_t reach = dilation * (kernel - 1) + 1;
  STD_TORCH_CHECK(padded >= reach, "The ", axis, " of the padded input is ", padded, ", expected at least ", reach,
                  ", what the kernel covers");
  int64_t outputs = (padded - reach + (partial ? stride - 1 : 0)) / stride + 1;
  if (partial && (outputs - 1) * stride >= size + before)
    --outputs;
  return outputs;
}

// The output has 3 dimensions where the input has.
inline std::vector<int64_t> output_shape(const Conv2dGeometry &g, const Tensor &input) {
  if (input.dim() == 3)
    return {g.out_channels, g.out_height, g.out_width};
  return {g.batch, g.out_channels, g.out_height, g.out_width};
}

// Sizes of images; a tensor of three dimensions is one image.
struct ImageSizes {
  int64_t batch, channels, height, width;
};

inline ImageSizes checked_images(const char *name, const Tensor &tensor) {
  check_float_dtype(name, tensor);
  const int64_t dim = tensor.dim();
  STD_TORCH_CHECK(dim == 3 || dim == 4, "'", name, "' has shape ", list_text(tensor.sizes()),
                  ", expected (N, C, H, W) or (C, H, W)");
  return {dim == 4 ? tensor.size(0) : 1, tensor.size(dim - 3), tensor.size(dim - 2), tensor.size(dim - 1)};
}

inline Conv2dGeometry checked_geometry(const ImageSizes &input, IntHeaderOnlyArrayRef weight_shape,
                                       IntHeaderOnlyArrayRef stride, IntHeaderOnlyArrayRef padding,
                                       IntHeaderOnlyArrayRef dilation, int64_t groups, PaddingMode padding_mode,
                                       Activation activation) {
  checked_row_columns(weight_shape);
  check_list("stride", stride, 2, 1);
  check_list("padding", padding, 4, 0);
  check_list("dilation", dilation, 2, 1);
  Conv2dGeometry g{};
  g.batch = input.batch;
  g.in_channels = input.channels;
  g.in_height = input.height;
  g.in_width = input.width;
  g.out_channels = weight_shape[0];
  g.group_channels = weight_shape[1];
  g.kernel_height = weight_shape[2];
  g.kernel_width = weight_shape[3];
  g.stride_y = stride[0];
  g.stride_x = stride[1];
  g.dilation_y = dilation[0];
  g.dilation_x = dilation[1];
  g.pad_top = padding[0];
  g.pad_bottom = padding[1];
  g.pad_left = padding[2];
  g.pad_right = padding[3];
  g.groups = groups;
  STD_TORCH_CHECK(groups >= 1 && g.out_channels % groups == 0, "'groups' is ", groups, ", expected a divisor of the ",
                  g.out_channels, " output channels");
  STD_TORCH_CHECK(g.in_channels % groups == 0 && g.in_channels / groups == g.group_channels, "'input' has ",
                  g.in_channels, " channels, expected ", groups, " groups of ", g.group_channels,
                  ", as 'weight_shape' ", list_text(weight_shape), " says");
  g.padding_mode = padding_mode;
  g.activation = activation;
  for (size_t side = 0; side < 4; ++side)
    check_pad(padding[side], side < 2 ? g.in_height : g.in_width, g.padding_mode);
  g.out_height =
      checked_output_size("height", g.in_height, g.pad_top, g.pad_bottom, g.kernel_height, g.stride_y, g.dilation_y);
  g.out_width =
      checked_output_size("width", g.in_width, g.pad_left, g.pad_right, g.kernel_width, g.stride_x, g.dilation_x);
  return g;
}

inline void check_packed(const Tensor &values, const Tensor &columns, const Tensor &panels, const Tensor &rows,
                         const char *anchor_name, const Tensor &anchor, int64_t out_channels) {
  check_tables(columns, panels, rows, anchor_name, anchor);
  check_vector("values", values);
  check_like("values", values, anchor_name, anchor);
  STD_TORCH_CHECK(rows.size(0) >= out_channels, "'rows' has ", rows.size(0), " lanes, expected at least the ",
                  out_channels, " output channels");
}

inline void check_bias(const Tensor &bias, const char *anchor_name, const Tensor &anchor, int64_t out_channels) {
  check_like("bias", bias, anchor_name, anchor);
  STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == out_channels, "'bias' has shape ", list_text(bias.sizes()),
                  ", expected (", out_channels, ")");
}

// Checks everything `conv2d` is given and returns the numbers of the call.
inline Conv2dGeometry check_conv2d(const Tensor &input, const Tensor &values, const Tensor &columns,
                                   const Tensor &panels, const Tensor &rows, const std::optional<Tensor> &bias,
                                   IntHeaderOnlyArrayRef weight_shape, IntHeaderOnlyArrayRef stride,
                                   IntHeaderOnlyArrayRef padding, IntHeaderOnlyArrayRef dilation, int64_t groups,
                                   const std::string &padding_mode, const std::string &activation,
                                   const std::optional<Tensor> &add) {
  const Conv2dGeometry g = checked_geometry(checked_images("input", input), weight_shape, stride, padding, dilation,
                                            groups, padding_mode_of(padding_mode), activation_of(activation));
  check_packed(values, columns, panels, rows, "input", input, g.out_channels);
  if (bias.has_value())
    check_bias(*bias, "input", input, g.out_channels);
  if (add.has_value()) {
    check_like("add", *add, "input", input);
    const std::vector<int64_t> expected = output_shape(g, input);
    const auto found = add->sizes();
    STD_TORCH_CHECK(std::vector<int64_t>(found.begin(), found.end()) == expected, "'add' has shape ", list_text(found),
                    ", expected that of the output, ", list_text(expected));
  }
  return g;
}

// Both return the columns of the weight matrix.
inline int64_t check_unpack(const Tensor &values, const Tensor &columns, const Tensor &panels, const Tensor &rows,
                            IntHeaderOnlyArrayRef weight_shape) {
  check_float_dtype("values", values);
  const int64_t row_columns = checked_row_columns(weight_shape);
  check_tables(columns, panels, rows, "values", values);
  check_vector("values", values);
  return row_columns;
}

inline int64_t check_repack(const Tensor &weight, const Tensor &columns, const Tensor &panels, const Tensor &rows,
                            int64_t values) {
  check_float_dtype("weight", weight);
  STD_TORCH_CHECK(weight.dim() == 4, "'weight' has shape ", list_text(weight.sizes()),
                  ", expected (O, C / groups, kh, kw)");
  STD_TORCH_CHECK(values >= 0, "'values' is ", values, ", expected the number of packed values");
  const int64_t row_columns = checked_row_columns(weight.sizes());
  check_tables(columns, panels, rows, "weight", weight);
  return row_columns;
}

} // namespace fxsparse
