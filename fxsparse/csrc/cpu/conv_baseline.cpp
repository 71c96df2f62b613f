#include "cpu/kernel_set.h"

namespace fxsparse {

const KernelSet &baseline_kernels(Dtype dtype) { return baseline::kernel_set(dtype); }

} // namespace fxsparse
