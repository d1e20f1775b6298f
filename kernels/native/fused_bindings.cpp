// The Python face of the fused kernels. kernels/fused.py has checked what it passes on; here is only made sure that no
// kernel leaves an array.
#include "fused_bindings.hpp"

#include <stdexcept>

#include "buffer.hpp"
#include "fused_dispatch.hpp"

namespace collectives::kernels {
namespace {

// An array of `count` elements that a kernel reads or, where Element is not const, writes; None is a null pointer.
template <typename Element>
class Argument {
  public:
    Argument(nb::handle object, std::size_t count)
        : buffer_(object, std::is_const_v<Element> ? PyBUF_SIMPLE : PyBUF_WRITABLE) {
        if (object.is_none()) return;
        if (!buffer_ || buffer_.bytes() != count * sizeof(Element)) {
            throw std::invalid_argument("an array is not what kernels.fused has made sure of");
        }
    }

    operator Element*() const { return reinterpret_cast<Element*>(buffer_.data()); }

  private:
    Buffer buffer_;
};

// Calls work with the kernels for the type of the elements, and a value of that type.
template <typename Work>
void with_element(const FusedTable& table, std::size_t dtype, const Work& work) {
    if (dtype == index(DType::float64)) {
        work(table.float64, double{});
    } else {
        work(table.float32, float{});
    }
}

ConvertFunction find_convert(const FusedTable& table, std::size_t source, std::size_t target) {
    const bool known = source < dtype_count && target < dtype_count;
    const ConvertFunction function = known ? table.convert[source][target] : nullptr;
    if (function == nullptr) throw std::invalid_argument("a dtype is not what kernels.fused has made sure of");
    return function;
}

void gelu(const FusedTable& table, std::size_t dtype, nb::handle x, nb::handle bias, nb::handle out, std::size_t rows,
          std::size_t columns) {
    with_element(table, dtype, [&](const auto& kernels, auto element) {
        using Element = decltype(element);
        const std::size_t count = rows * columns;
        const Argument<const Element> input(x, count), shift(bias, columns);
        const Argument<Element> result(out, count);
        run(count * sizeof(Element), [&] { kernels.gelu(input, shift, result, rows, columns); });
    });
}

void gelu_backward(const FusedTable& table, std::size_t dtype, nb::handle g, nb::handle x, nb::handle bias,
                   nb::handle out, std::size_t rows, std::size_t columns) {
    with_element(table, dtype, [&](const auto& kernels, auto element) {
        using Element = decltype(element);
        const std::size_t count = rows * columns;
        const Argument<const Element> gradient(g, count), input(x, count), shift(bias, columns);
        const Argument<Element> result(out, count);
        run(count * sizeof(Element), [&] { kernels.gelu_backward(gradient, input, shift, result, rows, columns); });
    });
}

void layer_norm(const FusedTable& table, std::size_t dtype, nb::handle x, nb::handle weight, nb::handle bias,
                double epsilon, nb::handle out, nb::handle mean, nb::handle inverse, std::size_t rows,
                std::size_t columns) {
    with_element(table, dtype, [&](const auto& kernels, auto element) {
        using Element = decltype(element);
        const std::size_t count = rows * columns;
        const Argument<const Element> input(x, count), factor(weight, columns), shift(bias, columns);
        const Argument<Element> result(out, count), means(mean, rows), inverses(inverse, rows);
        run(count * sizeof(Element),
            [&] { kernels.layer_norm(input, factor, shift, epsilon, result, means, inverses, rows, columns); });
    });
}

void layer_norm_backward(const FusedTable& table, std::size_t dtype, nb::handle g, nb::handle x, nb::handle weight,
                         nb::handle mean, nb::handle inverse, nb::handle out, nb::handle weight_gradient,
                         nb::handle bias_gradient, std::size_t rows, std::size_t columns) {
    with_element(table, dtype, [&](const auto& kernels, auto element) {
        using Element = decltype(element);
        const std::size_t count = rows * columns;
        const Argument<const Element> gradient(g, count), input(x, count), factor(weight, columns);
        const Argument<const Element> means(mean, rows), inverses(inverse, rows);
        const Argument<Element> result(out, count), of_weight(weight_gradient, columns),
            of_bias(bias_gradient, columns);
        run(count * sizeof(Element), [&] {
            kernels.layer_norm_backward(gradient, input, factor, means, inverses, result, of_weight, of_bias, rows,
                                        columns);
        });
    });
}

void causal_softmax(const FusedTable& table, std::size_t dtype, nb::handle scores, double scale, std::int64_t offset,
                    std::size_t rows, std::size_t queries, std::size_t keys) {
    with_element(table, dtype, [&](const auto& kernels, auto element) {
        using Element = decltype(element);
        const Argument<Element> values(scores, rows * keys);
        run(rows * keys * sizeof(Element), [&] { kernels.causal_softmax(values, scale, offset, rows, queries, keys); });
    });
}

void causal_softmax_backward(const FusedTable& table, std::size_t dtype, nb::handle g, nb::handle weights, double scale,
                             std::int64_t offset, nb::handle out, std::size_t rows, std::size_t queries,
                             std::size_t keys) {
    with_element(table, dtype, [&](const auto& kernels, auto element) {
        using Element = decltype(element);
        const Argument<const Element> gradient(g, rows * keys), values(weights, rows * keys);
        const Argument<Element> result(out, rows * keys);
        run(rows * keys * sizeof(Element),
            [&] { kernels.causal_softmax_backward(gradient, values, scale, offset, result, rows, queries, keys); });
    });
}

void cross_entropy(const FusedTable& table, std::size_t dtype, nb::handle logits, nb::handle targets, double scale,
                   nb::handle losses, nb::handle gradient, std::size_t rows, std::size_t columns) {
    with_element(table, dtype, [&](const auto& kernels, auto element) {
        using Element = decltype(element);
        const Argument<const Element> input(logits, rows * columns);
        const Argument<const std::int64_t> chosen(targets, rows);
        const Argument<double> loss(losses, rows);
        const Argument<Element> result(gradient, rows * columns);
        run(rows * columns * sizeof(Element),
            [&] { kernels.cross_entropy(input, chosen, scale, loss, result, rows, columns); });
    });
}

void adamw(const FusedTable& table, std::size_t dtype, nb::handle values, std::size_t gradients_dtype,
           nb::handle gradients, nb::handle first, nb::handle second, std::size_t copy_dtype, nb::handle copy,
           const AdamW& step, std::size_t count) {
    const ConvertFunction to_elements = find_convert(table, gradients_dtype, dtype);
    const ConvertFunction to_copy = copy.is_none() ? nullptr : find_convert(table, dtype, copy_dtype);
    const std::size_t gradient_bytes = element_bytes[gradients_dtype];
    const std::size_t copy_bytes = copy.is_none() ? 0 : element_bytes[copy_dtype];
    with_element(table, dtype, [&](const auto& kernels, auto element) {
        using Element = decltype(element);
        const Argument<Element> value(values, count), first_moment(first, count), second_moment(second, count);
        const Argument<const std::byte> source(gradients, count * gradient_bytes);
        const Argument<std::byte> target(copy, count * copy_bytes);
        const ConvertedInput input{source, gradient_bytes, gradients_dtype == dtype ? nullptr : to_elements};
        const ConvertedOutput output{target, copy_bytes, to_copy};
        run(count * sizeof(Element),
            [&] { kernels.adamw(value, input, first_moment, second_moment, step, output, count); });
    });
}

void convert(const FusedTable& table, std::size_t source_dtype, nb::handle source, std::size_t target_dtype,
             nb::handle target, std::size_t count) {
    const ConvertFunction function = find_convert(table, source_dtype, target_dtype);
    const Argument<const std::byte> from(source, count * element_bytes[source_dtype]);
    const Argument<std::byte> to(target, count * element_bytes[target_dtype]);
    run(count * element_bytes[source_dtype], [&] { function(from, to, count); });
}

double sum_of_squares(const FusedTable& table, std::size_t dtype, nb::handle x, std::size_t count) {
    find_convert(table, dtype, dtype);
    const Argument<const std::byte> input(x, count * element_bytes[dtype]);
    double result = 0;
    run(count * element_bytes[dtype], [&] { result = table.sum_of_squares[dtype](input, count); });
    return result;
}

void dropout(const FusedTable& table, std::size_t dtype, nb::handle x, std::uint32_t threshold, double scale,
             std::uint64_t key0, std::uint64_t key1, std::uint64_t first, std::uint64_t row_stride, nb::handle out,
             std::size_t rows, std::size_t columns) {
    const DropoutStream stream{{key0, key1}, first, row_stride};
    with_element(table, dtype, [&](const auto& kernels, auto element) {
        using Element = decltype(element);
        const std::size_t count = rows * columns;
        const Argument<const Element> input(x, count);
        const Argument<Element> result(out, count);
        run(count * sizeof(Element), [&] { kernels.dropout(input, threshold, scale, stream, result, rows, columns); });
    });
}

void column_sums(const FusedTable& table, std::size_t dtype, nb::handle matrix, nb::handle out, std::size_t rows,
                 std::size_t columns) {
    with_element(table, dtype, [&](const auto& kernels, auto element) {
        using Element = decltype(element);
        const Argument<const Element> input(matrix, rows * columns);
        const Argument<Element> sums(out, columns);
        run(rows * columns * sizeof(Element), [&] { kernels.column_sums(input, sums, rows, columns); });
    });
}

}  // namespace

void bind_fused(nb::module_& module) {
    nb::class_<AdamW>(module, "AdamW")
        .def(nb::init<double, double, double, double, double, double, double>(), nb::arg("beta1"), nb::arg("beta2"),
             nb::arg("epsilon"), nb::arg("decay"), nb::arg("rate"), nb::arg("second_correction"),
             nb::arg("gradient_scale"));
    nb::class_<FusedTable>(module, "FusedTable")
        .def_prop_ro("name", [](const FusedTable& table) { return table.name; })
        .def("gelu", &gelu, nb::arg("dtype"), nb::arg("x"), nb::arg("bias").none(), nb::arg("out"), nb::arg("rows"),
             nb::arg("columns"))
        .def("gelu_backward", &gelu_backward, nb::arg("dtype"), nb::arg("g"), nb::arg("x"), nb::arg("bias").none(),
             nb::arg("out"), nb::arg("rows"), nb::arg("columns"))
        .def("layer_norm", &layer_norm)
        .def("layer_norm_backward", &layer_norm_backward)
        .def("causal_softmax", &causal_softmax)
        .def("causal_softmax_backward", &causal_softmax_backward)
        .def("cross_entropy", &cross_entropy, nb::arg("dtype"), nb::arg("logits"), nb::arg("targets"), nb::arg("scale"),
             nb::arg("losses"), nb::arg("gradient").none(), nb::arg("rows"), nb::arg("columns"))
        .def("adamw", &adamw, nb::arg("dtype"), nb::arg("values"), nb::arg("gradients_dtype"), nb::arg("gradients"),
             nb::arg("first"), nb::arg("second"), nb::arg("copy_dtype"), nb::arg("copy").none(), nb::arg("step"),
             nb::arg("count"))
        .def("convert", &convert)
        .def("sum_of_squares", &sum_of_squares)
        .def("dropout", &dropout)
        .def("column_sums", &column_sums);
    module.def("runnable_fused_tables", [] {
        nb::list tables;
        for (const FusedTable* table : runnable_fused_tables()) {
            tables.append(nb::cast(table, nb::rv_policy::reference));
        }
        return tables;
    });
}

}  // namespace collectives::kernels
