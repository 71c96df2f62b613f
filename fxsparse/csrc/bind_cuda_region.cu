// The operator `region_batch_inner` on CUDA: all steps on batch-innermost images, or on few images as torch stores
// them. Everything is queued on the current stream; the memory of the values between is one tensor of torch's
// allocator.
#include "batch_inner_region.h"
#include "plane_region.h"

#include <torch/csrc/stable/library.h>

namespace fxsparse {
namespace {

std::vector<Tensor> region_batch_inner(const std::vector<Tensor> &inputs, const std::vector<Tensor> &tensors,
                                       const std::vector<int64_t> &numbers, const std::vector<int64_t> &outputs,
                                       const std::vector<int64_t> &channels_last, bool allow_tf32) {
  const Program program(inputs, tensors, numbers);
  check_cuda("inputs", inputs[0]);
  const torch::stable::accelerator::DeviceGuard guard(inputs[0].get_device_index());
  std::vector<Tensor> results;
  for (const std::vector<int64_t> &sizes : program.output_sizes(outputs, inputs[0])) {
    const bool last =
        std::find(channels_last.begin(), channels_last.end(), outputs[results.size()]) != channels_last.end();
    results.push_back(empty_cuda(sizes, inputs[0].scalar_type(), last, inputs[0].get_device_index()));
  }
  if (program.is_empty()) // nothing to compute: bad weights are refused all the same
    BatchInnerRegion(program, inputs, outputs, results, allow_tf32);
  else if (runs_on_planes(program))
    PlaneRegion(program, inputs, outputs, results, allow_tf32).queue();
  else
    BatchInnerRegion(program, inputs, outputs, results, allow_tf32).queue();
  return results;
}

} // namespace
} // namespace fxsparse

STABLE_TORCH_LIBRARY_IMPL(fxsparse, CUDA, m) { m.impl("region_batch_inner", TORCH_BOX(&fxsparse::region_batch_inner)); }
