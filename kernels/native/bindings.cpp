// The Python face of the kernels. Each function takes only what is right in every way and returns false otherwise;
// the caller then finds the words for what is wrong, or lets numpy serve. So a small call checks nothing twice.
#include <nanobind/nanobind.h>

#include <cstddef>
#include <vector>

#include "buffer.hpp"
#include "dispatch.hpp"
#include "fused_bindings.hpp"
#include "types.hpp"

namespace nb = nanobind;
using namespace collectives::kernels;

namespace {

ReduceFunction find_reduce(const KernelTable& table, std::size_t op, std::size_t dtype) {
    return op < op_count && dtype < dtype_count ? table.reduce[op][dtype] : nullptr;
}

bool reduce(const KernelTable& table, std::size_t op, std::size_t dtype, nb::handle a, nb::handle b, nb::handle out) {
    const ReduceFunction function = find_reduce(table, op, dtype);
    const Buffer target(out, PyBUF_WRITABLE);
    const Buffer first(a);
    const Buffer second(b);
    if (function == nullptr || !target || !first.fits(target) || !second.fits(target)) return false;
    const std::byte* const pointers[2] = {first.data(), second.data()};
    run(target.bytes(), [&] { function(pointers, 2, target.data(), target.bytes() / element_bytes[dtype]); });
    return true;
}

bool reduce_many(const KernelTable& table, std::size_t op, std::size_t dtype, nb::sequence inputs, nb::handle out) {
    const ReduceFunction function = find_reduce(table, op, dtype);
    const Buffer target(out, PyBUF_WRITABLE);
    std::vector<Buffer> buffers;
    std::vector<const std::byte*> pointers;
    for (const nb::handle input : inputs) {
        if (!buffers.emplace_back(input).fits(target)) return false;
        pointers.push_back(buffers.back().data());
    }
    if (function == nullptr || !target || pointers.empty()) return false;
    run(target.bytes() * pointers.size(),
        [&] { function(pointers.data(), pointers.size(), target.data(), target.bytes() / element_bytes[dtype]); });
    return true;
}

bool scale(const KernelTable& table, std::size_t dtype, nb::handle x, double factor) {
    const ScaleFunction function = dtype < dtype_count ? table.scale[dtype] : nullptr;
    const Buffer target(x, PyBUF_WRITABLE);
    if (function == nullptr || !target) return false;
    run(target.bytes(), [&] { function(target.data(), target.bytes() / element_bytes[dtype], factor); });
    return true;
}

}  // namespace

NB_MODULE(_native, module) {
    // The tables are static; what still refers to them when the interpreter ends is no leak worth a report.
    nb::set_leak_warnings(false);
    module.doc() = "Native kernels; use them through the package kernels.";
    nb::class_<KernelTable>(module, "KernelTable")
        .def_prop_ro("name", [](const KernelTable& table) { return table.name; })
        .def("reduce", &reduce)
        .def("reduce_many", &reduce_many)
        .def("scale", &scale);
    module.def("runnable_tables", [] {
        nb::list tables;
        for (const KernelTable* table : runnable_tables()) {
            tables.append(nb::cast(table, nb::rv_policy::reference));
        }
        return tables;
    });
    bind_fused(module);
}
