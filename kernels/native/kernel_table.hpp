// The loops, and the table that names them: (operation, dtype) -> function. Included once per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "formats.hpp"
#include "operations.hpp"
#include "types.hpp"

namespace collectives::kernels::COLLECTIVES_ISA {

// Reads count < lanes elements without touching what lies behind them.
template <typename Format>
typename Format::Register load_partial(const std::byte* source, std::size_t count) {
    std::byte padded[Format::lanes * Format::element_bytes] = {};
    std::memcpy(padded, source, count * Format::element_bytes);
    return Format::load(padded);
}

template <typename Format>
void store_partial(std::byte* target, typename Format::Register value, std::size_t count) {
    std::byte padded[Format::lanes * Format::element_bytes];
    Format::store(padded, value);
    std::memcpy(target, padded, count * Format::element_bytes);
}

// How many elements precede the first address in `out` that a whole register can be stored to in one cache line.
template <typename Format>
std::size_t elements_before_alignment(const std::byte* out) {
    constexpr std::size_t step = Format::lanes * Format::element_bytes;
    const std::size_t bytes = (step - reinterpret_cast<std::uintptr_t>(out) % step) % step;
    return bytes % Format::element_bytes == 0 ? bytes / Format::element_bytes : 0;
}

// One pass over all inputs: the running value stays in a register, so that 16-bit floats are rounded once.
// `known_inputs` is the number of inputs where the compiler may unroll over it, 0 where it is not known.
template <typename Format, typename Operation, std::size_t known_inputs>
void fold(const std::byte* const* inputs, std::size_t input_count, std::byte* out, std::size_t count) {
    constexpr std::size_t step = Format::lanes * Format::element_bytes;
    const std::size_t number = known_inputs > 0 ? known_inputs : input_count;
    const auto few = [&](std::size_t offset, std::size_t elements) {
        auto value = load_partial<Format>(inputs[0] + offset, elements);
        for (std::size_t i = 1; i < number; ++i) {
            value = Operation::apply(value, load_partial<Format>(inputs[i] + offset, elements));
        }
        store_partial<Format>(out + offset, value, elements);
    };
    std::size_t first = 0;
    if (count >= 16 * Format::lanes) {
        first = elements_before_alignment<Format>(out);
        if (first > 0) few(0, first);
    }
    const std::size_t begin = first * Format::element_bytes;
    const std::size_t end = begin + (count - first) / Format::lanes * step;
#pragma GCC unroll 4
    for (std::size_t offset = begin; offset < end; offset += step) {
        auto value = Format::load(inputs[0] + offset);
        for (std::size_t i = 1; i < number; ++i) {
            value = Operation::apply(value, Format::load(inputs[i] + offset));
        }
        Format::store(out + offset, value);
    }
    const std::size_t rest = (count - first) % Format::lanes;
    if (rest > 0) few(end, rest);
}

template <typename Format, typename Operation>
void reduce(const std::byte* const* inputs, std::size_t input_count, std::byte* out, std::size_t count) {
    if (input_count == 2) {
        const std::byte* const pair[2] = {inputs[0], inputs[1]};
        fold<Format, Operation, 2>(pair, 2, out, count);
    } else {
        fold<Format, Operation, 0>(inputs, input_count, out, count);
    }
}

// Complex addition is addition of twice as many parts.
template <typename Part>
void reduce_complex_sum(const std::byte* const* inputs, std::size_t input_count, std::byte* out, std::size_t count) {
    reduce<Plain<Part>, Sum>(inputs, input_count, out, 2 * count);
}

template <typename Format, std::size_t parts = 1>
void scale(std::byte* data, std::size_t count, double factor) {
    constexpr std::size_t step = Format::lanes * Format::element_bytes;
    const auto multiplier = static_cast<typename Format::Compute>(factor);
    const std::size_t whole = parts * count / Format::lanes * step;
    for (std::size_t offset = 0; offset < whole; offset += step) {
        Format::store(data + offset, Format::load(data + offset) * multiplier);
    }
    const std::size_t rest = parts * count % Format::lanes;
    if (rest > 0) {
        store_partial<Format>(data + whole, load_partial<Format>(data + whole, rest) * multiplier, rest);
    }
}

constexpr void fill_boolean(KernelTable& table) {
    constexpr std::size_t column = index(DType::boolean);
    for (const Op op : {Op::sum, Op::max, Op::bor}) table.reduce[index(op)][column] = reduce<Boolean, BitOr>;
    for (const Op op : {Op::prod, Op::min, Op::band}) table.reduce[index(op)][column] = reduce<Boolean, BitAnd>;
    table.reduce[index(Op::bxor)][column] = reduce<Boolean, BitXor>;
}

// Wrapping is what unsigned arithmetic does; signed overflow would be undefined.
template <typename Signed, typename Unsigned>
constexpr void fill_integer(KernelTable& table, DType signed_dtype, DType unsigned_dtype) {
    for (const std::size_t column : {index(signed_dtype), index(unsigned_dtype)}) {
        table.reduce[index(Op::sum)][column] = reduce<Plain<Unsigned>, Sum>;
        table.reduce[index(Op::prod)][column] = reduce<Plain<Unsigned>, Product>;
        table.reduce[index(Op::band)][column] = reduce<Plain<Unsigned>, BitAnd>;
        table.reduce[index(Op::bor)][column] = reduce<Plain<Unsigned>, BitOr>;
        table.reduce[index(Op::bxor)][column] = reduce<Plain<Unsigned>, BitXor>;
    }
    table.reduce[index(Op::min)][index(signed_dtype)] = reduce<Plain<Signed>, Minimum>;
    table.reduce[index(Op::max)][index(signed_dtype)] = reduce<Plain<Signed>, Maximum>;
    table.reduce[index(Op::min)][index(unsigned_dtype)] = reduce<Plain<Unsigned>, Minimum>;
    table.reduce[index(Op::max)][index(unsigned_dtype)] = reduce<Plain<Unsigned>, Maximum>;
}

template <typename Format>
constexpr void fill_float(KernelTable& table, DType dtype) {
    const std::size_t column = index(dtype);
    table.reduce[index(Op::sum)][column] = reduce<Format, Sum>;
    table.reduce[index(Op::prod)][column] = reduce<Format, Product>;
    table.reduce[index(Op::min)][column] = reduce<Format, Minimum>;
    table.reduce[index(Op::max)][column] = reduce<Format, Maximum>;
    table.scale[column] = scale<Format>;
}

// The product is numpy's: its own loop contracts where it can, so that no other arithmetic gives the same bits.
template <typename Part>
constexpr void fill_complex(KernelTable& table, DType dtype) {
    const std::size_t column = index(dtype);
    table.reduce[index(Op::sum)][column] = reduce_complex_sum<Part>;
    table.scale[column] = scale<Plain<Part>, 2>;
}

constexpr KernelTable make_table(const char* name) {
    KernelTable table{name, {}, {}};
    fill_boolean(table);
    fill_integer<std::int8_t, std::uint8_t>(table, DType::int8, DType::uint8);
    fill_integer<std::int16_t, std::uint16_t>(table, DType::int16, DType::uint16);
    fill_integer<std::int32_t, std::uint32_t>(table, DType::int32, DType::uint32);
    fill_integer<std::int64_t, std::uint64_t>(table, DType::int64, DType::uint64);
    fill_float<Float16>(table, DType::float16);
    fill_float<BFloat16>(table, DType::bfloat16);
    fill_float<Plain<float>>(table, DType::float32);
    fill_float<Plain<double>>(table, DType::float64);
    fill_complex<float>(table, DType::complex64);
    fill_complex<double>(table, DType::complex128);
    return table;
}

}  // namespace collectives::kernels::COLLECTIVES_ISA
