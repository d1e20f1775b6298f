// The fused kernels that sum over rows: layer norm, softmax under a causal mask, cross-entropy. A row is read from
// memory once; what comes after finds it in the cache. Included once per instruction set.
#pragma once

#include <cmath>
#include <cstdint>

#include "fused_exponential.hpp"

namespace collectives::kernels::COLLECTIVES_ISA {

template <typename Element>
[[gnu::flatten]] void layer_norm(const Element* x, const Element* weight, const Element* bias, double epsilon,
                                 Element* out, Element* mean, Element* inverse, std::size_t rows, std::size_t columns) {
    const auto width = static_cast<Element>(columns);
    for (std::size_t row = 0; row < rows; ++row, x += columns, out += columns) {
        RowSum<Element> sum;
        walk<Element>(columns, [&](auto piece, auto part) { sum.take(piece, part, piece.load(x)); });
        const Element middle = sum.result() / width;
        RowSum<Element> squares;
        walk<Element>(columns, [&](auto piece, auto part) {
            const auto distance = piece.load(x) - middle;
            squares.take(piece, part, distance * distance);
        });
        const Element factor = 1 / std::sqrt(squares.result() / width + static_cast<Element>(epsilon));
        walk<Element>(columns, [&](auto piece, auto) {
            piece.store(out, (piece.load(x) - middle) * factor * piece.load(weight) + piece.load(bias));
        });
        mean[row] = middle;
        inverse[row] = factor;
    }
}

template <typename Element>
[[gnu::flatten]] void layer_norm_backward(const Element* g, const Element* x, const Element* weight,
                                          const Element* mean, const Element* inverse, Element* out,
                                          Element* weight_gradient, Element* bias_gradient, std::size_t rows,
                                          std::size_t columns) {
    const auto width = static_cast<Element>(columns);
    for (std::size_t row = 0; row < rows; ++row, g += columns, x += columns, out += columns) {
        const Element middle = mean[row];
        const Element factor = inverse[row];
        RowSum<Element> sum;
        RowSum<Element> along;
        walk<Element>(columns, [&](auto piece, auto part) {
            const auto gradient = piece.load(g);
            const auto normalised = (piece.load(x) - middle) * factor;
            const auto scaled = gradient * piece.load(weight);
            sum.take(piece, part, scaled);
            along.take(piece, part, scaled * normalised);
            piece.store(weight_gradient, piece.load(weight_gradient) + gradient * normalised);
            piece.store(bias_gradient, piece.load(bias_gradient) + gradient);
        });
        const Element mean_scaled = sum.result() / width;
        const Element mean_along = along.result() / width;
        walk<Element>(columns, [&](auto piece, auto) {
            const auto normalised = (piece.load(x) - middle) * factor;
            const auto scaled = piece.load(g) * piece.load(weight);
            piece.store(out, (scaled - (normalised * mean_along + mean_scaled)) * factor);
        });
    }
}

// How many keys query number `query` sees.
inline std::size_t visible_keys(std::size_t query, std::int64_t offset, std::size_t keys) {
    const std::int64_t last = static_cast<std::int64_t>(query) + offset;
    if (last < 0) return 0;
    return static_cast<std::size_t>(last) < keys ? static_cast<std::size_t>(last) + 1 : keys;
}

template <typename Element>
void clear(Element* begin, const Element* end) {
    std::memset(begin, 0, static_cast<std::size_t>(end - begin) * sizeof(Element));
}

template <typename Element>
[[gnu::flatten]] void causal_softmax(Element* scores, double scale, std::int64_t offset, std::size_t rows,
                                     std::size_t queries, std::size_t keys) {
    const auto multiplier = static_cast<Element>(scale);
    for (std::size_t row = 0; row < rows; ++row, scores += keys) {
        const std::size_t visible = visible_keys(row % queries, offset, keys);
        RowMaximum<Element> maximum;
        walk<Element>(visible,
                      [&](auto piece, auto part) { maximum.take(piece, part, piece.load(scores) * multiplier); });
        const Element highest = maximum.result();
        RowSum<Element> sum;
        walk<Element>(visible, [&](auto piece, auto part) {
            const auto value = exp_of_negative<Element>(piece.load(scores) * multiplier - highest);
            piece.store(scores, value);
            sum.take(piece, part, value);
        });
        const Element inverse = 1 / sum.result();
        walk<Element>(visible, [&](auto piece, auto) { piece.store(scores, piece.load(scores) * inverse); });
        clear(scores + visible, scores + keys);
    }
}

template <typename Element>
[[gnu::flatten]] void causal_softmax_backward(const Element* g, const Element* weights, double scale,
                                              std::int64_t offset, Element* out, std::size_t rows, std::size_t queries,
                                              std::size_t keys) {
    const auto multiplier = static_cast<Element>(scale);
    for (std::size_t row = 0; row < rows; ++row, g += keys, weights += keys, out += keys) {
        const std::size_t visible = visible_keys(row % queries, offset, keys);
        RowSum<Element> sum;
        walk<Element>(visible,
                      [&](auto piece, auto part) { sum.take(piece, part, piece.load(g) * piece.load(weights)); });
        const Element along = sum.result();
        walk<Element>(visible, [&](auto piece, auto) {
            piece.store(out, (piece.load(g) - along) * piece.load(weights) * multiplier);
        });
        clear(out + visible, out + keys);
    }
}

template <typename Element>
[[gnu::flatten]] void cross_entropy(const Element* logits, const std::int64_t* targets, double scale, double* losses,
                                    Element* gradient, std::size_t rows, std::size_t columns) {
    const auto multiplier = static_cast<Element>(scale);
    for (std::size_t row = 0; row < rows; ++row, logits += columns) {
        const Element chosen = logits[targets[row]];
        RowMaximum<Element> maximum;
        walk<Element>(columns, [&](auto piece, auto part) { maximum.take(piece, part, piece.load(logits)); });
        const Element highest = maximum.result();
        RowSum<Element> sum;
        walk<Element>(columns, [&](auto piece, auto part) {
            const auto value = exp_of_negative<Element>(piece.load(logits) - highest);
            if (gradient != nullptr) piece.store(gradient, value);
            sum.take(piece, part, value);
        });
        const Element total = sum.result();
        losses[row] =
            std::log(static_cast<double>(total)) - (static_cast<double>(chosen) - static_cast<double>(highest));
        if (gradient == nullptr) continue;
        const Element factor = multiplier / total;
        walk<Element>(columns, [&](auto piece, auto) { piece.store(gradient, piece.load(gradient) * factor); });
        gradient[targets[row]] -= multiplier;
        gradient += columns;
    }
}

}  // namespace collectives::kernels::COLLECTIVES_ISA
