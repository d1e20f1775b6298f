// How elements lie in memory and in a vector register: one Format per dtype.
//
// A translation unit defines COLLECTIVES_ISA and COLLECTIVES_VECTOR_BYTES before it includes this file. Everything
// here lives in a namespace named after the instruction set: were two copies of one inline function to share a
// name, the linker could keep the AVX-512 one for a machine that has none.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if COLLECTIVES_VECTOR_BYTES >= 32
#include <immintrin.h>
#endif

namespace collectives::kernels::COLLECTIVES_ISA {

inline constexpr std::size_t vector_bytes = COLLECTIVES_VECTOR_BYTES;

template <typename Element, std::size_t lanes>
struct VectorOf {
    typedef Element type __attribute__((vector_size(lanes * sizeof(Element))));
};
template <typename Element, std::size_t lanes>
using Vector = typename VectorOf<Element, lanes>::type;

template <typename To>
inline To load_as(const std::byte* source) {
    To value;
    std::memcpy(&value, source, sizeof(To));
    return value;
}

template <typename From>
inline void store_as(std::byte* target, From value) {
    std::memcpy(target, &value, sizeof(From));
}

// Elements that are computed with in the type in which they are stored.
template <typename Element>
struct Plain {
    using Compute = Element;
    static constexpr std::size_t element_bytes = sizeof(Element);
    static constexpr std::size_t lanes = vector_bytes / sizeof(Element);
    using Register = Vector<Element, lanes>;

    static Register load(const std::byte* source) { return load_as<Register>(source); }
    static void store(std::byte* target, Register value) { store_as(target, value); }
};

// One byte each; any byte but 0 is true, and 1 is what is written.
struct Boolean : Plain<std::uint8_t> {
    static Register load(const std::byte* source) {
        return reinterpret_cast<Register>(load_as<Register>(source) != 0) & 1;
    }
};

inline constexpr std::size_t float_lanes = vector_bytes / sizeof(float);
using Floats = Vector<float, float_lanes>;
using Words = Vector<std::uint32_t, float_lanes>;
using SignedWords = Vector<std::int32_t, float_lanes>;
using HalfWords = Vector<std::uint16_t, float_lanes>;

inline Floats as_floats(Words bits) { return reinterpret_cast<Floats>(bits); }
inline Words as_words(Floats values) { return reinterpret_cast<Words>(values); }

// The operands are below 2**31: signed comparison is the one that every instruction set has.
inline SignedWords less(Words a, Words b) {
    return reinterpret_cast<SignedWords>(a) < reinterpret_cast<SignedWords>(b);
}

// GCC 12 spells __builtin_convertvector out in halves where one instruction does.
// The masks keep every lane: the unmasked forms make GCC 12 warn of an uninitialised register of its own.
#if COLLECTIVES_VECTOR_BYTES == 64
inline Words widen(HalfWords values) {
    return reinterpret_cast<Words>(_mm512_maskz_cvtepu16_epi32(0xffff, reinterpret_cast<__m256i>(values)));
}
inline HalfWords narrow(Words values) {
    return reinterpret_cast<HalfWords>(_mm512_maskz_cvtepi32_epi16(0xffff, reinterpret_cast<__m512i>(values)));
}
#elif COLLECTIVES_VECTOR_BYTES == 32
inline Words widen(HalfWords values) {
    return reinterpret_cast<Words>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(values)));
}
inline HalfWords narrow(Words values) {
    const __m256i words = reinterpret_cast<__m256i>(values);
    const __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0b1000);
    return reinterpret_cast<HalfWords>(_mm256_castsi256_si128(halves));
}
#else
inline Words widen(HalfWords values) { return __builtin_convertvector(values, Words); }
inline HalfWords narrow(Words values) { return __builtin_convertvector(values, HalfWords); }
#endif

struct BFloat16 {
    using Compute = float;
    static constexpr std::size_t element_bytes = 2;
    static constexpr std::size_t lanes = float_lanes;
    using Register = Floats;

    static Register load(const std::byte* source) { return as_floats(widen(load_as<HalfWords>(source)) << 16); }

    // Adding 0x7fff and the lowest kept bit carries into the kept bits exactly when rounding to nearest even goes up.
    static void store(std::byte* target, Register value) {
        const Words bits = as_words(value);
        const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        const Words quiet_nan = (bits >> 16) | 0x40;
        store_as(target, narrow(value == value ? rounded : quiet_nan));
    }
};

struct Float16 {
    using Compute = float;
    static constexpr std::size_t element_bytes = 2;
    static constexpr std::size_t lanes = float_lanes;
    using Register = Floats;

#if COLLECTIVES_VECTOR_BYTES == 64
    static Register load(const std::byte* source) { return _mm512_maskz_cvtph_ps(0xffff, load_as<__m256i>(source)); }
    static void store(std::byte* target, Register value) {
        store_as(target, _mm512_maskz_cvtps_ph(0xffff, value, _MM_FROUND_TO_NEAREST_INT));
    }
#elif COLLECTIVES_VECTOR_BYTES == 32
    static Register load(const std::byte* source) { return _mm256_cvtph_ps(load_as<__m128i>(source)); }
    static void store(std::byte* target, Register value) {
        store_as(target, _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    }
#else
    // Both directions move the exponent between the biases 15 and 127, and let one float addition or subtraction
    // normalise or round the subnormals; after F. Giesen, "half-to-float done quick" and "float->half variants".
    static Register load(const std::byte* source) {
        const Words half = widen(load_as<HalfWords>(source));
        const Words magnitude = (half & 0x7fff) << 13;
        const Words exponent = half & 0x7c00;
        const Words smallest_normal = Words{} + (113u << 23);
        const Words subnormal = as_words(as_floats(magnitude + (113u << 23)) - as_floats(smallest_normal));
        const Words normal = magnitude + (112u << 23);
        const Words infinite_or_nan = magnitude + (224u << 23);
        const Words finite = exponent == 0 ? subnormal : normal;
        const Words unsigned_result = exponent == 0x7c00 ? infinite_or_nan : finite;
        return as_floats(unsigned_result | ((half & 0x8000) << 16));
    }
    static void store(std::byte* target, Register value) {
        const Words bits = as_words(value);
        const Words magnitude = bits & 0x7fffffff;
        const Words normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
        const Words half_unit = Words{} + (126u << 23);  // 0.5f: its last bit weighs 2**-24, the smallest half
        const Words subnormal = as_words(as_floats(magnitude) + as_floats(half_unit)) - half_unit;
        const Words finite = less(magnitude, Words{} + (113u << 23)) ? subnormal : normal;
        const Words infinity = Words{} + 0x7c00;
        const Words infinite_or_nan = value == value ? infinity : infinity + 0x200;
        const Words overflow = Words{} + (143u << 23);  // 2**16: from here on the result is no finite half
        const Words unsigned_result = less(magnitude, overflow) ? finite : infinite_or_nan;
        store_as(target, narrow(unsigned_result | ((bits >> 16) & 0x8000)));
    }
#endif
};

}  // namespace collectives::kernels::COLLECTIVES_ISA
