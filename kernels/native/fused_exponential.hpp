// The exponential function on registers, of the basic operations alone, so that its bits are the same everywhere.
#pragma once

#include <cstdint>

#include "fused_walk.hpp"

namespace collectives::kernels::COLLECTIVES_ISA {

template <typename Element>
struct Exponential;

// Polynomial and rational function after Cephes (S. L. Moshier), expf.c and exp.c, where |r| <= log(2) / 2.
template <>
struct Exponential<float> {
    using Bits = std::uint32_t;
    static constexpr int mantissa_bits = 23;
    static constexpr Bits exponent_bias = 127;
    static constexpr float smallest = -87.0F;
    static constexpr float rounding = 12582912.0F;  // 1.5 * 2**23: adding it leaves an integer in the lowest bits
    static constexpr float log2_e = 1.44269504088896341F;
    // log(2) in two parts: the first is short, so that its product with an integer is exact.
    static constexpr float log_2_high = 0.693359375F;
    static constexpr float log_2_low = -2.12194440e-4F;

    template <typename Register>
    static Register reduced(Register r) {
        Register p = r * 1.9875691500e-4F + 1.3981999507e-3F;
        p = p * r + 8.3334519073e-3F;
        p = p * r + 4.1665795894e-2F;
        p = p * r + 1.6666665459e-1F;
        p = p * r + 5.0000001201e-1F;
        return (p * (r * r) + r) + 1.0F;
    }
};

template <>
struct Exponential<double> {
    using Bits = std::uint64_t;
    static constexpr int mantissa_bits = 52;
    static constexpr Bits exponent_bias = 1023;
    static constexpr double smallest = -708.0;
    static constexpr double rounding = 6755399441055744.0;  // 1.5 * 2**52
    static constexpr double log2_e = 1.4426950408889634073599;
    static constexpr double log_2_high = 6.93145751953125e-1;
    static constexpr double log_2_low = 1.42860682030941723212e-6;

    template <typename Register>
    static Register reduced(Register r) {
        const Register square = r * r;
        Register p = square * 1.26177193074810590878e-4 + 3.02994407707441961300e-2;
        p = (p * square + 9.99999999999999999910e-1) * r;
        Register q = square * 3.00198505138664455042e-6 + 2.52448340349684104192e-3;
        q = q * square + 2.27265548208155028766e-1;
        q = q * square + 2.00000000000000000005;
        return p / (q - p) * 2.0 + 1.0;
    }
};

// exp(x) for x <= 0, within 2 units in the last place; below -87 (float) or -708 (double), where a result would soon
// lose bits, it is 0. NaN stays NaN.
template <typename Element>
inline RegisterOf<Element> exp_of_negative(RegisterOf<Element> x) {
    using Register = RegisterOf<Element>;
    using Function = Exponential<Element>;
    using Bits = Vector<typename Function::Bits, lanes_of<Element>>;
    const Register shifted = x * Function::log2_e + Function::rounding;
    const Register power = shifted - Function::rounding;
    const Register r = (x - power * Function::log_2_high) - power * Function::log_2_low;
    const Bits exponent = reinterpret_cast<Bits>(shifted) + Function::exponent_bias;
    const Register scale = reinterpret_cast<Register>(exponent << Function::mantissa_bits);
    return x < Function::smallest ? Register{} : Function::reduced(r) * scale;
}

}  // namespace collectives::kernels::COLLECTIVES_ISA
