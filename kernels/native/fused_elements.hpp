// The fused kernels that go element by element: GELU, AdamW, and column sums. Included once per instruction set.
#pragma once

#include "fused_convert.hpp"
#include "fused_exponential.hpp"
#include "fused_types.hpp"

namespace collectives::kernels::COLLECTIVES_ISA {

// The tanh form of GELU (Hendrycks 2016, arXiv 1606.08415) by (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), where
// u = sqrt(2 / pi) (z + 0.044715 z**3). Beyond 32 both factors are what they are at infinity.
template <typename Element>
class Gelu {
  public:
    using Register = RegisterOf<Element>;

    explicit Gelu(Register z)
        : not_low_(z < -limit ? Register{} - limit : z), z_(not_low_ > limit ? Register{} + limit : not_low_) {
        square_ = z_ * z_;
        const Register twice_u = z_ * (square_ * (2 * slope * cubic) + 2 * slope);
        const Register small = exp_of_negative<Element>(twice_u < 0 ? twice_u : -twice_u);
        const Register larger = Element{1} / (small + Element{1});
        const Register smaller = small * larger;
        share_ = twice_u < 0 ? smaller : larger;
        spread_ = smaller * larger;
    }

    Register value() const { return not_low_ * share_; }
    Register derivative() const { return share_ + z_ * spread_ * (square_ * (6 * slope * cubic) + 2 * slope); }

  private:
    static constexpr Element limit = 32;
    static constexpr Element slope = static_cast<Element>(0.79788456080286535588);
    static constexpr Element cubic = static_cast<Element>(0.044715);

    Register not_low_;  // keeps +infinity
    Register z_;
    Register square_;
    Register share_;   // (1 + tanh(u)) / 2
    Register spread_;  // share * (1 - share)
};

// Calls body(piece, bias at that piece) for each register of each row; without a bias all rows are one.
template <typename Element, typename Body>
inline void walk_with_bias(const Element* bias, std::size_t rows, std::size_t columns, const Body& body) {
    if (bias == nullptr) {
        walk<Element>(rows * columns, [&](auto piece, auto) { body(piece, 0, RegisterOf<Element>{}); });
        return;
    }
    for (std::size_t row = 0; row < rows; ++row) {
        walk<Element>(columns, [&](auto piece, auto) { body(piece, row * columns, piece.load(bias)); });
    }
}

template <typename Element>
[[gnu::flatten]] void gelu(const Element* x, const Element* bias, Element* out, std::size_t rows, std::size_t columns) {
    walk_with_bias(bias, rows, columns, [&](auto piece, std::size_t start, auto shift) {
        piece.store(out + start, Gelu<Element>(piece.load(x + start) + shift).value());
    });
}

template <typename Element>
[[gnu::flatten]] void gelu_backward(const Element* g, const Element* x, const Element* bias, Element* out,
                                    std::size_t rows, std::size_t columns) {
    walk_with_bias(bias, rows, columns, [&](auto piece, std::size_t start, auto shift) {
        const Gelu<Element> at(piece.load(x + start) + shift);
        piece.store(out + start, piece.load(g + start) * at.derivative());
    });
}

// Gradients of another type, and the copy, go through blocks that stay in the cache; memory is passed over once.
template <typename Element>
[[gnu::flatten]] void adamw(Element* values, const ConvertedInput& gradients, Element* first, Element* second,
                            const AdamW& step, const ConvertedOutput& copy, std::size_t count) {
    const auto beta1 = static_cast<Element>(step.beta1);
    const auto beta2 = static_cast<Element>(step.beta2);
    const auto rest1 = static_cast<Element>(1 - step.beta1);
    const auto rest2 = static_cast<Element>(1 - step.beta2);
    const auto epsilon = static_cast<Element>(step.epsilon);
    const auto decay = static_cast<Element>(step.decay);
    const auto rate = static_cast<Element>(step.rate);
    const auto correction = static_cast<Element>(step.second_correction);
    const auto scale = static_cast<Element>(step.gradient_scale);
    for (std::size_t done = 0; done < count; done += converted_block) {
        const std::size_t some = count - done < converted_block ? count - done : converted_block;
        Element converted[converted_block];
        const std::byte* source = gradients.data + done * gradients.element_bytes;
        const auto* gradient = reinterpret_cast<const Element*>(source);
        if (gradients.convert != nullptr) {
            gradients.convert(source, reinterpret_cast<std::byte*>(converted), some);
            gradient = converted;
        }
        walk<Element>(some, [&](auto piece, auto) {
            const auto g = piece.load(gradient) * scale;
            const auto m = piece.load(first + done) * beta1 + g * rest1;
            const auto v = piece.load(second + done) * beta2 + g * g * rest2;
            const auto change = m / (square_root(v) * correction + epsilon) * rate;
            piece.store(first + done, m);
            piece.store(second + done, v);
            piece.store(values + done, piece.load(values + done) * decay - change);
        });
        if (copy.convert != nullptr) {
            copy.convert(reinterpret_cast<const std::byte*>(values + done), copy.data + done * copy.element_bytes,
                         some);
        }
    }
}

// In blocks of columns whose sums stay in the first-level cache; four rows at a time, each still added after the other.
template <typename Element>
[[gnu::flatten]] void column_sums(const Element* matrix, Element* out, std::size_t rows, std::size_t columns) {
    constexpr std::size_t block = 16384 / sizeof(Element);
    for (std::size_t begin = 0; begin < columns; begin += block) {
        const std::size_t some = columns - begin < block ? columns - begin : block;
        const Element* source = matrix + begin;
        std::size_t row = 0;
        for (; row + 4 <= rows; row += 4, source += 4 * columns) {
            walk<Element>(some, [&](auto piece, auto) {
                const auto first_two = (piece.load(out + begin) + piece.load(source)) + piece.load(source + columns);
                const auto next = first_two + piece.load(source + 2 * columns);
                piece.store(out + begin, next + piece.load(source + 3 * columns));
            });
        }
        for (; row < rows; ++row, source += columns) {
            walk<Element>(some, [&](auto piece, auto) {
                piece.store(out + begin, piece.load(out + begin) + piece.load(source));
            });
        }
    }
}

}  // namespace collectives::kernels::COLLECTIVES_ISA
