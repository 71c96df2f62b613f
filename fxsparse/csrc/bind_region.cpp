// The operator `region`: reads its program, checks every number in it, and runs it (cpu/region.h).
#include <torch/csrc/stable/library.h>

#include "cpu/region.h"
#include "cpu_binding.h"

namespace fxsparse {
namespace {

// The integers of a step; docs/architecture.md has their order.
enum Kind : int64_t { kConvStep, kMaxPoolStep, kAddStep };
constexpr int64_t kConvLength = 23, kMaxPoolLength = 11, kAddLength = 4;

class Reader {
public:
  Reader(const std::vector<Tensor> &inputs, const std::vector<Tensor> &tensors, const std::vector<int64_t> &program)
      : tensors_(tensors), program_(program) {
    STD_TORCH_CHECK(!inputs.empty(), "'inputs' is empty, expected the images that the region begins with");
    const ImageSizes first = checked_images("inputs", inputs[0]);
    anchor_ = inputs[0];
    region.dtype = dtype_of(inputs[0]);
    region.batch = first.batch;
    for (const Tensor &input : inputs) {
      check_like("inputs", input, "inputs[0]", inputs[0]);
      const ImageSizes sizes = checked_images("inputs", input);
      STD_TORCH_CHECK(sizes.batch == first.batch && input.dim() == inputs[0].dim(),
                      "'inputs' have different numbers of images: ", sizes.batch, ", expected ", first.batch);
      contiguous_.push_back(as_contiguous(input));
      add_value(sizes.channels, sizes.height, sizes.width);
      region.values.back().input = static_cast<const char *>(contiguous_.back().const_data_ptr());
    }
  }

  void read() {
    while (at_ < int64_t(program_.size())) {
      const int64_t kind = program_[at_];
      if (kind == kConvStep)
        read_conv();
      else if (kind == kMaxPoolStep)
        read_max_pool();
      else
        read_add();
    }
  }

  int64_t checked_value(int64_t value) const {
    STD_TORCH_CHECK(value >= 0 && value < int64_t(region.values.size()), "The region names the value ", value,
                    ", expected one of the ", region.values.size(), " before it");
    return value;
  }

  Region region = {};

private:
  void add_value(int64_t channels, int64_t height, int64_t width) {
    region.values.push_back({channels, height, width, nullptr, nullptr, 0, 0});
  }

  const int64_t *take(int64_t length) {
    STD_TORCH_CHECK(at_ + length <= int64_t(program_.size()), "The region's program ends within a step");
    const int64_t *numbers = program_.data() + at_;
    at_ += length;
    return numbers;
  }

  const Tensor &tensor(int64_t index) const {
    STD_TORCH_CHECK(index >= 0 && index < int64_t(tensors_.size()), "The region names tensor ", index,
                    ", expected one of ", tensors_.size());
    return tensors_[index];
  }

  static Activation activation(int64_t number) {
    STD_TORCH_CHECK(number >= 0 && number <= int64_t(Activation::kHardswish), "The region names activation ", number,
                    ", expected 0 to ", int64_t(Activation::kHardswish));
    return Activation(number);
  }

  RegionStep step(StepKind kind, int64_t input, int64_t add) {
    RegionStep step = {};
    step.kind = kind;
    step.input = checked_value(input);
    step.add = add == -1 ? -1 : checked_value(add);
    step.output = int64_t(region.values.size());
    return step;
  }

  void check_added(const RegionStep &step) const {
    if (step.add < 0)
      return;
    const RegionValue &add = region.values[step.add], &out = region.values[step.output];
    STD_TORCH_CHECK(add.channels == out.channels && add.height == out.height && add.width == out.width,
                    "The region adds images of ", add.channels, " x ", add.height, " x ", add.width, " to such of ",
                    out.channels, " x ", out.height, " x ", out.width);
  }

  void read_conv() {
    const int64_t *n = take(kConvLength);
    RegionStep conv = step(StepKind::kConv, n[1], n[2]);
    const Tensor &values = tensor(n[3]), &columns = tensor(n[4]), &panels = tensor(n[5]), &rows = tensor(n[6]);
    STD_TORCH_CHECK(n[21] >= 0 && n[21] <= int64_t(PaddingMode::kCircular), "The region names padding mode ", n[21]);
    const RegionValue &in = region.values[conv.input];
    const Conv2dGeometry g = checked_geometry({region.batch, in.channels, in.height, in.width}, {n + 8, 4}, {n + 12, 2},
                                              {n + 14, 4}, {n + 18, 2}, n[20], PaddingMode(n[21]), activation(n[22]));
    check_packed(values, columns, panels, rows, "inputs", anchor_, g.out_channels);
    packed_.emplace_back(values, columns, panels, rows);
    conv.weight = packed_.back().weight();
    conv.conv = shape_of(g, region.dtype);
    if (n[7] != -1) {
      check_bias(tensor(n[7]), "inputs", anchor_, g.out_channels);
      contiguous_.push_back(as_contiguous(tensor(n[7])));
      conv.bias = contiguous_.back().const_data_ptr();
    }
    add_value(g.out_channels, g.out_height, g.out_width);
    check_added(conv);
    region.steps.push_back(conv);
  }

  void read_max_pool() {
    const int64_t *n = take(kMaxPoolLength);
    RegionStep pool = step(StepKind::kMaxPool, n[1], -1);
    const RegionValue in = region.values[pool.input];
    check_list("kernel_size", {n + 2, 2}, 2, 1);
    check_list("stride", {n + 4, 2}, 2, 1);
    check_list("padding", {n + 6, 2}, 2, 0);
    check_list("dilation", {n + 8, 2}, 2, 1);
    PoolShape &s = pool.pool;
    s = {in.height, in.width, 0, 0, {n[2], n[3]}, {n[4], n[5]}, {n[6], n[7]}, {n[8], n[9]}, 0};
    int64_t sizes[2] = {in.height, in.width};
    for (int axis = 0; axis < 2; ++axis) {
      STD_TORCH_CHECK(2 * s.pad[axis] <= s.kernel[axis], "'padding' is ", s.pad[axis],
                      ", expected at most half of the kernel's size ", s.kernel[axis]);
      sizes[axis] = checked_output_size(axis ? "width" : "height", sizes[axis], s.pad[axis], s.pad[axis],
                                        s.kernel[axis], s.stride[axis], s.dilation[axis], n[10] != 0);
    }
    s.out_height = sizes[0];
    s.out_width = sizes[1];
    const int64_t reach = (s.out_width - 1) * s.stride[1] + (s.kernel[1] - 1) * s.dilation[1] + 1;
    s.row_elements = std::max(reach, s.width + 2 * s.pad[1]) + 2 * kPanelLanes;
    add_value(in.channels, s.out_height, s.out_width);
    region.steps.push_back(pool);
  }

  void read_add() {
    STD_TORCH_CHECK(program_[at_] == kAddStep, "The region has a step of kind ", program_[at_], ", expected 0, 1 or 2");
    const int64_t *n = take(kAddLength);
    RegionStep add = step(StepKind::kAdd, n[1], n[2]);
    add.activation = activation(n[3]);
    const RegionValue in = region.values[add.input];
    add_value(in.channels, in.height, in.width);
    check_added(add);
    region.steps.push_back(add);
  }

  const std::vector<Tensor> &tensors_;
  const std::vector<int64_t> &program_;
  Tensor anchor_;
  std::vector<Tensor> contiguous_;
  std::vector<Packed> packed_; // keep alive what the region points at
  int64_t at_ = 0;
};

std::vector<Tensor> region(const std::vector<Tensor> &inputs, const std::vector<Tensor> &tensors,
                           const std::vector<int64_t> &program, const std::vector<int64_t> &outputs) {
  Reader reader(inputs, tensors, program);
  reader.read();
  Region &region = reader.region;
  std::vector<Tensor> results;
  bool empty_batch = region.batch == 0;
  for (const int64_t output : outputs) {
    RegionValue &value = region.values[reader.checked_value(output)];
    STD_TORCH_CHECK(value.input == nullptr && value.output == nullptr, "The region gives the value ", output,
                    " twice, or an input");
    std::vector<int64_t> sizes = {region.batch, value.channels, value.height, value.width};
    if (inputs[0].dim() == 3)
      sizes.erase(sizes.begin());
    results.push_back(empty(sizes, inputs[0].scalar_type()));
    value.output = static_cast<char *>(results.back().mutable_data_ptr());
  }
  for (const RegionValue &value : region.values)
    empty_batch = empty_batch || value.height == 0 || value.width == 0;
  if (empty_batch)
    return results;
  region.threads = torch::stable::get_num_threads();
  const int64_t bytes = plan_region(region);
  STD_TORCH_CHECK(bytes >= 0, "An image of the region has more than 2^32 elements once padded, which is not supported");
  const Tensor memory = empty({bytes}, ScalarType::Byte);
  run_region(region, memory.mutable_data_ptr(), parallel_workers);
  return results;
}

} // namespace
} // namespace fxsparse

STABLE_TORCH_LIBRARY_FRAGMENT(fxsparse, m) {
  m.def("region(Tensor[] inputs, Tensor[] tensors, int[] program, int[] outputs) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fxsparse, CPU, m) { m.impl("region", TORCH_BOX(&fxsparse::region)); }
