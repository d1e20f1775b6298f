#define COLLECTIVES_ISA avx2
#define COLLECTIVES_VECTOR_BYTES 32

#include "fused_dispatch.hpp"
#include "fused_table.hpp"

namespace collectives::kernels::avx2 {

extern constinit const FusedTable fused_table = make_fused_table("avx2");

}  // namespace collectives::kernels::avx2
