#define COLLECTIVES_ISA avx512
#define COLLECTIVES_VECTOR_BYTES 64

#include "fused_dispatch.hpp"
#include "fused_table.hpp"

namespace collectives::kernels::avx512 {

extern constinit const FusedTable fused_table = make_fused_table("avx512");

}  // namespace collectives::kernels::avx512
