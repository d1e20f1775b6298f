// Every kernel of every instruction set that runs here, on odd counts and unaligned addresses, against plain
// arithmetic; from two threads at once. Run by `make sanitize` under the sanitizers; exits with 1 and a line for the
// first difference.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "reduce_table.hpp"

namespace {

using kernels::Dtype;
using kernels::Isa;
using kernels::Op;

constexpr std::size_t widths[] = {1, 1, 2, 4, 8, 1, 2, 4, 8, 2, 2, 4, 8};

int check_all(Isa isa, std::size_t count, std::size_t offset) {
    for (int dtype = 0; dtype < 13; ++dtype) {
        const std::size_t bytes = widths[dtype] * count;
        std::vector<std::vector<std::byte>> inputs(3, std::vector<std::byte>(bytes + offset));
        for (std::size_t k = 0; k < inputs.size(); ++k) {
            for (std::size_t i = 0; i < bytes; ++i) {
                const std::size_t value = dtype == 0 ? (i + k) % 2 : (i * 7 + k * 13 + i % 5) % 251;
                inputs[k][i + offset] = static_cast<std::byte>(value);
            }
        }
        for (int op = 0; op < 7; ++op) {
            const auto function = kernels::find_reduce(isa, Op{op}, Dtype{dtype});
            const auto reference = kernels::find_reduce(Isa::baseline, Op{op}, Dtype{dtype});
            if (function == nullptr) {
                continue;
            }
            const std::byte* pointers[] = {inputs[0].data() + offset, inputs[1].data() + offset,
                                           inputs[2].data() + offset};
            for (const std::size_t number : {std::size_t{1}, std::size_t{2}, std::size_t{3}}) {
                std::vector<std::byte> out(bytes + offset);
                std::vector<std::byte> expected(bytes + offset);
                function(pointers, number, out.data() + offset, count);
                reference(pointers, number, expected.data() + offset, count);
                if (out != expected) {
                    std::printf("isa %d op %d dtype %d count %zu inputs %zu differ\n", int(isa), op, dtype, count,
                                number);
                    return 1;
                }
            }
        }
    }
    const std::int32_t a[] = {INT32_MAX, 1, -5};
    const std::int32_t b[] = {1, 2, -7};
    std::int32_t sum[3];
    const std::byte* pointers[] = {reinterpret_cast<const std::byte*>(a), reinterpret_cast<const std::byte*>(b)};
    kernels::find_reduce(isa, Op::sum, Dtype::int32)(pointers, 2, reinterpret_cast<std::byte*>(sum), 3);
    if (sum[0] != INT32_MIN || sum[1] != 3 || sum[2] != -12) {
        std::printf("isa %d: int32 sums are wrong\n", int(isa));
        return 1;
    }
    return 0;
}

int run() {
    for (const Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
        if (!kernels::has_isa(isa)) {
            continue;
        }
        for (const std::size_t count : {0u, 1u, 3u, 17u, 255u, 1021u}) {
            for (const std::size_t offset : {0u, 1u, 3u}) {
                if (check_all(isa, count, offset) != 0) {
                    return 1;
                }
            }
        }
    }
    return 0;
}

}  // namespace

int main() {
    int other = 0;
    std::thread thread([&other] { other = run(); });
    const int mine = run();
    thread.join();
    return mine + other;
}
