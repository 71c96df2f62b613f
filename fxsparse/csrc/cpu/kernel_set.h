// The kernels of one instruction set, gathered for the planner.
#pragma once

#include "cpu/decode_columns.h"
#include "cpu/depthwise_kernel.h"
#include "cpu/gather_input.h"
#include "cpu/pool_kernel.h"
#include "cpu/run_unit.h"

namespace fxsparse::FXSPARSE_ISA {

template <class T> void widen_values(const void *values, int64_t first, int64_t last, void *out) {
  const int64_t count = last - first;
  copy_rows((const T *)values + first, 0, (float *)out + first, 1, {0, count, count, 1});
}

template <class T> constexpr KernelSet make_kernel_set() {
  using A = typename AccumulatorOf<T>::type;
  KernelSet set = {};
  set.lanes = kLanes<A>;
  set.positions = kMaxPositions;
  set.unit_panels = kMaxVectors;
  set.gather = gather_input<T, A>;
  set.decode = decode_columns;
  if constexpr (sizeof(T) == 2)
    set.widen = widen_values<T>;
  set.run = run_unit<T, A>;
#if defined(__AVX2__)
  if constexpr (sizeof(T) == sizeof(A))
    set.depthwise = run_depthwise<A>;
#endif
  set.max_pool = max_pool<T, A>;
  set.average = average_planes<T, A>;
  set.add_activate = add_activate<T, A>;
  return set;
}

inline const KernelSet &kernel_set(Dtype dtype) {
  static constexpr KernelSet float32 = make_kernel_set<float>(), float64 = make_kernel_set<double>(),
                             bfloat16 = make_kernel_set<BFloat16>(), float16 = make_kernel_set<Float16>();
  switch (dtype) {
  case Dtype::kFloat32:
    return float32;
  case Dtype::kFloat64:
    return float64;
  case Dtype::kBFloat16:
    return bfloat16;
  default:
    return float16;
  }
}

} // namespace fxsparse::FXSPARSE_ISA
