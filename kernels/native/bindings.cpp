#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <vector>

#include "reduce_table.hpp"

namespace nb = nanobind;

namespace {

constexpr std::size_t release_lock_from = 32 * 1024;

// Addresses come from numpy arrays that Python code has checked and keeps alive. False: no such kernel.
bool reduce_many(int isa, int op, int dtype, const std::vector<std::uintptr_t>& inputs, std::uintptr_t out,
                 std::size_t count) {
    const auto function = kernels::find_reduce(kernels::Isa{isa}, kernels::Op{op}, kernels::Dtype{dtype});
    if (function == nullptr) {
        return false;
    }
    std::vector<const std::byte*> pointers;
    pointers.reserve(inputs.size());
    for (const std::uintptr_t address : inputs) {
        pointers.push_back(reinterpret_cast<const std::byte*>(address));
    }
    auto* target = reinterpret_cast<std::byte*>(out);
    if (count < release_lock_from) {
        function(pointers.data(), pointers.size(), target, count);
    } else {
        const nb::gil_scoped_release unlocked;
        function(pointers.data(), pointers.size(), target, count);
    }
    return true;
}

}  // namespace

NB_MODULE(_native, module) {
    module.def("reduce_many", &reduce_many);
    module.def("has_isa", [](int isa) { return kernels::has_isa(kernels::Isa{isa}); });
}
