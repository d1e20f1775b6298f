// Every fused kernel of every instruction set that runs here, on odd sizes and starts, against the baseline bit for
// bit; the exponential against the library's; from two threads at once. Run by `make sanitize` under the sanitizers;
// exits with 1 and a line for the first difference.
#define COLLECTIVES_ISA self_test
#define COLLECTIVES_VECTOR_BYTES 16

#include <cmath>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "fused_dispatch.hpp"
#include "fused_exponential.hpp"

namespace {

using namespace collectives::kernels;

// Exactly as long as the kernels may go, so that the address sanitizer sees one element too many; `start` elements
// precede what they get.
template <typename Element>
class Row {
  public:
    Row(std::size_t count, std::size_t start, std::size_t seed) : start_(start), memory_(start + count) {
        for (std::size_t i = 0; i < count; ++i) {
            const auto value = static_cast<double>((i * 7919 + seed * 104729) % 2003);
            memory_[start + i] = static_cast<Element>((value - 1001) / 333);
        }
    }
    Element* data() { return memory_.data() + start_; }
    void add_to(std::vector<std::byte>& results) const {
        const auto* bytes = reinterpret_cast<const std::byte*>(memory_.data() + start_);
        results.insert(results.end(), bytes, bytes + (memory_.size() - start_) * sizeof(Element));
    }

  private:
    std::size_t start_;
    std::vector<Element> memory_;
};

constexpr AdamW step{.beta1 = 0.9,
                     .beta2 = 0.95,
                     .epsilon = 1e-8,
                     .decay = 0.99,
                     .rate = 0.002,
                     .second_correction = 3,
                     .gradient_scale = 0.5};
constexpr DropoutStream stream{{0x123456789abcdef0, 0xfedcba9876543210}, 77, 1000};

// Everything that the kernels write for matrices of this size, one after the other.
template <typename Element>
std::vector<std::byte> run(const FusedTable& table, const FloatKernels<Element>& kernels, DType dtype, std::size_t rows,
                           std::size_t columns, std::size_t start) {
    const std::size_t count = rows * columns;
    Row<Element> x(count, start, 1), g(count, start, 2), bias(columns, start, 3), weight(columns, start, 4);
    Row<Element> out(count, start, 5), mean(rows, start, 6), inverse(rows, start, 7), scores(count, start, 8);
    Row<Element> of_weight(columns, start, 9), of_bias(columns, start, 10), logits(count, start, 11);
    Row<Element> first(count, start, 12), second(count, start, 13), sums(columns, start, 14), dropped(count, start, 15);
    Row<double> losses(rows, start, 16), squares(1, 0, 17);
    Row<std::uint16_t> copy(count, start, 18);
    std::vector<std::int64_t> targets(rows);
    for (std::size_t row = 0; row < rows; ++row) targets[row] = static_cast<std::int64_t>(row % columns);
    for (std::size_t i = 0; i < count; ++i) second.data()[i] = std::abs(second.data()[i]);

    kernels.gelu(x.data(), bias.data(), out.data(), rows, columns);
    kernels.gelu_backward(g.data(), x.data(), nullptr, g.data(), rows, columns);
    kernels.layer_norm(x.data(), weight.data(), bias.data(), 1e-5, x.data(), mean.data(), inverse.data(), rows,
                       columns);
    kernels.layer_norm_backward(g.data(), x.data(), weight.data(), mean.data(), inverse.data(), g.data(),
                                of_weight.data(), of_bias.data(), rows, columns);
    kernels.causal_softmax(scores.data(), 2, -1, rows, rows, columns);
    kernels.causal_softmax_backward(out.data(), scores.data(), 2, 3, out.data(), rows, rows, columns);
    kernels.cross_entropy(logits.data(), targets.data(), 0.5, losses.data(), logits.data(), rows, columns);
    const ConvertFunction narrow = table.convert[index(dtype)][index(DType::bfloat16)];
    const ConvertFunction widen = table.convert[index(DType::bfloat16)][index(dtype)];
    const ConvertedOutput rounded{reinterpret_cast<std::byte*>(copy.data()), 2, narrow};
    kernels.adamw(x.data(), {reinterpret_cast<std::byte*>(g.data()), sizeof(Element), nullptr}, first.data(),
                  second.data(), step, rounded, count);
    kernels.adamw(x.data(), {reinterpret_cast<std::byte*>(copy.data()), 2, widen}, first.data(), second.data(), step,
                  {nullptr, 0, nullptr}, count);
    kernels.dropout(x.data(), 1U << 30, 4.0 / 3, stream, dropped.data(), rows, columns);
    kernels.column_sums(x.data(), sums.data(), rows, columns);
    squares.data()[0] = table.sum_of_squares[index(dtype)](reinterpret_cast<std::byte*>(x.data()), count);

    std::vector<std::byte> results;
    for (auto* row : {&x, &g, &out, &mean, &inverse, &scores, &of_weight, &of_bias}) row->add_to(results);
    for (auto* row : {&logits, &first, &second, &sums, &dropped}) row->add_to(results);
    losses.add_to(results);
    squares.add_to(results);
    copy.add_to(results);
    return results;
}

// Every format to every other, back, and to the sum of its squares.
std::vector<std::byte> run_conversions(const FusedTable& table, std::size_t count, std::size_t start) {
    std::vector<std::byte> results;
    for (std::size_t source = 0; source < dtype_count; ++source) {
        for (std::size_t target = 0; target < dtype_count; ++target) {
            if (table.convert[source][target] == nullptr) continue;
            Row<double> values(count, start, source);
            std::vector<std::byte> from(count * element_bytes[source]), to(count * element_bytes[target]);
            table.convert[index(DType::float64)][source](reinterpret_cast<std::byte*>(values.data()), from.data(),
                                                         count);
            table.convert[source][target](from.data(), to.data(), count);
            results.insert(results.end(), to.begin(), to.end());
        }
    }
    return results;
}

bool agree(std::size_t rows, std::size_t columns, std::size_t start) {
    const FusedTable& reference = baseline::fused_table;
    for (const FusedTable* table : runnable_fused_tables()) {
        const auto floats = [&](const FusedTable& t) {
            return run(t, t.float32, DType::float32, rows, columns, start);
        };
        const auto doubles = [&](const FusedTable& t) {
            return run(t, t.float64, DType::float64, rows, columns, start);
        };
        if (floats(*table) != floats(reference) || doubles(*table) != doubles(reference) ||
            run_conversions(*table, rows * columns, start) != run_conversions(reference, rows * columns, start)) {
            std::printf("%s differs: %zu rows, %zu columns, start %zu\n", table->name, rows, columns, start);
            return false;
        }
    }
    return true;
}

// The greatest error of the exponential, in units of the last place of the result, where it is not flushed to 0.
template <typename Element>
double greatest_error(double lowest) {
    using namespace collectives::kernels::self_test;
    double greatest = 0;
    for (double x = 0; x > lowest; x -= -lowest / 400000) {
        const auto argument = static_cast<Element>(x);
        const long double exact = std::exp(static_cast<long double>(argument));
        const auto actual = exp_of_negative<Element>(RegisterOf<Element>{} + argument)[0];
        const auto nearest = static_cast<Element>(exact);
        const auto unit = static_cast<long double>(nearest - std::nextafter(nearest, Element{0}));
        const auto error = std::abs(static_cast<double>((actual - exact) / unit));
        if (!(error <= greatest)) greatest = error;
    }
    return greatest;
}

bool exponential_is_right() {
    const double single = greatest_error<float>(-87);
    const double twice = greatest_error<double>(-708);
    if (single <= 2 && twice <= 2) return true;
    std::printf("the exponential is off by %g units (float) or %g (double) in the last place\n", single, twice);
    return false;
}

bool everything_is_right() {
    for (const std::size_t rows : {1u, 2u, 5u}) {
        for (const std::size_t columns : {1u, 3u, 16u, 31u, 64u, 97u, 130u, 1029u}) {
            for (const std::size_t start : {0u, 1u, 3u}) {
                if (!agree(rows, columns, start)) return false;
            }
        }
    }
    return exponential_is_right();
}

}  // namespace

int main() {
    bool there = false;
    std::thread other([&there] { there = everything_is_right(); });
    const bool here = everything_is_right();
    other.join();
    return here && there ? 0 : 1;
}
