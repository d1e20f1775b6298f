// Every kernel of every instruction set that runs here, on odd counts, unaligned addresses and each place for the
// output, against the baseline; the baseline against results worked out by hand; all of it from two threads at once.
// Run by `make sanitize` under the sanitizers; exits with 1 and a line for the first difference.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "dispatch.hpp"

namespace {

using namespace collectives::kernels;

constexpr std::size_t input_count = 3;
using Memory = std::vector<std::byte>;

// Small finite numbers of either sign in every float format; any pattern will do for integers.
Memory pattern(std::size_t dtype, std::size_t bytes, std::size_t seed) {
    Memory memory(bytes);
    const std::size_t width = element_bytes[dtype];
    for (std::size_t i = 0; i < bytes; ++i) {
        const bool sign_and_exponent = i % width == width - 1;
        const std::size_t value = i * 7 + seed * 13 + i % 5;
        memory[i] = static_cast<std::byte>(sign_and_exponent ? 0x38 | (value % 2) << 7 : value % 251);
    }
    return memory;
}

// Exactly as many bytes as belong to the elements, so that the address sanitizer sees one too many.
struct Placed {
    Memory memory;
    std::size_t offset;
    Placed(const Memory& content, std::size_t place) : memory(place + content.size()), offset(place) {
        if (!content.empty()) std::memcpy(data(), content.data(), content.size());
    }
    std::byte* data() { return memory.data() + offset; }
    Memory content() const { return {memory.begin() + static_cast<std::ptrdiff_t>(offset), memory.end()}; }
};

Memory run_reduce(ReduceFunction function, const std::vector<Memory>& inputs, std::size_t number, std::size_t count,
                  std::size_t offset, std::size_t output) {
    std::vector<Placed> placed;
    std::vector<const std::byte*> pointers;
    for (const Memory& input : inputs) placed.emplace_back(input, offset);
    placed.emplace_back(Memory(inputs[0].size()), offset);
    for (std::size_t i = 0; i < number; ++i) pointers.push_back(placed[i].data());
    function(pointers.data(), number, placed[output].data(), count);
    return placed[output].content();
}

bool agrees(const KernelTable& table, std::size_t dtype, std::size_t count, std::size_t offset) {
    std::vector<Memory> inputs;
    for (std::size_t i = 0; i < input_count; ++i) {
        inputs.push_back(pattern(dtype, count * element_bytes[dtype], i));
    }
    for (std::size_t op = 0; op < op_count; ++op) {
        if (table.reduce[op][dtype] == nullptr) continue;
        for (std::size_t number = 1; number <= input_count; ++number) {
            const Memory expected =
                run_reduce(baseline::table.reduce[op][dtype], inputs, number, count, 0, input_count);
            for (std::size_t output = 0; output <= input_count; ++output) {
                if (run_reduce(table.reduce[op][dtype], inputs, number, count, offset, output) != expected) {
                    std::printf("%s differs: op %zu, dtype %zu, count %zu, offset %zu, %zu inputs, output %zu\n",
                                table.name, op, dtype, count, offset, number, output);
                    return false;
                }
            }
        }
    }
    if (table.scale[dtype] == nullptr) return true;
    Placed actual(inputs[0], offset);
    Placed expected(inputs[0], 0);
    table.scale[dtype](actual.data(), count, 0.75);
    baseline::table.scale[dtype](expected.data(), count, 0.75);
    if (actual.content() == expected.content()) return true;
    std::printf("%s differs: scale, dtype %zu, count %zu, offset %zu\n", table.name, dtype, count, offset);
    return false;
}

template <typename Element>
bool gives(Op op, DType dtype, std::vector<Element> a, std::vector<Element> b, std::vector<Element> expected) {
    std::vector<Element> out(a.size());
    const std::byte* const pointers[] = {reinterpret_cast<std::byte*>(a.data()),
                                         reinterpret_cast<std::byte*>(b.data())};
    baseline::table.reduce[index(op)][index(dtype)](pointers, 2, reinterpret_cast<std::byte*>(out.data()),
                                                    a.size() * sizeof(Element) / element_bytes[index(dtype)]);
    if (std::memcmp(out.data(), expected.data(), out.size() * sizeof(Element)) == 0) return true;
    std::printf("the baseline is wrong: op %zu, dtype %zu\n", index(op), index(dtype));
    return false;
}

bool baseline_is_right() {
    using Halves = std::vector<std::uint16_t>;
    // float16: 1 + 1; 2048 + 1, a tie that goes to even; 65504 + 65504; the smallest subnormal, doubled; infinity - 1.
    const Halves half_a = {0x3c00, 0x6800, 0x7bff, 0x0001, 0x7c00};
    const Halves half_b = {0x3c00, 0x3c00, 0x7bff, 0x0001, 0xbc00};
    const Halves half_sum = {0x4000, 0x6800, 0x7c00, 0x0002, 0x7c00};
    // bfloat16: 1 + 1; 256 + 1, a tie that goes to even; the largest, doubled; the smallest subnormal, doubled.
    const Halves brain_a = {0x3f80, 0x4380, 0x7f7f, 0x0001};
    const Halves brain_b = {0x3f80, 0x3f80, 0x7f7f, 0x0001};
    const Halves brain_sum = {0x4000, 0x4380, 0x7f80, 0x0002};
    return gives<std::int32_t>(Op::sum, DType::int32, {INT32_MAX, -5}, {1, -7}, {INT32_MIN, -12}) &&
           gives<std::int64_t>(Op::prod, DType::int64, {INT64_MIN, -3}, {-1, 4}, {INT64_MIN, -12}) &&
           gives<std::int8_t>(Op::min, DType::int8, {-128, 3}, {127, 2}, {-128, 2}) &&
           gives<std::uint8_t>(Op::max, DType::uint8, {128, 3}, {127, 4}, {128, 4}) &&
           gives<std::uint8_t>(Op::sum, DType::boolean, {0, 0, 1, 1}, {0, 1, 0, 1}, {0, 1, 1, 1}) &&
           gives<float>(Op::min, DType::float32, {0.0F, 1.5F}, {-0.0F, -2.0F}, {-0.0F, -2.0F}) &&
           gives<double>(Op::max, DType::float64, {-0.0, 1.5}, {0.0, -2.0}, {0.0, 1.5}) &&
           gives<float>(Op::sum, DType::complex64, {1.0F, 2.0F}, {3.0F, -5.0F}, {4.0F, -3.0F}) &&
           gives<std::uint16_t>(Op::sum, DType::float16, half_a, half_b, half_sum) &&
           gives<std::uint16_t>(Op::sum, DType::bfloat16, brain_a, brain_b, brain_sum);
}

bool everything_is_right() {
    if (!baseline_is_right()) return false;
    for (const KernelTable* table : runnable_tables()) {
        for (const std::size_t count : {0u, 1u, 3u, 17u, 255u, 1021u}) {
            for (const std::size_t offset : {0u, 1u, 3u, 8u}) {
                for (std::size_t dtype = 0; dtype < dtype_count; ++dtype) {
                    if (!agrees(*table, dtype, count, offset)) return false;
                }
            }
        }
    }
    return true;
}

}  // namespace

int main() {
    bool there = false;
    std::thread other([&there] { there = everything_is_right(); });
    const bool here = everything_is_right();
    other.join();
    return here && there ? 0 : 1;
}
