// What the native reductions offer, and to whom: the names shared by all instruction sets.
#pragma once

#include <cstddef>

namespace kernels {

enum class Op : int { sum, product, minimum, maximum, band, bor, bxor };
enum class Dtype : int {
    boolean,
    int8,
    int16,
    int32,
    int64,
    uint8,
    uint16,
    uint32,
    uint64,
    float16,
    bfloat16,
    float32,
    float64
};
enum class Isa : int { baseline, avx2, avx512 };

// out[i] = inputs[0][i] op inputs[1][i] op …; out may be one of the inputs. Pointers need no alignment.
using ReduceFunction = void (*)(const std::byte* const* inputs, std::size_t number, std::byte* out, std::size_t count);

// The function for this instruction set, or nullptr where the operation does not take the dtype.
ReduceFunction find_reduce(Isa isa, Op op, Dtype dtype);

// Whether this processor, and this build, can run the instruction set.
bool has_isa(Isa isa);

}  // namespace kernels
