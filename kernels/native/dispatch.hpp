// Which instruction sets were compiled in, and which of them this processor can run.
#pragma once

#include <vector>

#include "types.hpp"

namespace collectives::kernels {

namespace baseline {
extern const KernelTable table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const KernelTable table;
}
namespace avx512 {
extern const KernelTable table;
}
#endif

// The tables that this processor can run, the widest first; never empty.
std::vector<const KernelTable*> runnable_tables();

}  // namespace collectives::kernels
