// The table that names the fused kernels of one instruction set. Included once per instruction set.
#pragma once

#include "fused_convert.hpp"
#include "fused_dropout.hpp"
#include "fused_elements.hpp"
#include "fused_rows.hpp"

namespace collectives::kernels::COLLECTIVES_ISA {

template <typename Element>
constexpr FloatKernels<Element> make_float_kernels() {
    return {gelu<Element>,           gelu_backward<Element>,
            layer_norm<Element>,     layer_norm_backward<Element>,
            causal_softmax<Element>, causal_softmax_backward<Element>,
            cross_entropy<Element>,  adamw<Element>,
            dropout<Element>,        column_sums<Element>};
}

template <typename Source>
constexpr void fill_source(FusedTable& table, DType source) {
    auto& row = table.convert[index(source)];
    row[index(DType::float16)] = convert<Source, Float16>;
    row[index(DType::bfloat16)] = convert<Source, BFloat16>;
    row[index(DType::float32)] = convert<Source, Plain<float>>;
    row[index(DType::float64)] = convert<Source, Plain<double>>;
    table.sum_of_squares[index(source)] = sum_of_squares<Source>;
}

constexpr FusedTable make_fused_table(const char* name) {
    FusedTable table{name, make_float_kernels<float>(), make_float_kernels<double>(), {}, {}};
    fill_source<Float16>(table, DType::float16);
    fill_source<BFloat16>(table, DType::bfloat16);
    fill_source<Plain<float>>(table, DType::float32);
    fill_source<Plain<double>>(table, DType::float64);
    return table;
}

}  // namespace collectives::kernels::COLLECTIVES_ISA
