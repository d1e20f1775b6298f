// What the instruction sets have in common of the fused training kernels: the table of functions that each one fills.
//
// Matrices are contiguous rows of `columns` elements. A row's result depends on that row alone, bit for bit, and every
// instruction set gives the same bits: sums over a row have 128 bytes of lanes on all of them (32 floats or 16
// doubles, in the type of the elements), folded by halves. `out` may be an input of its shape, but not overlap one in
// part; no pointer needs more alignment than its elements.
#pragma once

#include <cstddef>
#include <cstdint>

#include "types.hpp"

namespace collectives::kernels {

// One step of AdamW: the factors that do not depend on the element.
struct AdamW {
    double beta1;
    double beta2;
    double epsilon;
    double decay;              // 1 - learning rate * weight decay
    double rate;               // learning rate / (1 - beta1 ** step)
    double second_correction;  // 1 / sqrt(1 - beta2 ** step)
    double gradient_scale;
};

// The stream of random words of one dropout, and where in it element (0, 0) and each row begin.
struct DropoutStream {
    std::uint64_t key[2];
    std::uint64_t first;
    std::uint64_t row_stride;
};

// source[i] rounded to nearest even, for i < count.
using ConvertFunction = void (*)(const std::byte* source, std::byte* target, std::size_t count);
using SumOfSquaresFunction = double (*)(const std::byte* source, std::size_t count);

// Where a kernel reads elements of any float type; `convert` makes its own type of them, null where they have it.
struct ConvertedInput {
    const std::byte* data;
    std::size_t element_bytes;
    ConvertFunction convert;
};

// Where a kernel writes its results a second time, in another type; `convert` is null where nobody wants them.
struct ConvertedOutput {
    std::byte* data;
    std::size_t element_bytes;
    ConvertFunction convert;
};

template <typename Element>
struct FloatKernels {
    // out = gelu(x + bias); bias is null or has `columns` elements.
    void (*gelu)(const Element* x, const Element* bias, Element* out, std::size_t rows, std::size_t columns);
    void (*gelu_backward)(const Element* g, const Element* x, const Element* bias, Element* out, std::size_t rows,
                          std::size_t columns);

    void (*layer_norm)(const Element* x, const Element* weight, const Element* bias, double epsilon, Element* out,
                       Element* mean, Element* inverse, std::size_t rows, std::size_t columns);
    // weight_gradient and bias_gradient are added to, one row after the other.
    void (*layer_norm_backward)(const Element* g, const Element* x, const Element* weight, const Element* mean,
                                const Element* inverse, Element* out, Element* weight_gradient, Element* bias_gradient,
                                std::size_t rows, std::size_t columns);

    // Row r is query r % queries, which sees the keys up to its number + offset.
    void (*causal_softmax)(Element* scores, double scale, std::int64_t offset, std::size_t rows, std::size_t queries,
                           std::size_t keys);
    void (*causal_softmax_backward)(const Element* g, const Element* weights, double scale, std::int64_t offset,
                                    Element* out, std::size_t rows, std::size_t queries, std::size_t keys);

    // gradient may be null, or logits.
    void (*cross_entropy)(const Element* logits, const std::int64_t* targets, double scale, double* losses,
                          Element* gradient, std::size_t rows, std::size_t columns);

    void (*adamw)(Element* values, const ConvertedInput& gradients, Element* first, Element* second, const AdamW& step,
                  const ConvertedOutput& copy, std::size_t count);

    // An element is kept where its random word is at least `threshold`, then multiplied by `scale`; else it is 0.
    void (*dropout)(const Element* x, std::uint32_t threshold, double scale, const DropoutStream& stream, Element* out,
                    std::size_t rows, std::size_t columns);

    // out += each row, from first to last.
    void (*column_sums)(const Element* matrix, Element* out, std::size_t rows, std::size_t columns);
};

struct FusedTable {
    const char* name;
    FloatKernels<float> float32;
    FloatKernels<double> float64;
    // A null entry is a dtype that is no float.
    ConvertFunction convert[dtype_count][dtype_count];
    SumOfSquaresFunction sum_of_squares[dtype_count];
};

}  // namespace collectives::kernels
