// What every machine of the architecture has: SSE2 on x86-64, NEON on arm64.
#define COLLECTIVES_ISA baseline
#define COLLECTIVES_VECTOR_BYTES 16

#include "dispatch.hpp"
#include "kernel_table.hpp"

namespace collectives::kernels::baseline {

#if defined(__aarch64__)
constexpr const char* name = "neon";
#else
constexpr const char* name = "baseline";
#endif

extern constinit const KernelTable table = make_table(name);

}  // namespace collectives::kernels::baseline
