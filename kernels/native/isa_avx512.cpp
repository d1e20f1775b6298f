#define KERNELS_ISA avx512
#include "reduce.hpp"

namespace kernels {

ReduceFunction find_avx512(Op op, Dtype dtype) { return avx512::find(op, dtype); }

}  // namespace kernels
