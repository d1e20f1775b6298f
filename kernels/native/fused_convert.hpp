// Between float32, float64, bfloat16 and float16, and the sum of squares of any of them. Included once per instruction
// set.
#pragma once

#include <cstdint>

#include "fused_walk.hpp"
#include "types.hpp"

namespace collectives::kernels::COLLECTIVES_ISA {

using Doubles = RegisterOf<double>;
inline constexpr std::size_t double_lanes = lanes_of<double>;
using HalfFloats = Vector<float, double_lanes>;

#if COLLECTIVES_VECTOR_BYTES == 64
inline Doubles to_doubles(const float* source) {
    return reinterpret_cast<Doubles>(_mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(source)));
}
inline HalfFloats to_floats(Doubles value) {
    return reinterpret_cast<HalfFloats>(_mm512_maskz_cvtpd_ps(0xff, reinterpret_cast<__m512d>(value)));
}
#elif COLLECTIVES_VECTOR_BYTES == 32
inline Doubles to_doubles(const float* source) {
    return reinterpret_cast<Doubles>(_mm256_cvtps_pd(_mm_loadu_ps(source)));
}
inline HalfFloats to_floats(Doubles value) {
    return reinterpret_cast<HalfFloats>(_mm256_cvtpd_ps(reinterpret_cast<__m256d>(value)));
}
#else
inline Doubles to_doubles(const float* source) {
    return __builtin_convertvector(load_as<HalfFloats>(reinterpret_cast<const std::byte*>(source)), Doubles);
}
inline HalfFloats to_floats(Doubles value) { return __builtin_convertvector(value, HalfFloats); }
#endif

// Rounded to odd: towards zero, with the last bit set where anything was cut off. A second rounding, to a type of at
// least two bits less, then gives what a single one would.
inline HalfFloats to_odd_floats(Doubles value) {
    using Bits = Vector<std::int32_t, double_lanes>;
    using Long = Vector<std::int64_t, double_lanes>;
    const HalfFloats nearest = to_floats(value);
    float stored[double_lanes];
    std::memcpy(stored, &nearest, sizeof(stored));
    const Doubles back = to_doubles(stored);
    const Long magnitude = reinterpret_cast<Long>(value) & INT64_MAX;
    const Long magnitude_back = reinterpret_cast<Long>(back) & INT64_MAX;
    const auto too_large = reinterpret_cast<Doubles>(magnitude_back) > reinterpret_cast<Doubles>(magnitude);
    const auto inexact = (back != value) & (value == value);
    // A comparison that holds is -1.
    const Bits towards_zero = reinterpret_cast<Bits>(nearest) + __builtin_convertvector(too_large, Bits);
    return reinterpret_cast<HalfFloats>(towards_zero | (__builtin_convertvector(inexact, Bits) & 1));
}

// As many elements as a register has floats. Doubles on their way to float16 are rounded to odd, for float16 rounds
// once more; on their way to bfloat16 they are rounded to nearest twice, as ml_dtypes does.
template <typename Source, typename Target>
inline Floats load_floats(const std::byte* source) {
    if constexpr (Source::element_bytes == 8) {
        HalfFloats halves[2];
        for (std::size_t half = 0; half < 2; ++half) {
            const auto value = load_as<Doubles>(source + half * vector_bytes);
            halves[half] = std::is_same_v<Target, Float16> ? to_odd_floats(value) : to_floats(value);
        }
        return load_as<Floats>(reinterpret_cast<const std::byte*>(halves));
    } else {
        return Source::load(source);
    }
}

template <typename Target>
inline void store_floats(std::byte* target, Floats value) {
    if constexpr (Target::element_bytes == 8) {
        float halves[2][double_lanes];
        std::memcpy(halves, &value, sizeof(halves));
        for (std::size_t half = 0; half < 2; ++half) store_as(target + half * vector_bytes, to_doubles(halves[half]));
    } else {
        Target::store(target, value);
    }
}

template <typename Source, typename Target>
[[gnu::flatten]] void convert(const std::byte* source, std::byte* target, std::size_t count) {
    if constexpr (std::is_same_v<Source, Target>) {
        std::memmove(target, source, count * Source::element_bytes);
    } else {
        const auto step = [](const std::byte* from, std::byte* to) {
            store_floats<Target>(to, load_floats<Source, Target>(from));
        };
        std::size_t done = 0;
        for (; done + float_lanes <= count; done += float_lanes) {
            step(source + done * Source::element_bytes, target + done * Target::element_bytes);
        }
        if (done == count) return;
        std::byte few[float_lanes * Source::element_bytes] = {};
        std::byte result[float_lanes * Target::element_bytes];
        std::memcpy(few, source + done * Source::element_bytes, (count - done) * Source::element_bytes);
        step(few, result);
        std::memcpy(target + done * Target::element_bytes, result, (count - done) * Target::element_bytes);
    }
}

// Elements converted at a time by a kernel that computes in another type: they stay in the first-level cache. A
// multiple of every number of lanes.
inline constexpr std::size_t converted_block = 512;

// Sixteen lanes of float64, whatever the type.
template <typename Source>
[[gnu::flatten]] double sum_of_squares(const std::byte* source, std::size_t count) {
    RowSum<double> sum;
    for (std::size_t done = 0; done < count; done += converted_block) {
        const std::size_t some = count - done < converted_block ? count - done : converted_block;
        double values[converted_block];
        convert<Source, Plain<double>>(source + done * Source::element_bytes, reinterpret_cast<std::byte*>(values),
                                       some);
        walk<double>(some, [&](auto piece, auto part) {
            const auto value = piece.load(values);
            sum.take(piece, part, value * value);
        });
    }
    return sum.result();
}

}  // namespace collectives::kernels::COLLECTIVES_ISA
