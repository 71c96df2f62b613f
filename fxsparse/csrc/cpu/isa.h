// Which of the compiled kernel sets runs on this machine.
#pragma once

namespace fxsparse {

enum class Isa { kBaseline, kAvx2, kAvx512 };

// The best set that the CPU has, or the one that FXSPARSE_CPU_ISA names (read once). Throws std::runtime_error if the
// variable holds an unknown name or a set that this CPU lacks.
Isa selected_isa();

const char *isa_name(Isa isa);

} // namespace fxsparse
