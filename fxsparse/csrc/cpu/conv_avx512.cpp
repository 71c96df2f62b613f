#include "cpu/kernel_set.h"

namespace fxsparse {

const KernelSet &avx512_kernels(Dtype dtype) { return avx512::kernel_set(dtype); }

} // namespace fxsparse
