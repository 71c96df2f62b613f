// Reads the program of a region and checks every number in it, in the same words on every device.
#pragma once

#include "conv2d_arguments.h"

namespace fxsparse {

// A step begins with its kind; docs/architecture.md has the order of its other integers.
enum class ProgramKind : int64_t { kConv, kMaxPool, kAdd, kAverage, kLinear };
inline constexpr int64_t kConvLength = 23, kMaxPoolLength = 11, kAddLength = 4, kAverageLength = 2, kLinearLength = 4;

struct ProgramValue {
  int64_t channels, height, width;
};

// Of a maximum pooling: (vertical, horizontal) each.
struct PoolWindow {
  int64_t kernel[2], stride[2], pad[2], dilation[2];
};

struct ProgramStep {
  ProgramKind kind;
  int64_t input, add, output; // values; `add` may be -1
  Activation activation;      // of an addition; a convolution's is in its geometry
  Conv2dGeometry conv;
  int64_t weight[4], bias; // tensors; `bias` may be -1; a linear layer has one weight
  PoolWindow window;
};

class Program {
public:
  Program(const std::vector<Tensor> &inputs, const std::vector<Tensor> &tensors, const std::vector<int64_t> &program)
      : tensors_(tensors), program_(program) {
    STD_TORCH_CHECK(!inputs.empty(), "'inputs' is empty, expected the images that the region begins with");
    const ImageSizes first = checked_images("inputs", inputs[0]);
    batch = first.batch;
    for (const Tensor &input : inputs) {
      check_like("inputs", input, "inputs[0]", inputs[0]);
      const ImageSizes sizes = checked_images("inputs", input);
      STD_TORCH_CHECK(sizes.batch == first.batch && input.dim() == inputs[0].dim(),
                      "'inputs' have different numbers of images: ", sizes.batch, ", expected ", first.batch);
      values.push_back({sizes.channels, sizes.height, sizes.width});
    }
    while (at_ < int64_t(program_.size()))
      read_step();
  }

  int64_t checked_value(int64_t value) const {
    STD_TORCH_CHECK(value >= 0 && value < int64_t(values.size()), "The region names the value ", value,
                    ", expected one of the ", values.size(), " before it");
    return value;
  }

  const Tensor &tensor(int64_t index) const {
    STD_TORCH_CHECK(index >= 0 && index < int64_t(tensors_.size()), "The region names tensor ", index,
                    ", expected one of ", tensors_.size());
    return tensors_[index];
  }

  // Checks what the region returns: no input, and nothing twice. Returns the sizes of each.
  std::vector<std::vector<int64_t>> output_sizes(const std::vector<int64_t> &outputs, const Tensor &input) const {
    std::vector<bool> given(values.size(), false);
    std::vector<std::vector<int64_t>> found;
    for (const int64_t output : outputs) {
      const ProgramValue &value = values[checked_value(output)];
      STD_TORCH_CHECK(output >= inputs() && !given[output], "The region gives the value ", output,
                      " twice, or an input");
      given[output] = true;
      found.push_back({batch, value.channels, value.height, value.width});
      if (input.dim() == 3)
        found.back().erase(found.back().begin());
    }
    return found;
  }

  bool is_empty() const {
    bool empty = batch == 0;
    for (const ProgramValue &value : values)
      empty = empty || value.channels == 0 || value.height == 0 || value.width == 0;
    return empty;
  }

  int64_t inputs() const { return int64_t(values.size() - steps.size()); }

  int64_t batch;
  std::vector<ProgramValue> values; // the inputs, then what the steps make
  std::vector<ProgramStep> steps;

private:
  void read_step() {
    const int64_t kind = program_[at_];
    STD_TORCH_CHECK(kind >= 0 && kind <= int64_t(ProgramKind::kLinear), "The region has a step of kind ", kind,
                    ", expected 0 to ", int64_t(ProgramKind::kLinear));
    switch (ProgramKind(kind)) {
    case ProgramKind::kConv:
      return read_conv();
    case ProgramKind::kMaxPool:
      return read_max_pool();
    case ProgramKind::kAdd:
      return read_add();
    case ProgramKind::kAverage:
      return read_average();
    case ProgramKind::kLinear:
      return read_linear();
    }
  }

  const int64_t *take(int64_t length) {
    STD_TORCH_CHECK(at_ + length <= int64_t(program_.size()), "The region's program ends within a step");
    const int64_t *numbers = program_.data() + at_;
    at_ += length;
    return numbers;
  }

  static Activation activation(int64_t number) {
    STD_TORCH_CHECK(number >= 0 && number <= int64_t(Activation::kHardswish), "The region names activation ", number,
                    ", expected 0 to ", int64_t(Activation::kHardswish));
    return Activation(number);
  }

  ProgramStep step(ProgramKind kind, int64_t input, int64_t add) {
    ProgramStep step = {};
    step.kind = kind;
    step.input = checked_value(input);
    step.add = add == -1 ? -1 : checked_value(add);
    step.output = int64_t(values.size());
    return step;
  }

  void finish(const ProgramStep &step, const ProgramValue &out) {
    if (step.add >= 0) {
      const ProgramValue &add = values[step.add];
      STD_TORCH_CHECK(add.channels == out.channels && add.height == out.height && add.width == out.width,
                      "The region adds images of ", add.channels, " x ", add.height, " x ", add.width, " to such of ",
                      out.channels, " x ", out.height, " x ", out.width);
    }
    values.push_back(out);
    steps.push_back(step);
  }

  void read_conv() {
    const int64_t *n = take(kConvLength);
    ProgramStep conv = step(ProgramKind::kConv, n[1], n[2]);
    for (int i = 0; i < 4; ++i) {
      tensor(n[3 + i]);
      conv.weight[i] = n[3 + i];
    }
    conv.bias = n[7];
    STD_TORCH_CHECK(n[21] >= 0 && n[21] <= int64_t(PaddingMode::kCircular), "The region names padding mode ", n[21]);
    const ProgramValue in = values[conv.input];
    conv.conv = checked_geometry({batch, in.channels, in.height, in.width}, {n + 8, 4}, {n + 12, 2}, {n + 14, 4},
                                 {n + 18, 2}, n[20], PaddingMode(n[21]), activation(n[22]));
    if (conv.bias != -1)
      tensor(conv.bias);
    finish(conv, {conv.conv.out_channels, conv.conv.out_height, conv.conv.out_width});
  }

  void read_max_pool() {
    const int64_t *n = take(kMaxPoolLength);
    ProgramStep pool = step(ProgramKind::kMaxPool, n[1], -1);
    const ProgramValue in = values[pool.input];
    check_list("kernel_size", {n + 2, 2}, 2, 1);
    check_list("stride", {n + 4, 2}, 2, 1);
    check_list("padding", {n + 6, 2}, 2, 0);
    check_list("dilation", {n + 8, 2}, 2, 1);
    PoolWindow &w = pool.window;
    w = {{n[2], n[3]}, {n[4], n[5]}, {n[6], n[7]}, {n[8], n[9]}};
    int64_t sizes[2] = {in.height, in.width};
    for (int axis = 0; axis < 2; ++axis) {
      STD_TORCH_CHECK(2 * w.pad[axis] <= w.kernel[axis], "'padding' is ", w.pad[axis],
                      ", expected at most half of the kernel's size ", w.kernel[axis]);
      sizes[axis] = checked_output_size(axis ? "width" : "height", sizes[axis], w.pad[axis], w.pad[axis],
                                        w.kernel[axis], w.stride[axis], w.dilation[axis], n[10] != 0);
    }
    finish(pool, {in.channels, sizes[0], sizes[1]});
  }

  void read_add() {
    const int64_t *n = take(kAddLength);
    ProgramStep add = step(ProgramKind::kAdd, n[1], n[2]);
    add.activation = activation(n[3]);
    finish(add, values[add.input]);
  }

  void read_average() {
    const int64_t *n = take(kAverageLength);
    const ProgramStep average = step(ProgramKind::kAverage, n[1], -1);
    finish(average, {values[average.input].channels, 1, 1});
  }

  void read_linear() {
    const int64_t *n = take(kLinearLength);
    ProgramStep linear = step(ProgramKind::kLinear, n[1], -1);
    const ProgramValue &in = values[linear.input];
    STD_TORCH_CHECK(in.height == 1 && in.width == 1, "The region has a linear layer on planes of ", in.height, " x ",
                    in.width, ", expected one pixel");
    const Tensor &weight = tensor(n[2]);
    STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == in.channels, "The weight of the region's linear layer is ",
                    list_text(weight.sizes()), ", expected (any, ", in.channels, ")");
    linear.weight[0] = n[2];
    linear.bias = n[3];
    if (linear.bias != -1)
      tensor(linear.bias);
    finish(linear, {weight.size(0), 1, 1});
  }

  const std::vector<Tensor> &tensors_;
  const std::vector<int64_t> &program_;
  int64_t at_ = 0;
};

} // namespace fxsparse
