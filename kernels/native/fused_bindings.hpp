#pragma once

#include <nanobind/nanobind.h>

namespace collectives::kernels {

// Adds the tables of fused kernels to the module.
void bind_fused(nanobind::module_& module);

}  // namespace collectives::kernels
