#include "fused_dispatch.hpp"

#include "dispatch.hpp"

namespace collectives::kernels {

std::vector<const FusedTable*> runnable_fused_tables() {
    std::vector<const FusedTable*> tables;
    for (const KernelTable* table : runnable_tables()) {
#if defined(__x86_64__)
        if (table == &avx512::table) tables.push_back(&avx512::fused_table);
        if (table == &avx2::table) tables.push_back(&avx2::fused_table);
#endif
        if (table == &baseline::table) tables.push_back(&baseline::fused_table);
    }
    return tables;
}

}  // namespace collectives::kernels
