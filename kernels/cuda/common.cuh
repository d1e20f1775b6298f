// What the device kernels share: how elements lie in memory, and sums over the threads of a block in a fixed order.
#pragma once

using Int64 = long long;
using Word = unsigned int;
using LongWord = unsigned long long;

// There are no headers to take it from.
__device__ inline float infinity() { return __int_as_float(0x7f800000); }

// Launched with this many threads wherever a block works on one row.
constexpr int row_threads = 256;

struct Float16 {
    unsigned short bits;
};
struct BFloat16 {
    unsigned short bits;
};

__device__ inline float read(float value) { return value; }
__device__ inline double read(double value) { return value; }
__device__ inline float read(BFloat16 value) { return __uint_as_float(static_cast<Word>(value.bits) << 16); }
__device__ inline float read(Float16 value) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
}

// Rounded to nearest even; doubles reach bfloat16 by way of float, as they do on the host.
template <typename Source>
__device__ inline void write(float* target, Source value) {
    *target = static_cast<float>(value);
}
template <typename Source>
__device__ inline void write(double* target, Source value) {
    *target = static_cast<double>(value);
}
template <typename Source>
__device__ inline void write(BFloat16* target, Source value) {
    const Word bits = __float_as_uint(static_cast<float>(value));
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    target->bits = static_cast<unsigned short>((is_nan ? bits | 0x400000 : bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
__device__ inline void write(Float16* target, float value) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(target->bits) : "f"(value));
}
__device__ inline void write(Float16* target, double value) {
    asm("cvt.rn.f16.f64 %0, %1;" : "=h"(target->bits) : "d"(value));
}

struct Sum {
    template <typename Element>
    __device__ static Element apply(Element a, Element b) {
        return a + b;
    }
};

struct Maximum {
    template <typename Element>
    __device__ static Element apply(Element a, Element b) {
        return b > a ? b : a;
    }
};

// One value from each of the block's threads, folded by halves; every thread gets the result.
template <typename Operation, typename Element>
__device__ Element fold_block(Element value) {
    __shared__ Element values[row_threads];
    values[threadIdx.x] = value;
    for (int half = row_threads / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) values[threadIdx.x] = Operation::apply(values[threadIdx.x], values[threadIdx.x + half]);
    }
    __syncthreads();
    const Element result = values[0];
    __syncthreads();
    return result;
}

// The element that a thread of a one-dimensional grid works on.
__device__ inline Int64 grid_index() { return static_cast<Int64>(blockIdx.x) * blockDim.x + threadIdx.x; }
