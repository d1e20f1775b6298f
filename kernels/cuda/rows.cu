// The fused kernels that sum over rows. One block of `row_threads` threads works on one row, so that a row's bits do
// not depend on the others; what the kernels compute is told in kernels/fused.py.
#include "common.cuh"

template <typename Element>
__global__ void layer_norm(const Element* x, const Element* weight, const Element* bias, double epsilon, Element* out,
                           Element* mean, Element* inverse, Int64 columns) {
    const Int64 row = blockIdx.x;
    x += row * columns;
    out += row * columns;
    Element sum = 0;
    for (Int64 i = threadIdx.x; i < columns; i += row_threads) sum += x[i];
    const Element middle = fold_block<Sum>(sum) / static_cast<Element>(columns);
    Element squares = 0;
    for (Int64 i = threadIdx.x; i < columns; i += row_threads) squares += (x[i] - middle) * (x[i] - middle);
    const Element variance = fold_block<Sum>(squares) / static_cast<Element>(columns);
    const Element factor = Element{1} / sqrt(variance + static_cast<Element>(epsilon));
    for (Int64 i = threadIdx.x; i < columns; i += row_threads) out[i] = (x[i] - middle) * factor * weight[i] + bias[i];
    if (threadIdx.x == 0) {
        mean[row] = middle;
        inverse[row] = factor;
    }
}

template <typename Element>
__global__ void layer_norm_backward(const Element* g, const Element* x, const Element* weight, const Element* mean,
                                    const Element* inverse, Element* out, Int64 columns) {
    const Int64 row = blockIdx.x;
    g += row * columns;
    x += row * columns;
    out += row * columns;
    const Element middle = mean[row];
    const Element factor = inverse[row];
    Element sum = 0;
    Element along = 0;
    for (Int64 i = threadIdx.x; i < columns; i += row_threads) {
        sum += g[i] * weight[i];
        along += g[i] * weight[i] * ((x[i] - middle) * factor);
    }
    const Element mean_scaled = fold_block<Sum>(sum) / static_cast<Element>(columns);
    const Element mean_along = fold_block<Sum>(along) / static_cast<Element>(columns);
    for (Int64 i = threadIdx.x; i < columns; i += row_threads) {
        const Element normalised = (x[i] - middle) * factor;
        out[i] = (g[i] * weight[i] - (normalised * mean_along + mean_scaled)) * factor;
    }
}

// One thread a column, over the rows in order. To be launched before layer_norm_backward, which may overwrite g or x.
template <typename Element>
__global__ void layer_norm_parameters(const Element* g, const Element* x, const Element* mean, const Element* inverse,
                                      Element* weight_gradient, Element* bias_gradient, Int64 rows, Int64 columns) {
    const Int64 column = grid_index();
    if (column >= columns) return;
    Element of_weight = weight_gradient[column];
    Element of_bias = bias_gradient[column];
    for (Int64 row = 0; row < rows; ++row) {
        const Int64 i = row * columns + column;
        of_weight += g[i] * ((x[i] - mean[row]) * inverse[row]);
        of_bias += g[i];
    }
    weight_gradient[column] = of_weight;
    bias_gradient[column] = of_bias;
}

__device__ inline Int64 visible_keys(Int64 query, Int64 offset, Int64 keys) {
    const Int64 count = query + offset + 1;
    return count < 0 ? 0 : count < keys ? count : keys;
}

template <typename Element>
__global__ void causal_softmax(Element* scores, double scale, Int64 offset, Int64 queries, Int64 keys) {
    const Int64 row = blockIdx.x;
    const Int64 visible = visible_keys(row % queries, offset, keys);
    const Element multiplier = static_cast<Element>(scale);
    scores += row * keys;
    Element highest = -infinity();
    for (Int64 i = threadIdx.x; i < visible; i += row_threads) highest = Maximum::apply(highest, scores[i] * multiplier);
    highest = fold_block<Maximum>(highest);
    Element sum = 0;
    for (Int64 i = threadIdx.x; i < visible; i += row_threads) {
        scores[i] = exp(scores[i] * multiplier - highest);
        sum += scores[i];
    }
    const Element factor = Element{1} / fold_block<Sum>(sum);
    for (Int64 i = threadIdx.x; i < keys; i += row_threads) scores[i] = i < visible ? scores[i] * factor : Element{0};
}

template <typename Element>
__global__ void causal_softmax_backward(const Element* g, const Element* weights, double scale, Int64 offset,
                                        Element* out, Int64 queries, Int64 keys) {
    const Int64 row = blockIdx.x;
    const Int64 visible = visible_keys(row % queries, offset, keys);
    g += row * keys;
    weights += row * keys;
    out += row * keys;
    Element sum = 0;
    for (Int64 i = threadIdx.x; i < visible; i += row_threads) sum += g[i] * weights[i];
    const Element along = fold_block<Sum>(sum);
    for (Int64 i = threadIdx.x; i < keys; i += row_threads) {
        out[i] = i < visible ? (g[i] - along) * weights[i] * static_cast<Element>(scale) : Element{0};
    }
}

// gradient may be null.
template <typename Element>
__global__ void cross_entropy(const Element* logits, const Int64* targets, double scale, double* losses,
                              Element* gradient, Int64 columns) {
    const Int64 row = blockIdx.x;
    const Int64 target = targets[row];
    const Element multiplier = static_cast<Element>(scale);
    logits += row * columns;
    const double chosen = logits[target];
    Element highest = -infinity();
    for (Int64 i = threadIdx.x; i < columns; i += row_threads) highest = Maximum::apply(highest, logits[i]);
    highest = fold_block<Maximum>(highest);
    Element sum = 0;
    for (Int64 i = threadIdx.x; i < columns; i += row_threads) sum += exp(logits[i] - highest);
    const Element total = fold_block<Sum>(sum);
    if (threadIdx.x == 0) losses[row] = log(static_cast<double>(total)) - (chosen - static_cast<double>(highest));
    if (gradient == nullptr) return;
    gradient += row * columns;
    for (Int64 i = threadIdx.x; i < columns; i += row_threads) {
        gradient[i] = exp(logits[i] - highest) * (multiplier / total) - (i == target ? multiplier : Element{0});
    }
}
