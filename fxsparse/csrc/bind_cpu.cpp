// Operator schemas of fxsparse, argument checks, and the CPU implementations' registration.
// Nothing here needs Python: `torch.ops.load_library` loads the library, and so does dlopen from a C++ program.
#include <torch/csrc/stable/library.h>

#include "cpu/isa.h"
#include "cpu/packed.h"
#include "cpu/plan.h"
#include "cpu_binding.h"

namespace fxsparse {
namespace {

Tensor conv2d(const Tensor &input, const Tensor &values, const Tensor &columns, const Tensor &panels,
              const Tensor &rows, const std::optional<Tensor> &bias, IntHeaderOnlyArrayRef weight_shape,
              IntHeaderOnlyArrayRef stride, IntHeaderOnlyArrayRef padding, IntHeaderOnlyArrayRef dilation,
              int64_t groups, const std::string &padding_mode, const std::string &activation,
              const std::optional<Tensor> &add) {
  const Conv2dGeometry geometry = check_conv2d(input, values, columns, panels, rows, bias, weight_shape, stride,
                                               padding, dilation, groups, padding_mode, activation, add);
  const ConvShape shape = shape_of(geometry, dtype_of(input));
  const Packed packed(values, columns, panels, rows);
  const PackedWeight weight = packed.weight();
  const Tensor output = empty(output_shape(geometry, input), input.scalar_type());
  if (output.numel() == 0)
    return output;
  const Tensor dense_input = as_contiguous(input);
  const std::optional<Tensor> dense_bias = as_contiguous(bias), dense_add = as_contiguous(add);
  Conv plan;
  const int64_t bytes = plan_conv(shape, weight, torch::stable::get_num_threads(), plan);
  STD_TORCH_CHECK(bytes >= 0, "'input' has more than 2^32 elements per image once padded, which is not supported");
  const Tensor scratch = empty({bytes}, ScalarType::Byte);
  const InputRows rows_in = {dense_input.const_data_ptr(), 0, shape.height};
  const ConvTensors tensors = {&rows_in,
                               1,
                               0,
                               dense_bias ? dense_bias->const_data_ptr() : nullptr,
                               dense_add ? dense_add->const_data_ptr() : nullptr,
                               output.mutable_data_ptr()};
  run_conv(plan, weight, tensors, scratch.mutable_data_ptr(), parallel_workers);
  return output;
}

// Panels [0, count) in parallel, in chunks that are worth a thread.
template <class Body> void parallel_panels(int64_t count, const Body &body) {
  constexpr int64_t kPanelsPerThread = 4;
  torch::stable::parallel_for(0, count, kPanelsPerThread, body);
}

Tensor unpack(const Tensor &values, const Tensor &columns, const Tensor &panels, const Tensor &rows,
              IntHeaderOnlyArrayRef weight_shape) {
  const int64_t row_columns = check_unpack(values, columns, panels, rows, weight_shape);
  const Packed packed(values, columns, panels, rows);
  const PackedWeight weight = packed.weight();
  Tensor dense = empty(weight_shape, values.scalar_type());
  torch::stable::zero_(dense);
  parallel_panels(weight.num_panels, [&](int64_t first, int64_t last) {
    unpack_panels(weight, row_columns, int64_t(values.element_size()), first, last, dense.mutable_data_ptr());
  });
  return dense;
}

Tensor repack(const Tensor &weight, const Tensor &columns, const Tensor &panels, const Tensor &rows, int64_t values) {
  const int64_t row_columns = check_repack(weight, columns, panels, rows, values);
  const Tensor dense = as_contiguous(weight);
  const Packed packed(empty({values}, weight.scalar_type()), columns, panels, rows);
  const PackedWeight tables = packed.weight();
  parallel_panels(tables.num_panels, [&](int64_t first, int64_t last) {
    repack_panels(tables, row_columns, int64_t(dense.element_size()), first, last, dense.const_data_ptr(),
                  packed.values.mutable_data_ptr());
  });
  return packed.values;
}

void validate(const Tensor &columns, const Tensor &panels, const Tensor &rows, int64_t values,
              IntHeaderOnlyArrayRef weight_shape, int64_t groups) {
  const int64_t row_columns = checked_row_columns(weight_shape);
  check_tables(columns, panels, rows, "columns", columns);
  STD_TORCH_CHECK(groups >= 1 && weight_shape[0] % groups == 0, "'groups' is ", groups, ", expected a divisor of the ",
                  weight_shape[0], " output channels");
  STD_TORCH_CHECK(values >= 0, "'values' is ", values, ", expected the number of packed values");
  const Packed packed(empty({0}, ScalarType::Float), columns, panels, rows);
  PackedWeight tables = packed.weight();
  tables.num_values = values;
  const std::string wrong = describe_invalid_tables(tables, weight_shape[0], row_columns, weight_shape[1], groups);
  STD_TORCH_CHECK(wrong.empty(), "The packed weight is damaged: ", wrong);
}

std::string cpu_isa() { return isa_name(selected_isa()); }

} // namespace
} // namespace fxsparse

STABLE_TORCH_LIBRARY(fxsparse, m) {
  m.def("conv2d(Tensor input, Tensor values, Tensor columns, Tensor panels, Tensor rows, Tensor? bias, "
        "int[] weight_shape, int[] stride, int[] padding, int[] dilation, int groups, "
        "str padding_mode=\"zeros\", str activation=\"none\", Tensor? add=None) -> Tensor");
  m.def("conv2d_batch_inner(Tensor input, Tensor tile_values, Tensor tile_columns, Tensor tiles, Tensor tile_rows, "
        "Tensor? bias, int[] weight_shape, int[] stride, int[] padding, int[] dilation, int groups, "
        "str activation=\"none\", Tensor? add=None, str kernel=\"auto\", bool overlap=True, "
        "bool allow_tf32=False) -> Tensor");
  m.def("conv2d_planes(Tensor input, Tensor tile_values, Tensor tile_columns, Tensor tiles, Tensor tile_rows, "
        "Tensor? bias, int[] weight_shape, int[] stride, int[] padding, int[] dilation, int groups, "
        "str activation=\"none\", Tensor? add=None, int[] tile=[0, 0, 0], bool overlap=False, "
        "bool allow_tf32=False) -> Tensor");
  m.def("unpack(Tensor values, Tensor columns, Tensor panels, Tensor rows, int[] weight_shape) -> Tensor");
  m.def("repack(Tensor weight, Tensor columns, Tensor panels, Tensor rows, int values) -> Tensor");
  m.def("validate(Tensor columns, Tensor panels, Tensor rows, int values, int[] weight_shape, int groups) -> ()");
  m.def("cpu_isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fxsparse, CPU, m) {
  m.impl("conv2d", TORCH_BOX(&fxsparse::conv2d));
  m.impl("unpack", TORCH_BOX(&fxsparse::unpack));
  m.impl("repack", TORCH_BOX(&fxsparse::repack));
  m.impl("validate", TORCH_BOX(&fxsparse::validate));
}

STABLE_TORCH_LIBRARY_IMPL(fxsparse, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&fxsparse::cpu_isa)); }
