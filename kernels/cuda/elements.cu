// The fused kernels that go element by element, and the sums over columns and over everything; what they compute is
// told in kernels/fused.py.
#include "common.cuh"

// After class Gelu in kernels/native/fused_elements.hpp.
template <typename Element>
struct Gelu {
    static constexpr double slope = 0.79788456080286535588;
    static constexpr double cubic = 0.044715;
    Element not_low, z, square, share, spread;

    __device__ explicit Gelu(Element x) {
        not_low = x < Element{-32} ? Element{-32} : x;
        z = not_low > Element{32} ? Element{32} : not_low;
        square = z * z;
        const Element twice_u = z * (square * static_cast<Element>(2 * slope * cubic) + static_cast<Element>(2 * slope));
        const Element small = exp(twice_u < 0 ? twice_u : -twice_u);
        const Element larger = Element{1} / (small + Element{1});
        share = twice_u < 0 ? small * larger : larger;
        spread = small * larger * larger;
    }
    __device__ Element value() const { return not_low * share; }
    __device__ Element derivative() const {
        const Element steep = square * static_cast<Element>(6 * slope * cubic) + static_cast<Element>(2 * slope);
        return share + z * spread * steep;
    }
};

// bias may be null.
template <typename Element>
__global__ void gelu(const Element* x, const Element* bias, Element* out, Int64 columns, Int64 count) {
    const Int64 i = grid_index();
    if (i >= count) return;
    out[i] = Gelu<Element>(x[i] + (bias == nullptr ? Element{0} : bias[i % columns])).value();
}

template <typename Element>
__global__ void gelu_backward(const Element* g, const Element* x, const Element* bias, Element* out, Int64 columns,
                              Int64 count) {
    const Int64 i = grid_index();
    if (i >= count) return;
    out[i] = g[i] * Gelu<Element>(x[i] + (bias == nullptr ? Element{0} : bias[i % columns])).derivative();
}

// copy may be null.
template <typename Element, typename Gradient, typename Copy>
__global__ void adamw(Element* values, const Gradient* gradients, Element* first, Element* second, Copy* copy,
                      double beta1, double beta2, double epsilon, double decay, double rate, double second_correction,
                      double gradient_scale, Int64 count) {
    const Int64 i = grid_index();
    if (i >= count) return;
    const Element g = static_cast<Element>(read(gradients[i])) * static_cast<Element>(gradient_scale);
    const Element m = first[i] * static_cast<Element>(beta1) + g * static_cast<Element>(1 - beta1);
    const Element v = second[i] * static_cast<Element>(beta2) + g * g * static_cast<Element>(1 - beta2);
    const Element denominator = sqrt(v) * static_cast<Element>(second_correction) + static_cast<Element>(epsilon);
    first[i] = m;
    second[i] = v;
    values[i] = values[i] * static_cast<Element>(decay) - m / denominator * static_cast<Element>(rate);
    if (copy != nullptr) write(copy + i, values[i]);
}

template <typename Source, typename Target>
__global__ void convert(const Source* source, Target* target, Int64 count) {
    const Int64 i = grid_index();
    if (i < count) write(target + i, read(source[i]));
}

// Each block leaves the sum of what its threads meet; the host adds these up.
template <typename Source>
__global__ void sum_of_squares(const Source* source, double* sums, Int64 count) {
    double sum = 0;
    for (Int64 i = grid_index(); i < count; i += static_cast<Int64>(gridDim.x) * row_threads) {
        const double value = static_cast<double>(read(source[i]));
        sum += value * value;
    }
    const double total = fold_block<Sum>(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

// The word of one element: kernels/native/fused_dropout.hpp tells which one it is.
__device__ inline Word dropout_word(LongWord key, LongWord upper, LongWord element) {
    const LongWord block = element / 64 * 16 + element % 16;
    Word counter[4] = {static_cast<Word>(block), static_cast<Word>(block >> 32), static_cast<Word>(upper),
                       static_cast<Word>(upper >> 32)};
    Word key0 = static_cast<Word>(key);
    Word key1 = static_cast<Word>(key >> 32);
    for (int round = 0; round < 10; ++round, key0 += 0x9e3779b9, key1 += 0xbb67ae85) {
        const Word high0 = __umulhi(counter[0], 0xd2511f53), low0 = counter[0] * 0xd2511f53;
        const Word high1 = __umulhi(counter[2], 0xcd9e8d57), low1 = counter[2] * 0xcd9e8d57;
        counter[0] = high1 ^ counter[1] ^ key0;
        counter[1] = low1;
        counter[2] = high0 ^ counter[3] ^ key1;
        counter[3] = low0;
    }
    return counter[element / 16 % 4];
}

template <typename Element>
__global__ void dropout(const Element* x, Word threshold, double scale, LongWord key, LongWord upper, LongWord first,
                        LongWord row_stride, Element* out, Int64 columns, Int64 count) {
    const Int64 i = grid_index();
    if (i >= count) return;
    const LongWord element = first + static_cast<LongWord>(i / columns) * row_stride + static_cast<LongWord>(i % columns);
    out[i] = dropout_word(key, upper, element) >= threshold ? x[i] * static_cast<Element>(scale) : Element{0};
}

template <typename Element>
__global__ void column_sums(const Element* matrix, Element* out, Int64 rows, Int64 columns) {
    const Int64 column = grid_index();
    if (column >= columns) return;
    Element sum = out[column];
    for (Int64 row = 0; row < rows; ++row) sum += matrix[row * columns + column];
    out[column] = sum;
}
