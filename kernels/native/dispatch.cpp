#include "dispatch.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace collectives::kernels {

#if defined(__x86_64__)
namespace {

// Clang knows no name for this one.
bool converts_halves() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}

}  // namespace
#endif

std::vector<const KernelTable*> runnable_tables() {
    std::vector<const KernelTable*> tables;
#if defined(__x86_64__)
    // These ask the operating system too: it must save the wide registers.
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && converts_halves();
    const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (has_avx2 && has_avx512) tables.push_back(&avx512::table);
    if (has_avx2) tables.push_back(&avx2::table);
#endif
    tables.push_back(&baseline::table);
    return tables;
}

}  // namespace collectives::kernels
