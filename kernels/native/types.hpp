// What the instruction sets have in common: codes shared with Python, and the table of functions that each one fills.
#pragma once

#include <cstddef>
#include <cstdint>

namespace collectives::kernels {

// The codes of the table in kernels/ops.py.
enum class Op : std::uint8_t { sum = 0, prod = 1, min = 2, max = 3, band = 4, bor = 5, bxor = 6 };
inline constexpr std::size_t op_count = 7;

// The codes of kernels/dtypes.py; what comes after bfloat16 there is moved but never computed with.
enum class DType : std::uint8_t {
    boolean = 0,
    int8 = 1,
    int16 = 2,
    int32 = 3,
    int64 = 4,
    uint8 = 5,
    uint16 = 6,
    uint32 = 7,
    uint64 = 8,
    float16 = 9,
    float32 = 10,
    float64 = 11,
    complex64 = 12,
    complex128 = 13,
    bfloat16 = 14,
};
inline constexpr std::size_t dtype_count = 15;
inline constexpr std::size_t element_bytes[dtype_count] = {1, 1, 2, 4, 8, 1, 2, 4, 8, 2, 4, 8, 8, 16, 2};

constexpr std::size_t index(Op op) { return static_cast<std::size_t>(op); }
constexpr std::size_t index(DType dtype) { return static_cast<std::size_t>(dtype); }

// out[i] = inputs[0][i] op inputs[1][i] op … from left to right, for i < count and input_count >= 1.
// No pointer needs any alignment; out may be exactly one of the inputs, but must not overlap one in part.
using ReduceFunction = void (*)(const std::byte* const* inputs, std::size_t input_count, std::byte* out,
                                std::size_t count);

// data[i] *= factor, with the factor rounded to the type that the dtype computes in.
using ScaleFunction = void (*)(std::byte* data, std::size_t count, double factor);

// A null entry is a combination without a native kernel: the operation does not take the dtype, or numpy serves.
struct KernelTable {
    const char* name;
    ReduceFunction reduce[op_count][dtype_count];
    ScaleFunction scale[dtype_count];
};

}  // namespace collectives::kernels
