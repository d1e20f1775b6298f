#define COLLECTIVES_ISA avx512
#define COLLECTIVES_VECTOR_BYTES 64

#include "dispatch.hpp"
#include "kernel_table.hpp"

namespace collectives::kernels::avx512 {

extern constinit const KernelTable table = make_table("avx512");

}  // namespace collectives::kernels::avx512
