// Dropout by a counter-based generator: whether an element is kept depends on the key and its index alone. Included
// once per instruction set.
//
// The words are those of Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), keyed by
// the first word of the key; the second one is the upper half of the counter. Sixteen blocks of four words make the
// words of 64 elements: element e has word e / 16 % 4 of block 16 (e / 64) + e % 16, so that sixteen blocks beside one
// another in registers need no rearrangement.
#pragma once

#include <cstdint>

#include "fused_types.hpp"
#include "fused_walk.hpp"

namespace collectives::kernels::COLLECTIVES_ISA {

using LongWords = Vector<std::uint64_t, float_lanes / 2>;

// The full products of the lower halves and b.
inline LongWords multiply_lower(LongWords a, std::uint32_t b) {
#if COLLECTIVES_VECTOR_BYTES == 64
    return reinterpret_cast<LongWords>(
        _mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(a), _mm512_set1_epi64(b)));
#elif COLLECTIVES_VECTOR_BYTES == 32
    return reinterpret_cast<LongWords>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi64x(b)));
#elif defined(__x86_64__)
    return reinterpret_cast<LongWords>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), _mm_set1_epi64x(b)));
#else
    return (a & 0xffffffff) * static_cast<std::uint64_t>(b);
#endif
}

struct Product64 {
    Words high;
    Words low;

    Product64(Words a, std::uint32_t b) {
        constexpr std::uint64_t low_half = 0xffffffff;
        const auto pairs = reinterpret_cast<LongWords>(a);
        const LongWords even = multiply_lower(pairs, b);
        const LongWords odd = multiply_lower(pairs >> 32, b);
        high = reinterpret_cast<Words>((even >> 32) | (odd & ~low_half));
        low = reinterpret_cast<Words>((even & low_half) | (odd << 32));
    }
};

inline constexpr std::size_t group_blocks = 16;
inline constexpr std::size_t group_words = 4 * group_blocks;

// The words of the elements 64 * group to 64 * group + 63.
inline void philox(const std::uint64_t (&key)[2], std::uint64_t group, std::uint32_t (&words)[group_words]) {
    const std::uint64_t block = group * group_blocks;
    for (std::size_t lane = 0; lane < group_blocks; lane += float_lanes) {
        Words counter0;
        for (std::size_t i = 0; i < float_lanes; ++i) counter0[i] = static_cast<std::uint32_t>(block + lane + i);
        Words counter1 = Words{} + static_cast<std::uint32_t>(block >> 32);
        Words counter2 = Words{} + static_cast<std::uint32_t>(key[1]);
        Words counter3 = Words{} + static_cast<std::uint32_t>(key[1] >> 32);
        auto key0 = static_cast<std::uint32_t>(key[0]);
        auto key1 = static_cast<std::uint32_t>(key[0] >> 32);
        for (int round = 0; round < 10; ++round, key0 += 0x9e3779b9, key1 += 0xbb67ae85) {
            const Product64 first(counter0, 0xd2511f53);
            const Product64 second(counter2, 0xcd9e8d57);
            counter0 = second.high ^ counter1 ^ key0;
            counter1 = second.low;
            counter2 = first.high ^ counter3 ^ key1;
            counter3 = first.low;
        }
        const Words results[4] = {counter0, counter1, counter2, counter3};
        for (std::size_t word = 0; word < 4; ++word) {
            store_as(reinterpret_cast<std::byte*>(words + word * group_blocks + lane), results[word]);
        }
    }
}

template <typename Element>
[[gnu::flatten]] void dropout(const Element* x, std::uint32_t threshold, double scale, const DropoutStream& stream,
                              Element* out, std::size_t rows, std::size_t columns) {
    using Lanes = Mask<RegisterOf<Element>>;
    using Lane = std::remove_cvref_t<decltype(Lanes{}[0])>;
    const auto multiplier = static_cast<Element>(scale);
    std::uint32_t words[group_words];
    Lane kept[group_words + lanes_of<Element>] = {};  // the last register of a row may reach beyond
    for (std::size_t row = 0; row < rows; ++row) {
        std::uint64_t index = stream.first + row * stream.row_stride;
        for (std::size_t left = columns; left > 0;) {
            const std::size_t begin = index % group_words;
            const std::size_t some = left < group_words - begin ? left : group_words - begin;
            philox(stream.key, index / group_words, words);
            for (std::size_t i = 0; i < group_words; ++i) kept[i] = words[i] >= threshold ? -1 : 0;
            walk<Element>(some, [&](auto piece, auto) {
                const auto bits = load_as<Lanes>(reinterpret_cast<const std::byte*>(kept + begin + piece.offset));
                const auto value = piece.load(x) * multiplier;
                piece.store(out, reinterpret_cast<RegisterOf<Element>>(reinterpret_cast<Lanes>(value) & bits));
            });
            x += some;
            out += some;
            index += some;
            left -= some;
        }
    }
}

}  // namespace collectives::kernels::COLLECTIVES_ISA
