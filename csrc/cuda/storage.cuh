// Values between storage and the type they are computed in, 16 bytes of storage at a time or one by one.
#pragma once

#include "portable.cuh"

namespace awd::cuda {

static __device__ __forceinline__ float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static __device__ __forceinline__ uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

// To the nearest, ties to even; a NaN stays one.
static __device__ __forceinline__ uint16_t bf16_of_float(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

// Real: the type of differences and combinations. PACKET: elements in 16 bytes.
template <Dtype D>
struct Storage;

template <>
struct Storage<Dtype::f32> {
    using Real = float;
    using Raw = float;
    static constexpr int PACKET = 4;
    static __device__ __forceinline__ Real widened(Raw raw) { return raw; }
};

template <>
struct Storage<Dtype::f64> {
    using Real = double;
    using Raw = double;
    static constexpr int PACKET = 2;
    static __device__ __forceinline__ Real widened(Raw raw) { return raw; }
};

template <>
struct Storage<Dtype::bf16> {
    using Real = float;
    using Raw = uint16_t;
    static constexpr int PACKET = 8;
    static __device__ __forceinline__ Real widened(Raw raw) { return float_of(uint32_t(raw) << 16); }
};

template <>
struct Storage<Dtype::f16> {
    using Real = float;
    using Raw = uint16_t;
    static constexpr int PACKET = 8;
    static __device__ __forceinline__ Real widened(Raw raw) { return float_of_half(raw); }
};

template <Dtype D>
using RealOf = typename Storage<D>::Real;
template <Dtype D>
constexpr int PACKET_OF = Storage<D>::PACKET;

template <Dtype D>
static __device__ __forceinline__ void unpack(const Packet& packet, RealOf<D> (&values)[PACKET_OF<D>]) {
    typename Storage<D>::Raw raw[PACKET_OF<D>];
    memcpy(raw, &packet, sizeof raw);
#pragma unroll
    for (int index = 0; index < PACKET_OF<D>; ++index) values[index] = Storage<D>::widened(raw[index]);
}

template <Dtype D>
static __device__ __forceinline__ RealOf<D> element(const void* from, int64_t at) {
    return Storage<D>::widened(static_cast<const typename Storage<D>::Raw*>(from)[at]);
}

template <int WORDS>
static __device__ __forceinline__ void store_words(void* to, const uint32_t (&words)[WORDS]) {
    if constexpr (WORDS % 4 == 0) {
#pragma unroll
        for (int index = 0; index < WORDS; index += 4) {
            store_packet(static_cast<uint32_t*>(to) + index,
                         {{words[index], words[index + 1], words[index + 2], words[index + 3]}});
        }
    } else {
        struct alignas(4 * WORDS) Words {
            uint32_t words[WORDS];
        } value;
#pragma unroll
        for (int index = 0; index < WORDS; ++index) value.words[index] = words[index];
        *static_cast<Words*>(to) = value;
    }
}

// N values, rounded once to `dtype`, at elements [at, at + N) of `to`, which is aligned to 16 bytes as is N elements.
// float64 reaches the 16-bit types through float32, as it does in PyTorch.
template <int N, class Real>
static __device__ __forceinline__ void store_rounded(Dtype dtype, void* to, int64_t at, const Real (&values)[N]) {
    if (dtype == Dtype::f32) {
        uint32_t words[N];
#pragma unroll
        for (int index = 0; index < N; ++index) words[index] = bits_of(float(values[index]));
        store_words<N>(static_cast<float*>(to) + at, words);
    } else if (dtype == Dtype::f64) {
        uint32_t words[2 * N];
#pragma unroll
        for (int index = 0; index < N; ++index) {
            const double value = values[index];
            uint64_t bits;
            memcpy(&bits, &value, sizeof bits);
            words[2 * index] = uint32_t(bits);
            words[2 * index + 1] = uint32_t(bits >> 32);
        }
        store_words<2 * N>(static_cast<double*>(to) + at, words);
    } else {
        uint32_t words[N / 2];
#pragma unroll
        for (int index = 0; index < N; index += 2) {
            const float low = float(values[index]), high = float(values[index + 1]);
            words[index / 2] = dtype == Dtype::bf16 ? bf16_of_float(low) | uint32_t(bf16_of_float(high)) << 16
                                                    : half_of_float(low) | uint32_t(half_of_float(high)) << 16;
        }
        store_words<N / 2>(static_cast<uint16_t*>(to) + at, words);
    }
}

template <class Real>
static __device__ __forceinline__ void store_element(Dtype dtype, void* to, int64_t at, Real value) {
    switch (dtype) {
        case Dtype::f32:
            static_cast<float*>(to)[at] = float(value);
            break;
        case Dtype::f64:
            static_cast<double*>(to)[at] = double(value);
            break;
        case Dtype::bf16:
            static_cast<uint16_t*>(to)[at] = bf16_of_float(float(value));
            break;
        case Dtype::f16:
            static_cast<uint16_t*>(to)[at] = half_of_float(float(value));
            break;
    }
}

// Calls the function object with the storage type as a literal.
template <class Function>
static __device__ __forceinline__ void with_storage(Dtype dtype, const Function& function) {
    switch (dtype) {
        case Dtype::f32:
            return function(std::integral_constant<Dtype, Dtype::f32>{});
        case Dtype::bf16:
            return function(std::integral_constant<Dtype, Dtype::bf16>{});
        case Dtype::f16:
            return function(std::integral_constant<Dtype, Dtype::f16>{});
        case Dtype::f64:
            return function(std::integral_constant<Dtype, Dtype::f64>{});
    }
}

}  // namespace awd::cuda
