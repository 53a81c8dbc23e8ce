// What the kernels ask of the machine: a warp's lanes, 16-byte streams, products of 8 x 8, estimates, launches.
//
// Everything that plain C++ does not have is in this file, so that the tests can run the kernels on a CPU as well.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#include "../kernels.h"

#if !defined(AWD_EMULATED)
#include <cuda_runtime.h>
#endif

namespace awd::cuda {

constexpr unsigned WARP = 32;
constexpr unsigned FULL = 0xffffffffu;

// 16 bytes as they are stored.
struct alignas(16) Packet {
    uint32_t words[4];
};

#if defined(AWD_EMULATED)

using Stream = void*;
inline double near_reciprocal(double x) { return double(float(1.0 / x)); }
inline double near_inverse_root(double x) { return double(float(1.0 / std::sqrt(x))); }
inline Packet load_packet(const void* from) {
    if (reinterpret_cast<uintptr_t>(from) % 16 != 0) emulation::fail("a packet is not aligned");
    return *static_cast<const Packet*>(from);
}
inline void store_packet(void* to, const Packet& packet) {
    if (reinterpret_cast<uintptr_t>(to) % 16 != 0) emulation::fail("a packet is not aligned");
    *static_cast<Packet*>(to) = packet;
}
inline void keep_unknown(float&) {}
inline void keep_unknown(unsigned&) {}
inline void forget_memory() {}
inline uint16_t half_of_float(float value) {
    _Float16 half = _Float16(value);
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}
inline float float_of_half(uint16_t bits) {
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return float(half);
}
template <class T>
T* shared_memory() {
    const uintptr_t at = reinterpret_cast<uintptr_t>(emulation::block.shared.data());
    return reinterpret_cast<T*>((at + 15) / 16 * 16);
}
inline void multiply_tiles(double a, double b, double (&c)[2]) {
    const auto left = emulation::exchange_all(a), right = emulation::exchange_all(b);
    const unsigned lane = threadIdx.x % WARP, i = lane / 4, j = 2 * (lane % 4);
    for (unsigned step = 0; step < 4; ++step) {
        c[0] = std::fma(left.of[4 * i + step], right.of[4 * j + step], c[0]);
        c[1] = std::fma(left.of[4 * i + step], right.of[4 * j + 4 + step], c[1]);
    }
}
template <class... Parameters, class... Arguments>
void launch(const char*, void (*kernel)(Parameters...), int64_t x, int64_t y, unsigned threads, size_t shared, Stream,
            const Arguments&... arguments) {
    if (x > 0 && y > 0) emulation::launch(kernel, unsigned(x), unsigned(y), threads, shared, arguments...);
}

#else

using Stream = cudaStream_t;

// 20 bits or more of 1 / x and of 1 / sqrt(x).
static __device__ __forceinline__ double near_reciprocal(double x) {
    double y;
    asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(y) : "d"(x));
    return y;
}
static __device__ __forceinline__ double near_inverse_root(double x) {
    double y;
    asm("rsqrt.approx.ftz.f64 %0, %1;" : "=d"(y) : "d"(x));
    return y;
}

// Data that is read or written once goes past what will be used again.
static __device__ __forceinline__ Packet load_packet(const void* from) {
    const uint4 value = __ldcs(static_cast<const uint4*>(from));
    return {{value.x, value.y, value.z, value.w}};
}
static __device__ __forceinline__ void store_packet(void* to, const Packet& packet) {
    __stcs(static_cast<uint4*>(to), make_uint4(packet.words[0], packet.words[1], packet.words[2], packet.words[3]));
}

static __device__ __forceinline__ uint16_t half_of_float(float value) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
static __device__ __forceinline__ float float_of_half(uint16_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

// The compiler knows nothing of x from here on, so that it computes nothing of it beforehand.
static __device__ __forceinline__ void keep_unknown(float& x) { asm volatile("" : "+f"(x)); }
static __device__ __forceinline__ void keep_unknown(unsigned& x) { asm volatile("" : "+r"(x)); }
// Nor of what is in memory, so that it keeps none of it in registers.
static __device__ __forceinline__ void forget_memory() { asm volatile("" ::: "memory"); }

template <class T>
__device__ __forceinline__ T* shared_memory() {
    extern __shared__ Packet awd_shared[];
    return reinterpret_cast<T*>(awd_shared);
}

// c += the 8 x 8 products over four elements of eight vectors a and eight vectors b: lane 4 i + e gives element e of
// vectors i, and holds the products of a_i with b_2e and b_2e+1.
static __device__ __forceinline__ void multiply_tiles(double a, double b, double (&c)[2]) {
    asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
                 : "+d"(c[0]), "+d"(c[1])
                 : "d"(a), "d"(b));
}
// A grid of x by y blocks on the caller's stream. Throws std::runtime_error where it cannot be launched.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t x, int64_t y, unsigned threads, size_t shared,
            Stream stream, const Arguments&... arguments) {
    if (x <= 0 || y <= 0) return;
    cudaError_t error = cudaSuccess;
    if (shared > 48 << 10) {
        error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     int(shared));
    }
    if (error == cudaSuccess) {
        std::tuple<Parameters...> values(arguments...);
        std::apply(
            [&](auto&... value) {
                void* pointers[] = {&value...};
                error = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(unsigned(x), unsigned(y)),
                                         dim3(threads), pointers, shared, stream);
            },
            values);
    }
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string("CUDA could not launch ") + name + ": " + cudaGetErrorString(error) +
                                 " (grid " + std::to_string(x) + " x " + std::to_string(y) + ", " +
                                 std::to_string(threads) + " threads, " + std::to_string(shared) + " bytes shared)");
    }
}

#endif

static __device__ __forceinline__ void multiply_tile(double a, double (&c)[2]) { multiply_tiles(a, a, c); }
static __device__ __forceinline__ unsigned lane_index() { return threadIdx.x % WARP; }
static __device__ __forceinline__ bool any_lane(bool mask) { return __any_sync(FULL, mask) != 0; }
static __device__ __forceinline__ double with_sign_of(double x, double by) { return copysign(x, by); }

// The sum over a warp's lanes, the same bits in every lane.
static __device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(FULL, x, mask);
    return x;
}

// A number for each lane of a warp, side by side in memory: a lane sees only its own.
struct Interleaved {
    double lanes[WARP];

    Interleaved() = delete;
    Interleaved(const Interleaved&) = delete;
    __device__ __forceinline__ operator double() const { return lanes[lane_index()]; }
    __device__ __forceinline__ Interleaved& operator=(double value) {
        lanes[lane_index()] = value;
        return *this;
    }
    __device__ __forceinline__ Interleaved& operator=(const Interleaved& other) { return *this = double(other); }
    __device__ __forceinline__ Interleaved& operator+=(double value) { return *this = *this + value; }
    __device__ __forceinline__ Interleaved& operator-=(double value) { return *this = *this - value; }
    __device__ __forceinline__ Interleaved& operator*=(double value) { return *this = *this * value; }
};

// The mathematics of a group, for one lane.
using Number = double;
#include "../group.h"
#include "../small_matrix.h"

}  // namespace awd::cuda
