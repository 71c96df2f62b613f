#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fxsparse {
namespace {

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return avx512 ? Isa::kAvx512 : Isa::kAvx2;
  }
#endif
  return Isa::kBaseline;
}

Isa choose_isa() {
  const Isa best = best_isa();
  const char *wanted = std::getenv("FXSPARSE_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0')
    return best;
  for (Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
    if (std::string(wanted) != isa_name(isa))
      continue;
    if (isa > best)
      throw std::runtime_error(std::string("FXSPARSE_CPU_ISA='") + wanted +
                               "' is not available on this CPU, which has '" + isa_name(best) +
                               "'. Unset the variable or choose a lower set.");
    return isa;
  }
  throw std::runtime_error(std::string("FXSPARSE_CPU_ISA='") + wanted +
                           "' is unknown. Choose 'avx512', 'avx2' or 'baseline'.");
}

} // namespace

Isa selected_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

const char *isa_name(Isa isa) {
  switch (isa) {
  case Isa::kAvx512:
    return "avx512";
  case Isa::kAvx2:
    return "avx2";
  default:
    return "baseline";
  }
}

} // namespace fxsparse
