// The operator `region` on a CPU: makes of its program (region_program.h) what cpu/region.h runs. The schemas of both
// operators for regions are here.
#include <torch/csrc/stable/library.h>

#include "cpu/region.h"
#include "cpu_binding.h"
#include "region_program.h"

namespace fxsparse {
namespace {

// A region with the tensors that it points at.
class Bound {
public:
  Bound(const Program &program, const std::vector<Tensor> &inputs) : anchor_(inputs[0]) {
    region.dtype = dtype_of(inputs[0]);
    region.batch = program.batch;
    for (const ProgramValue &value : program.values)
      region.values.push_back(
          {value.channels, value.height, value.width, nullptr, nullptr, 0, value.height * value.width, 0, 0});
    for (size_t i = 0; i < inputs.size(); ++i) {
      contiguous_.push_back(as_contiguous(inputs[i]));
      region.values[i].input = static_cast<const char *>(contiguous_.back().const_data_ptr());
    }
    for (const ProgramStep &step : program.steps)
      add(program, step);
  }

  Region region = {};

private:
  void add(const Program &program, const ProgramStep &from) {
    RegionStep step = {};
    step.input = from.input;
    step.add = from.add;
    step.output = from.output;
    step.activation = from.activation;
    if (from.kind == ProgramKind::kConv)
      conv(program, from, step);
    else if (from.kind == ProgramKind::kMaxPool)
      max_pool(program, from, step);
    else {
      STD_TORCH_CHECK(from.kind != ProgramKind::kLinear,
                      "The region has a linear layer, which CUDA's regions have only");
      step.kind = from.kind == ProgramKind::kAdd ? StepKind::kAdd : StepKind::kAverage;
    }
    region.steps.push_back(step);
  }

  void conv(const Program &program, const ProgramStep &from, RegionStep &step) {
    const Tensor &values = program.tensor(from.weight[0]), &columns = program.tensor(from.weight[1]),
                 &panels = program.tensor(from.weight[2]), &rows = program.tensor(from.weight[3]);
    check_packed(values, columns, panels, rows, "inputs", anchor_, from.conv.out_channels);
    packed_.emplace_back(values, columns, panels, rows);
    step.kind = StepKind::kConv;
    step.weight = packed_.back().weight();
    step.conv = shape_of(from.conv, region.dtype);
    if (from.bias == -1)
      return;
    check_bias(program.tensor(from.bias), "inputs", anchor_, from.conv.out_channels);
    contiguous_.push_back(as_contiguous(program.tensor(from.bias)));
    step.bias = contiguous_.back().const_data_ptr();
  }

  static void max_pool(const Program &program, const ProgramStep &from, RegionStep &step) {
    const ProgramValue &in = program.values[from.input], &out = program.values[from.output];
    const PoolWindow &w = from.window;
    const int64_t reach = (out.width - 1) * w.stride[1] + (w.kernel[1] - 1) * w.dilation[1] + 1;
    step.kind = StepKind::kMaxPool;
    step.pool = {in.height,
                 in.width,
                 out.height,
                 out.width,
                 {w.kernel[0], w.kernel[1]},
                 {w.stride[0], w.stride[1]},
                 {w.pad[0], w.pad[1]},
                 {w.dilation[0], w.dilation[1]},
                 std::max(reach, in.width + 2 * w.pad[1]) + 2 * kPanelLanes};
  }

  Tensor anchor_;
  std::vector<Tensor> contiguous_;
  std::vector<Packed> packed_; // keep alive what the region points at
};

std::vector<Tensor> region(const std::vector<Tensor> &inputs, const std::vector<Tensor> &tensors,
                           const std::vector<int64_t> &numbers, const std::vector<int64_t> &outputs) {
  const Program program(inputs, tensors, numbers);
  Bound bound(program, inputs);
  Region &region = bound.region;
  std::vector<Tensor> results;
  for (const std::vector<int64_t> &sizes : program.output_sizes(outputs, inputs[0])) {
    const int64_t output = outputs[results.size()];
    results.push_back(empty(sizes, inputs[0].scalar_type()));
    region.values[output].output = static_cast<char *>(results.back().mutable_data_ptr());
  }
  if (program.is_empty())
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
  m.def("region_batch_inner(Tensor[] inputs, Tensor[] tensors, int[] program, int[] outputs, "
        "int[] channels_last, bool allow_tf32) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fxsparse, CPU, m) { m.impl("region", TORCH_BOX(&fxsparse::region)); }
