#define COLLECTIVES_ISA avx2
#define COLLECTIVES_VECTOR_BYTES 32

#include "dispatch.hpp"
#include "kernel_table.hpp"

namespace collectives::kernels::avx2 {

extern constinit const KernelTable table = make_table("avx2");

}  // namespace collectives::kernels::avx2
