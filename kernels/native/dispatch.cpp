#include "dispatch.hpp"

namespace collectives::kernels {

std::vector<const KernelTable*> runnable_tables() {
    std::vector<const KernelTable*> tables;
#if defined(__x86_64__)
    // These ask the operating system too: it must save the wide registers.
    const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (has_avx2 && has_avx512) tables.push_back(&avx512::table);
    if (has_avx2) tables.push_back(&avx2::table);
#endif
    tables.push_back(&baseline::table);
    return tables;
}

}  // namespace collectives::kernels
