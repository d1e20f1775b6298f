#include "reduce_table.hpp"

namespace kernels {

ReduceFunction find_baseline(Op op, Dtype dtype);
#if defined(__x86_64__)
ReduceFunction find_avx2(Op op, Dtype dtype);
ReduceFunction find_avx512(Op op, Dtype dtype);
#endif

bool has_isa(Isa isa) {
    if (isa == Isa::baseline) {
        return true;
    }
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return isa == Isa::avx2 ? avx2 : avx512;
#else
    return false;
#endif
}

ReduceFunction find_reduce(Isa isa, Op op, Dtype dtype) {
#if defined(__x86_64__)
    if (isa == Isa::avx2) {
        return find_avx2(op, dtype);
    }
    if (isa == Isa::avx512) {
        return find_avx512(op, dtype);
    }
#else
    static_cast<void>(isa);
#endif
    return find_baseline(op, dtype);
}

}  // namespace kernels
