#include "cpu/kernel_set.h"

namespace fxsparse {

const KernelSet &avx2_kernels(Dtype dtype) { return avx2::kernel_set(dtype); }

} // namespace fxsparse
