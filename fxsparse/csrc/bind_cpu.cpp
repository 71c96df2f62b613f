// Operator schemas of fxsparse, argument checks, and the CPU implementations' registration.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "cpu/conv.h"
#include "cpu/isa.h"
#include "cpu/packed.h"
#include "cpu/plan.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&definition);
}

namespace fxsparse {
namespace {

template <class List> std::string list_string(const List &list) {
  std::ostringstream out;
  out << '(';
  for (size_t i = 0; i < list.size(); ++i)
    out << (i ? ", " : "") << list[i];
  out << ')';
  return out.str();
}

std::string sizes_string(const Tensor &t) { return list_string(t.sizes()); }

Dtype dtype_of(const Tensor &t, const char *name) {
  switch (t.scalar_type()) {
  case ScalarType::Float:
    return Dtype::kFloat32;
  case ScalarType::Double:
    return Dtype::kFloat64;
  case ScalarType::BFloat16:
    return Dtype::kBFloat16;
  case ScalarType::Half:
    return Dtype::kFloat16;
  default:
    STD_TORCH_CHECK(false, "'", name, "' has dtype ", torch::headeronly::toString(t.scalar_type()),
                    ", expected float32, float64, bfloat16 or float16");
  }
}

void check_table(const Tensor &t, const char *name, ScalarType dtype, int64_t width) {
  STD_TORCH_CHECK(t.is_cpu(), "'", name, "' is not on the CPU, where the input is");
  STD_TORCH_CHECK(t.scalar_type() == dtype, "'", name, "' has dtype ", torch::headeronly::toString(t.scalar_type()),
                  ", expected ", torch::headeronly::toString(dtype));
  if (width == 0) {
    STD_TORCH_CHECK(t.dim() == 1, "'", name, "' has shape ", sizes_string(t), ", expected one dimension");
  } else {
    STD_TORCH_CHECK(t.dim() == 2 && t.size(1) == width, "'", name, "' has shape ", sizes_string(t),
                    ", expected (any, ", width, ")");
  }
}

void check_like(const Tensor &t, const char *name, const Tensor &reference, const char *reference_name) {
  STD_TORCH_CHECK(t.is_cpu(), "'", name, "' is not on the CPU, where '", reference_name, "' is");
  STD_TORCH_CHECK(t.scalar_type() == reference.scalar_type(), "'", name, "' has dtype ",
                  torch::headeronly::toString(t.scalar_type()), ", expected that of '", reference_name, "', ",
                  torch::headeronly::toString(reference.scalar_type()));
}

void check_list(const Ints &list, const char *name, size_t length, int64_t least) {
  STD_TORCH_CHECK(list.size() == length, "'", name, "' is ", list_string(list), ", expected ", length, " integers");
  for (int64_t i : list)
    STD_TORCH_CHECK(i >= least && i <= std::numeric_limits<int32_t>::max(), "'", name, "' is ", list_string(list),
                    ", expected every entry to be at least ", least, " and below 2^31");
}

// A call through the dispatcher costs more than a small convolution, so contiguous tensors take none.
Tensor as_contiguous(const Tensor &t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

std::optional<Tensor> as_contiguous(const std::optional<Tensor> &t) {
  return t.has_value() ? std::optional(as_contiguous(*t)) : std::nullopt;
}

// The packed tables, contiguous, and pointers to them.
struct Packed {
  Tensor values, columns, panels, rows;

  Packed(const Tensor &values, const Tensor &columns, const Tensor &panels, const Tensor &rows)
      : values(as_contiguous(values)), columns(as_contiguous(columns)),
        panels(as_contiguous(panels)), rows(as_contiguous(rows)) {
    check_table(columns, "columns", ScalarType::Int, 0);
    check_table(panels, "panels", ScalarType::Long, kPanelFields);
    check_table(rows, "rows", ScalarType::Long, kRowFields);
    STD_TORCH_CHECK(values.dim() == 1, "'values' has shape ", sizes_string(values), ", expected one dimension");
    STD_TORCH_CHECK(rows.size(0) == panels.size(0) * kPanelLanes, "'rows' has shape ", sizes_string(rows),
                    ", expected (", panels.size(0) * kPanelLanes, ", ", int64_t(kRowFields),
                    "): ", kPanelLanes, " for each of ", panels.size(0), " panels");
  }

  PackedWeight weight() const {
    return {values.const_data_ptr(),           columns.const_data_ptr<int32_t>(),
            panels.const_data_ptr<int64_t>(), rows.const_data_ptr<int64_t>(),
            values.numel(),                    columns.numel(),
            panels.size(0)};
  }
};

int64_t checked_columns(const Ints &weight_shape) {
  check_list(weight_shape, "weight_shape", 4, 1);
  int64_t columns = 0;
  const bool overflows = __builtin_mul_overflow(weight_shape[1], weight_shape[2], &columns) ||
                         __builtin_mul_overflow(columns, weight_shape[3], &columns) ||
                         columns > std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(!overflows, "'weight_shape' is ", list_string(weight_shape),
                  ", whose rows have more than 2^31 - 1 weights, the most that int32 column indices reach");
  return columns;
}

PaddingMode padding_mode_of(const std::string &name) {
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

Activation activation_of(const std::string &name) {
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

void check_padding(const ConvShape &shape) {
  for (int side = 0; side < 4; ++side) {
    const int64_t size = side < 2 ? shape.height : shape.width;
    if (shape.mode == PaddingMode::kReflect) {
      STD_TORCH_CHECK(shape.pad[side] < size, "'padding' has ", shape.pad[side],
                      ", expected less than the input's size ", size, " for padding_mode 'reflect'");
    } else if (shape.mode == PaddingMode::kCircular) {
      STD_TORCH_CHECK(shape.pad[side] <= size, "'padding' has ", shape.pad[side],
                      ", expected at most the input's size ", size, " for padding_mode 'circular'");
    } else if (shape.mode == PaddingMode::kReplicate) {
      STD_TORCH_CHECK(size > 0, "'input' is empty, which padding_mode 'replicate' cannot pad");
    }
  }
}

ConvShape checked_shape(const Tensor &input, const Ints &weight_shape, const Ints &stride, const Ints &padding,
                        const Ints &dilation, int64_t groups, const std::string &padding_mode,
                        const std::string &activation) {
  ConvShape shape = {};
  shape.dtype = dtype_of(input, "input");
  const int64_t dim = input.dim();
  STD_TORCH_CHECK(dim == 3 || dim == 4, "'input' has shape ", sizes_string(input),
                  ", expected (N, C, H, W) or (C, H, W)");
  shape.weight_columns = checked_columns(weight_shape);
  check_list(stride, "stride", 2, 1);
  check_list(padding, "padding", 4, 0);
  check_list(dilation, "dilation", 2, 1);
  shape.batch = dim == 4 ? input.size(0) : 1;
  shape.channels = input.size(dim - 3);
  shape.height = input.size(dim - 2);
  shape.width = input.size(dim - 1);
  shape.out_channels = weight_shape[0];
  STD_TORCH_CHECK(groups >= 1 && shape.out_channels % groups == 0, "'groups' is ", groups,
                  ", expected a divisor of the ", shape.out_channels, " output channels");
  STD_TORCH_CHECK(shape.channels % groups == 0 && shape.channels / groups == weight_shape[1], "'input' has ",
                  shape.channels, " channels, expected ", groups, " groups of ", weight_shape[1],
                  ", as 'weight_shape' ", list_string(weight_shape), " says");
  shape.mode = padding_mode_of(padding_mode);
  shape.activation = activation_of(activation);
  for (int i = 0; i < 4; ++i)
    shape.pad[i] = padding[i];
  check_padding(shape);
  int64_t out[2];
  for (int i = 0; i < 2; ++i) {
    shape.kernel[i] = weight_shape[2 + i];
    shape.stride[i] = stride[i];
    shape.dilation[i] = dilation[i];
    const int64_t padded = (i == 0 ? shape.height : shape.width) + padding[2 * i] + padding[2 * i + 1];
    const int64_t reach = dilation[i] * (shape.kernel[i] - 1) + 1;
    STD_TORCH_CHECK(padded >= reach, "The ", i == 0 ? "height" : "width", " of the padded input is ", padded,
                    ", expected at least ", reach, ", what the kernel covers");
    out[i] = (padded - reach) / stride[i] + 1;
  }
  shape.out_height = out[0];
  shape.out_width = out[1];
  return shape;
}

void parallel_workers(int64_t workers, void (*body)(int64_t worker, void *context), void *context) {
  torch::stable::parallel_for(0, workers, 1, [=](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker)
      body(worker, context);
  });
}

Tensor conv2d(const Tensor &input, const Tensor &values, const Tensor &columns, const Tensor &panels,
              const Tensor &rows, const std::optional<Tensor> &bias, const Ints &weight_shape, const Ints &stride,
              const Ints &padding, const Ints &dilation, int64_t groups, const std::string &padding_mode,
              const std::string &activation, const std::optional<Tensor> &add) {
  const ConvShape shape =
      checked_shape(input, weight_shape, stride, padding, dilation, groups, padding_mode, activation);
  const Packed packed(values, columns, panels, rows);
  check_like(values, "values", input, "input");
  const PackedWeight weight = packed.weight();
  STD_TORCH_CHECK(weight.num_panels * kPanelLanes >= shape.out_channels, "'rows' has ",
                  weight.num_panels * kPanelLanes, " lanes, expected at least the ", shape.out_channels,
                  " output channels");
  Ints out_sizes = {shape.out_channels, shape.out_height, shape.out_width};
  if (input.dim() == 4)
    out_sizes.insert(out_sizes.begin(), shape.batch);
  if (bias.has_value()) {
    check_like(*bias, "bias", input, "input");
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == shape.out_channels, "'bias' has shape ",
                    sizes_string(*bias), ", expected (", shape.out_channels, ")");
  }
  if (add.has_value()) {
    check_like(*add, "add", input, "input");
    STD_TORCH_CHECK(list_string(add->sizes()) == list_string(out_sizes), "'add' has shape ", sizes_string(*add),
                    ", expected that of the output, ", list_string(out_sizes));
  }
  const Tensor output = torch::stable::empty(out_sizes, input.scalar_type());
  if (output.numel() == 0)
    return output;
  const Tensor dense_input = as_contiguous(input);
  const std::optional<Tensor> dense_bias = as_contiguous(bias), dense_add = as_contiguous(add);
  Conv plan;
  const int64_t bytes = plan_conv(shape, weight, torch::stable::get_num_threads(), plan);
  STD_TORCH_CHECK(bytes >= 0, "'input' has more than 2^32 elements per image once padded, which is not supported");
  const Tensor scratch = torch::stable::empty({bytes}, ScalarType::Byte);
  const ConvTensors tensors = {dense_input.const_data_ptr(),
                               dense_bias ? dense_bias->const_data_ptr() : nullptr,
                               dense_add ? dense_add->const_data_ptr() : nullptr, output.mutable_data_ptr()};
  run_conv(plan, weight, tensors, scratch.mutable_data_ptr(), parallel_workers);
  return output;
}

// Panels [0, count) in parallel, in chunks that are worth a thread.
template <class Body> void parallel_panels(int64_t count, const Body &body) {
  constexpr int64_t kPanelsPerThread = 4;
  torch::stable::parallel_for(0, count, kPanelsPerThread, body);
}

Tensor unpack(const Tensor &values, const Tensor &columns, const Tensor &panels, const Tensor &rows,
              const Ints &weight_shape) {
  dtype_of(values, "values");
  const int64_t row_columns = checked_columns(weight_shape);
  const Packed packed(values, columns, panels, rows);
  const PackedWeight weight = packed.weight();
  Tensor dense = torch::stable::empty(weight_shape, values.scalar_type());
  torch::stable::zero_(dense);
  parallel_panels(weight.num_panels, [&](int64_t first, int64_t last) {
    unpack_panels(weight, row_columns, int64_t(values.element_size()), first, last, dense.mutable_data_ptr());
  });
  return dense;
}

Tensor repack(const Tensor &weight, const Tensor &columns, const Tensor &panels, const Tensor &rows, int64_t values) {
  dtype_of(weight, "weight");
  STD_TORCH_CHECK(weight.dim() == 4, "'weight' has shape ", sizes_string(weight), ", expected (O, C / groups, kh, kw)");
  STD_TORCH_CHECK(values >= 0, "'values' is ", values, ", expected the number of packed values");
  const Ints weight_shape = {weight.size(0), weight.size(1), weight.size(2), weight.size(3)};
  const int64_t row_columns = checked_columns(weight_shape);
  const Tensor dense = as_contiguous(weight);
  const Packed packed(torch::stable::empty({values}, weight.scalar_type()), columns, panels, rows);
  const PackedWeight tables = packed.weight();
  parallel_panels(tables.num_panels, [&](int64_t first, int64_t last) {
    repack_panels(tables, row_columns, int64_t(dense.element_size()), first, last, dense.const_data_ptr(),
                  packed.values.mutable_data_ptr());
  });
  return packed.values;
}

void validate(const Tensor &columns, const Tensor &panels, const Tensor &rows, int64_t values,
              const Ints &weight_shape, int64_t groups) {
  const int64_t row_columns = checked_columns(weight_shape);
  STD_TORCH_CHECK(groups >= 1 && weight_shape[0] % groups == 0, "'groups' is ", groups, ", expected a divisor of the ",
                  weight_shape[0], " output channels");
  STD_TORCH_CHECK(values >= 0, "'values' is ", values, ", expected the number of packed values");
  const Packed packed(torch::stable::empty({0}, ScalarType::Float), columns, panels, rows);
  PackedWeight tables = packed.weight();
  tables.num_values = values;
  const std::string wrong =
      describe_invalid_tables(tables, weight_shape[0], row_columns, weight_shape[1], groups);
  STD_TORCH_CHECK(wrong.empty(), "The packed weight is damaged: ", wrong);
}

std::string cpu_isa() { return isa_name(selected_isa()); }

} // namespace
} // namespace fxsparse

STABLE_TORCH_LIBRARY(fxsparse, m) {
  m.def("conv2d(Tensor input, Tensor values, Tensor columns, Tensor panels, Tensor rows, Tensor? bias, "
        "int[] weight_shape, int[] stride, int[] padding, int[] dilation, int groups, "
        "str padding_mode=\"zeros\", str activation=\"none\", Tensor? add=None) -> Tensor");
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

STABLE_TORCH_LIBRARY_IMPL(fxsparse, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&fxsparse::cpu_isa));
}
