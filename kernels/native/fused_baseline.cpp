// What every machine of the architecture has: SSE2 on x86-64, NEON on arm64.
#define COLLECTIVES_ISA baseline
#define COLLECTIVES_VECTOR_BYTES 16

#include "fused_dispatch.hpp"
#include "fused_table.hpp"

namespace collectives::kernels::baseline {

#if defined(__aarch64__)
constexpr const char* name = "neon";
#else
constexpr const char* name = "baseline";
#endif

extern constinit const FusedTable fused_table = make_fused_table(name);

}  // namespace collectives::kernels::baseline
