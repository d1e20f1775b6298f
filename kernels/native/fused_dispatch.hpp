// Which instruction sets the fused kernels were compiled for, and which of them this processor can run.
#pragma once

#include <vector>

#include "fused_types.hpp"

namespace collectives::kernels {

namespace baseline {
extern const FusedTable fused_table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const FusedTable fused_table;
}
namespace avx512 {
extern const FusedTable fused_table;
}
#endif

// The tables that this processor can run, in the order of `runnable_tables`.
std::vector<const FusedTable*> runnable_fused_tables();

}  // namespace collectives::kernels
