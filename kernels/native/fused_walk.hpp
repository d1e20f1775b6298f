// How the fused kernels go over a row: registers of elements, and sums whose lanes are the same on every instruction
// set. Included once per instruction set.
#pragma once

#include <cmath>
#include <cstddef>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include "formats.hpp"
#include "operations.hpp"

namespace collectives::kernels::COLLECTIVES_ISA {

template <typename Element>
using RegisterOf = typename Plain<Element>::Register;

inline constexpr std::size_t block_bytes = 128;
template <typename Element>
inline constexpr std::size_t lanes_of = Plain<Element>::lanes;
template <typename Element>
inline constexpr std::size_t block_lanes = block_bytes / sizeof(Element);
inline constexpr std::size_t block_parts = block_bytes / vector_bytes;

template <typename Element>
inline Mask<RegisterOf<Element>> lanes_below(std::size_t count) {
    using Lanes = Mask<RegisterOf<Element>>;
    using Lane = std::remove_cvref_t<decltype(Lanes{}[0])>;
    Lanes numbers;
    for (std::size_t lane = 0; lane < lanes_of<Element>; ++lane) numbers[lane] = static_cast<Lane>(lane);
    return numbers < static_cast<Lane>(count);
}

// count < lanes elements, and zeros after them; what lies behind is not touched.
template <typename Element>
inline RegisterOf<Element> load_few(const Element* source, std::size_t count) {
    using Register = RegisterOf<Element>;
#if COLLECTIVES_VECTOR_BYTES == 64
    if constexpr (sizeof(Element) == 4) {
        return reinterpret_cast<Register>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1U << count) - 1), source));
    } else {
        return reinterpret_cast<Register>(_mm512_maskz_loadu_pd(static_cast<__mmask8>((1U << count) - 1), source));
    }
#elif COLLECTIVES_VECTOR_BYTES == 32
    const auto mask = reinterpret_cast<__m256i>(lanes_below<Element>(count));
    if constexpr (sizeof(Element) == 4) {
        return reinterpret_cast<Register>(_mm256_maskload_ps(source, mask));
    } else {
        return reinterpret_cast<Register>(_mm256_maskload_pd(source, mask));
    }
#else
    Register value{};
    for (std::size_t lane = 0; lane < count; ++lane) value[lane] = source[lane];
    return value;
#endif
}

template <typename Element>
inline void store_few(Element* target, RegisterOf<Element> value, std::size_t count) {
#if COLLECTIVES_VECTOR_BYTES == 64
    if constexpr (sizeof(Element) == 4) {
        _mm512_mask_storeu_ps(target, static_cast<__mmask16>((1U << count) - 1), reinterpret_cast<__m512>(value));
    } else {
        _mm512_mask_storeu_pd(target, static_cast<__mmask8>((1U << count) - 1), reinterpret_cast<__m512d>(value));
    }
#elif COLLECTIVES_VECTOR_BYTES == 32
    const auto mask = reinterpret_cast<__m256i>(lanes_below<Element>(count));
    if constexpr (sizeof(Element) == 4) {
        _mm256_maskstore_ps(target, mask, reinterpret_cast<__m256>(value));
    } else {
        _mm256_maskstore_pd(target, mask, reinterpret_cast<__m256d>(value));
    }
#else
    for (std::size_t lane = 0; lane < count; ++lane) target[lane] = value[lane];
#endif
}

// A whole register of a row, `offset` elements from its start.
template <typename Element>
struct Whole {
    using Register = RegisterOf<Element>;
    std::size_t offset;

    Register load(const Element* row) const {
        return load_as<Register>(reinterpret_cast<const std::byte*>(row + offset));
    }
    void store(Element* row, Register value) const { store_as(reinterpret_cast<std::byte*>(row + offset), value); }
    Register or_else(Register value, Element) const { return value; }
};

// The last register of a row, of which `count` lanes are elements.
template <typename Element>
struct Few {
    using Register = RegisterOf<Element>;
    std::size_t offset;
    std::size_t count;

    Register load(const Element* row) const { return load_few(row + offset, count); }
    void store(Element* row, Register value) const { store_few(row + offset, value, count); }
    // The lanes that are no elements have `other`.
    Register or_else(Register value, Element other) const {
        return lanes_below<Element>(count) ? value : Register{} + other;
    }
};

// Calls body(piece, part) for each register of a row of `count` elements, in order; `part`, a constant, is the place of
// the register in its block. The caller is to be flattened: what a body keeps per part then stays in registers.
template <typename Element, typename Body, std::size_t... parts>
inline void walk_parts(std::size_t count, const Body& body, std::index_sequence<parts...>) {
    constexpr std::size_t lanes = lanes_of<Element>;
    std::size_t offset = 0;
    for (; offset + block_lanes<Element> <= count; offset += block_lanes<Element>) {
        (body(Whole<Element>{offset + parts * lanes}, std::integral_constant<std::size_t, parts>{}), ...);
    }
    const auto end = [&](auto part) {
        const std::size_t start = offset + part * lanes;
        if (start + lanes <= count) {
            body(Whole<Element>{start}, part);
        } else if (start < count) {
            body(Few<Element>{start, count - start}, part);
        }
    };
    (end(std::integral_constant<std::size_t, parts>{}), ...);
}

template <typename Element, typename Body>
inline void walk(std::size_t count, const Body& body) {
    walk_parts<Element>(count, body, std::make_index_sequence<block_parts>{});
}

struct LaneSum {
    template <typename Value>
    static Value apply(Value a, Value b) {
        return a + b;
    }
};

// A NaN is passed over: whoever needs it meets it again.
struct LaneMaximum {
    template <typename Value>
    static Value apply(Value a, Value b) {
        return b > a ? b : a;
    }
};

// One running value for each lane of a block.
template <typename Element, typename Operation>
class LaneFold {
  public:
    explicit LaneFold(Element identity) : identity_(identity) {
        for (auto& part : parts_) part = RegisterOf<Element>{} + identity;
    }

    template <typename Piece>
    void take(const Piece& piece, std::size_t part, RegisterOf<Element> value) {
        parts_[part] = Operation::apply(parts_[part], piece.or_else(value, identity_));
    }

    Element result() const {
        Element lanes[block_lanes<Element>];
        std::memcpy(lanes, parts_, sizeof(lanes));
        for (std::size_t half = block_lanes<Element> / 2; half > 0; half /= 2) {
            for (std::size_t lane = 0; lane < half; ++lane) {
                lanes[lane] = Operation::apply(lanes[lane], lanes[lane + half]);
            }
        }
        return lanes[0];
    }

  private:
    Element identity_;
    RegisterOf<Element> parts_[block_parts];
};

template <typename Element>
struct RowSum : LaneFold<Element, LaneSum> {
    RowSum() : LaneFold<Element, LaneSum>(0) {}
};

template <typename Element>
struct RowMaximum : LaneFold<Element, LaneMaximum> {
    RowMaximum() : LaneFold<Element, LaneMaximum>(-std::numeric_limits<Element>::infinity()) {}
};

// Correctly rounded, as IEEE 754 has it.
template <typename Register>
inline Register square_root(Register value) {
    constexpr bool single = sizeof(value[0]) == 4;
#if COLLECTIVES_VECTOR_BYTES == 64
    // The masks keep every lane, as in formats.hpp.
    if constexpr (single) {
        return reinterpret_cast<Register>(_mm512_maskz_sqrt_ps(0xffff, reinterpret_cast<__m512>(value)));
    } else {
        return reinterpret_cast<Register>(_mm512_maskz_sqrt_pd(0xff, reinterpret_cast<__m512d>(value)));
    }
#elif COLLECTIVES_VECTOR_BYTES == 32
    if constexpr (single) {
        return reinterpret_cast<Register>(_mm256_sqrt_ps(reinterpret_cast<__m256>(value)));
    } else {
        return reinterpret_cast<Register>(_mm256_sqrt_pd(reinterpret_cast<__m256d>(value)));
    }
#elif defined(__x86_64__)
    if constexpr (single) {
        return reinterpret_cast<Register>(_mm_sqrt_ps(reinterpret_cast<__m128>(value)));
    } else {
        return reinterpret_cast<Register>(_mm_sqrt_pd(reinterpret_cast<__m128d>(value)));
    }
#else
    for (std::size_t lane = 0; lane < sizeof(value) / sizeof(value[0]); ++lane) {
        if constexpr (single) {
            value[lane] = __builtin_sqrtf(value[lane]);
        } else {
            value[lane] = __builtin_sqrt(value[lane]);
        }
    }
    return value;
#endif
}

}  // namespace collectives::kernels::COLLECTIVES_ISA
