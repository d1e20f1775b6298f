// Copies of what is too large to stay in the caches.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace collectives::transports {

// From so many bytes on, what a call writes is gone from the caches before anybody reads it.
inline constexpr std::size_t past_caches_from = 8 * 1024 * 1024;

// Copies without reading the target's lines into the caches first, which a store does otherwise: two thirds of the
// memory traffic. Four pages at a time keep four rows of the memory open. The stores are visible to others when this
// returns.
inline void copy_past_caches(std::byte* target, const std::byte* source, std::size_t length) {
#if defined(__x86_64__)
    constexpr std::size_t line = 64, page = 4096, pages = 4;
    const std::size_t head = std::min(length, (line - reinterpret_cast<std::uintptr_t>(target) % line) % line);
    std::memcpy(target, source, head);
    target += head;
    source += head;
    length -= head;
    for (; length >= pages * page; target += pages * page, source += pages * page, length -= pages * page) {
        for (std::size_t offset = 0; offset < page; offset += line) {
            for (std::size_t which = 0; which < pages; ++which) {
                for (std::size_t part = 0; part < line; part += sizeof(__m128i)) {
                    const std::size_t place = which * page + offset + part;
                    const __m128i value = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + place));
                    _mm_stream_si128(reinterpret_cast<__m128i*>(target + place), value);
                }
            }
        }
    }
    _mm_sfence();
#endif
    std::memcpy(target, source, length);
}

}  // namespace collectives::transports
