#define KERNELS_ISA avx2
#include "reduce.hpp"

namespace kernels {

ReduceFunction find_avx2(Op op, Dtype dtype) { return avx2::find(op, dtype); }

}  // namespace kernels
