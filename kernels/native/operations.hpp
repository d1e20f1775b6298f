// The combining step of every reduction, on vector registers. Included once per instruction set, after formats.hpp.
#pragma once

#include <cstdint>
#include <type_traits>

namespace collectives::kernels::COLLECTIVES_ISA {

struct Sum {
    template <typename Register>
    static Register apply(Register a, Register b) {
        return a + b;
    }
};

struct Product {
    template <typename Register>
    static Register apply(Register a, Register b) {
        return a * b;
    }
};

struct BitAnd {
    template <typename Register>
    static Register apply(Register a, Register b) {
        return a & b;
    }
};

struct BitOr {
    template <typename Register>
    static Register apply(Register a, Register b) {
        return a | b;
    }
};

struct BitXor {
    template <typename Register>
    static Register apply(Register a, Register b) {
        return a ^ b;
    }
};

// What a lane comparison yields: a vector of signed integers as wide as the lanes.
template <typename Register>
using Mask = decltype(Register{} < Register{});

template <typename Register>
inline constexpr bool is_floating = std::is_floating_point_v<std::remove_cvref_t<decltype(Register{}[0])>>;

// minimum of IEEE 754-2019: NaN wins, and -0 < +0, so that the order of the operands never shows.
// The two selections differ only where a comparison cannot tell: each holds the other operand there, and the union
// of the bits is NaN if either is NaN, and -0 if either zero is negative.
struct Minimum {
    template <typename Register>
    static Register apply(Register a, Register b) {
        if constexpr (is_floating<Register>) {
            const Register ties_to_b = a < b ? a : b;
            const Register ties_to_a = b < a ? b : a;
            using Bits = Mask<Register>;
            return reinterpret_cast<Register>(reinterpret_cast<Bits>(ties_to_b) | reinterpret_cast<Bits>(ties_to_a));
        } else {
            return a < b ? a : b;
        }
    }
};

struct Maximum {
    template <typename Register>
    static Register apply(Register a, Register b) {
        if constexpr (is_floating<Register>) {
            return -Minimum::apply(-a, -b);
        } else {
            return a > b ? a : b;
        }
    }
};

}  // namespace collectives::kernels::COLLECTIVES_ISA
