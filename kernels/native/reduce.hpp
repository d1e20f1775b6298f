// Reductions over k input arrays. Included once per instruction set, in a namespace of its own (KERNELS_ISA), so that
// no function compiled for one processor can be picked up by another. The loops are plain; the compiler vectorises
// them.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "reduce_table.hpp"

namespace kernels::KERNELS_ISA {

// Storage types: how an element lies in memory, and the type that it is computed in.

template <typename T>
struct Plain {
    using Compute = T;
    static constexpr std::size_t bytes = sizeof(T);
    static T load(const std::byte* at) {
        T value;
        std::memcpy(&value, at, sizeof(T));
        return value;
    }
    static void store(std::byte* at, T value) { std::memcpy(at, &value, sizeof(T)); }
};

struct Bfloat16 {
    using Compute = float;
    static constexpr std::size_t bytes = 2;
    static float load(const std::byte* at) {
        std::uint16_t half;
        std::memcpy(&half, at, 2);
        return std::bit_cast<float>(static_cast<std::uint32_t>(half) << 16);
    }
    static void store(std::byte* at, float value) {
        const auto bits = std::bit_cast<std::uint32_t>(value);
        const std::uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
        const std::uint32_t quiet = (bits >> 16 & 0x8000u) | 0x7FC0u;
        const auto half = static_cast<std::uint16_t>(value != value ? quiet : rounded);
        std::memcpy(at, &half, 2);
    }
};

struct Float16 {
    using Compute = float;
    static constexpr std::size_t bytes = 2;
    static float load(const std::byte* at) {
        std::uint16_t half;
        std::memcpy(&half, at, 2);
        const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
        const std::uint32_t magnitude = half & 0x7FFFu;
        // Moved into a float's place and multiplied by 2^112, the exponent is right, for subnormal numbers too.
        const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
        const std::uint32_t special = 0x7F800000u | (magnitude & 0x3FFu) << 13;
        return std::bit_cast<float>(sign | (magnitude >= 0x7C00u ? special : std::bit_cast<std::uint32_t>(scaled)));
    }
    static void store(std::byte* at, float value) {
        const auto bits = std::bit_cast<std::uint32_t>(value);
        const std::uint32_t sign = bits >> 16 & 0x8000u;
        const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
        const std::uint32_t normal = (magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
        // Below 2^-14: adding 0.5 lets the floating-point unit round to a multiple of 2^-24.
        const std::uint32_t subnormal =
            std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3F000000u;
        std::uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
        half = magnitude >= 0x477FF000u ? 0x7C00u : half;
        half = magnitude > 0x7F800000u ? 0x7E00u : half;
        const auto stored = static_cast<std::uint16_t>(sign | half);
        std::memcpy(at, &stored, 2);
    }
};

// Operations; integers are added and multiplied as unsigned numbers, which wrap.

template <typename T>
using Wrapping = std::conditional_t<(sizeof(T) < 4), std::uint32_t, std::make_unsigned_t<T>>;

struct Sum {
    template <typename T>
    static T apply(T a, T b) {
        if constexpr (std::is_same_v<T, bool>) {
            return a || b;
        } else if constexpr (std::is_integral_v<T>) {
            return static_cast<T>(static_cast<Wrapping<T>>(a) + static_cast<Wrapping<T>>(b));
        } else {
            return a + b;
        }
    }
};

struct Product {
    template <typename T>
    static T apply(T a, T b) {
        if constexpr (std::is_same_v<T, bool>) {
            return a && b;
        } else if constexpr (std::is_integral_v<T>) {
            return static_cast<T>(static_cast<Wrapping<T>>(a) * static_cast<Wrapping<T>>(b));
        } else {
            return a * b;
        }
    }
};

// minimum and maximum of IEEE 754-2019: a NaN on either side wins, and -0 < +0, so that neither the order of the
// operands nor an element's place shows. Equal floats differ at most in the sign bit.
template <typename T>
using Bits = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;

struct Minimum {
    template <typename T>
    static T apply(T a, T b) {
        if constexpr (std::is_floating_point_v<T>) {
            const T lower = std::bit_cast<T>(std::bit_cast<Bits<T>>(a) | std::bit_cast<Bits<T>>(b));
            return a == b ? lower : (a < b || a != a ? a : b);
        } else {
            return a < b ? a : b;
        }
    }
};

struct Maximum {
    template <typename T>
    static T apply(T a, T b) {
        if constexpr (std::is_floating_point_v<T>) {
            const T upper = std::bit_cast<T>(std::bit_cast<Bits<T>>(a) & std::bit_cast<Bits<T>>(b));
            return a == b ? upper : (a > b || a != a ? a : b);
        } else {
            return a > b ? a : b;
        }
    }
};

struct And {
    template <typename T>
    static T apply(T a, T b) {
        return static_cast<T>(a & b);
    }
};

struct Or {
    template <typename T>
    static T apply(T a, T b) {
        return static_cast<T>(a | b);
    }
};

struct Xor {
    template <typename T>
    static T apply(T a, T b) {
        return static_cast<T>(a ^ b);
    }
};

template <typename Storage, typename Operation>
void reduce(const std::byte* const* inputs, std::size_t number, std::byte* out, std::size_t count) {
    using Compute = typename Storage::Compute;
    constexpr std::size_t step = Storage::bytes;
    if (number == 2) {
        const std::byte* first = inputs[0];
        const std::byte* second = inputs[1];
        for (std::size_t i = 0; i < count; ++i) {
            const Compute value = Operation::apply(Storage::load(first + i * step), Storage::load(second + i * step));
            Storage::store(out + i * step, value);
        }
        return;
    }
    for (std::size_t i = 0; i < count; ++i) {
        Compute total = Storage::load(inputs[0] + i * step);
        for (std::size_t k = 1; k < number; ++k) {
            total = Operation::apply(total, Storage::load(inputs[k] + i * step));
        }
        Storage::store(out + i * step, total);
    }
}

template <typename Operation, typename Storage>
constexpr ReduceFunction pick() {
    using T = typename Storage::Compute;
    constexpr bool bitwise =
        std::is_same_v<Operation, And> || std::is_same_v<Operation, Or> || std::is_same_v<Operation, Xor>;
    if constexpr (bitwise && !std::is_integral_v<T>) {
        return nullptr;
    } else {
        return &reduce<Storage, Operation>;
    }
}

template <typename Operation>
ReduceFunction by_dtype(Dtype dtype) {
    switch (dtype) {
        case Dtype::boolean: return pick<Operation, Plain<bool>>();
        case Dtype::int8: return pick<Operation, Plain<std::int8_t>>();
        case Dtype::int16: return pick<Operation, Plain<std::int16_t>>();
        case Dtype::int32: return pick<Operation, Plain<std::int32_t>>();
        case Dtype::int64: return pick<Operation, Plain<std::int64_t>>();
        case Dtype::uint8: return pick<Operation, Plain<std::uint8_t>>();
        case Dtype::uint16: return pick<Operation, Plain<std::uint16_t>>();
        case Dtype::uint32: return pick<Operation, Plain<std::uint32_t>>();
        case Dtype::uint64: return pick<Operation, Plain<std::uint64_t>>();
        case Dtype::float16: return pick<Operation, Float16>();
        case Dtype::bfloat16: return pick<Operation, Bfloat16>();
        case Dtype::float32: return pick<Operation, Plain<float>>();
        case Dtype::float64: return pick<Operation, Plain<double>>();
    }
    return nullptr;
}

inline ReduceFunction find(Op op, Dtype dtype) {
    switch (op) {
        case Op::sum: return by_dtype<Sum>(dtype);
        case Op::product: return by_dtype<Product>(dtype);
        case Op::minimum: return by_dtype<Minimum>(dtype);
        case Op::maximum: return by_dtype<Maximum>(dtype);
        case Op::band: return by_dtype<And>(dtype);
        case Op::bor: return by_dtype<Or>(dtype);
        case Op::bxor: return by_dtype<Xor>(dtype);
    }
    return nullptr;
}

}  // namespace kernels::KERNELS_ISA
