// Values between storage (float32, bfloat16, float16, float64) and the type they are computed in, a block at a time.
//
// Plain integer arithmetic, so that every loop vectorises on every instruction set. Included once per set, as number.h
// is.

#include "../number.h"

#ifndef AWD_STORAGE
#define AWD_STORAGE

AWD_INLINE float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

AWD_INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

AWD_INLINE float float_of_bf16(uint16_t stored) { return float_of(uint32_t(stored) << 16); }

// To the nearest, ties to even; a NaN stays one.
AWD_INLINE uint16_t bf16_of_float(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

AWD_INLINE float float_of_f16(uint16_t stored) {
    const uint32_t bits = uint32_t(stored & 0x7fff) << 13;  // exponent and mantissa in float's places
    // Subnormal in half precision: their spacing 2^-24 is that of the floats from 0.5 on. Otherwise the exponent is 112
    // too small, except that of infinity and NaN, which becomes float's own.
    const float small = float_of(bits_of(0.5f) + (stored & 0x3ff)) - 0.5f;
    const float normal = float_of(bits >= (31u << 23) ? bits | 0x7f800000 : bits + (112u << 23));
    const float value = bits < (1u << 23) ? small : normal;
    return float_of(bits_of(value) | uint32_t(stored & 0x8000) << 16);
}

// To the nearest, ties to even; a NaN stays one, what is too large becomes infinite.
AWD_INLINE uint16_t f16_of_float(float value) {
    const uint32_t bits = bits_of(value) & 0x7fffffff;
    const uint32_t normal = (bits - (112u << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
    // Subnormal in half precision: 0.5 has the spacing 2^-24 that these need, so adding it rounds them.
    const uint32_t small = bits_of(float_of(bits) + 0.5f) - bits_of(0.5f);
    const uint32_t large = bits > 0x7f800000 ? 0x7e00 : 0x7c00;
    const uint32_t half = bits < (113u << 23) ? small : bits >= (143u << 23) ? large : normal;
    return uint16_t(half | (bits_of(value) >> 16 & 0x8000));
}

AWD_INLINE const char* address(const void* source, Dtype dtype, int64_t offset) {
    return static_cast<const char*>(source) + offset * size_of(dtype);
}

// `count` elements from `offset` on as float: the stored ones themselves where they are float32, else copies in `room`.
AWD_INLINE const float* load_block(const void* source, Dtype dtype, int64_t offset, int64_t count, float* room) {
    if (dtype == Dtype::f32) return static_cast<const float*>(source) + offset;
    const uint16_t* stored = static_cast<const uint16_t*>(source) + offset;
    if (dtype == Dtype::bf16) {
        for (int64_t index = 0; index < count; ++index) room[index] = float_of_bf16(stored[index]);
    } else {
        for (int64_t index = 0; index < count; ++index) room[index] = float_of_f16(stored[index]);
    }
    return room;
}

AWD_INLINE const double* load_block(const void* source, Dtype, int64_t offset, int64_t, double*) {
    return static_cast<const double*>(source) + offset;
}

// Rounds `count` values once to `dtype`. float64 reaches the 16-bit types through float32, as it does in PyTorch.
template <class Real>
AWD_INLINE void round_block(Dtype dtype, int64_t count, const Real* __restrict values, void* __restrict target) {
    switch (dtype) {
        case Dtype::f32: {
            float* out = static_cast<float*>(target);
            for (int64_t index = 0; index < count; ++index) out[index] = float(values[index]);
            break;
        }
        case Dtype::f64: {
            double* out = static_cast<double*>(target);
            for (int64_t index = 0; index < count; ++index) out[index] = double(values[index]);
            break;
        }
        case Dtype::bf16: {
            uint16_t* out = static_cast<uint16_t*>(target);
            for (int64_t index = 0; index < count; ++index) out[index] = bf16_of_float(float(values[index]));
            break;
        }
        case Dtype::f16: {
            uint16_t* out = static_cast<uint16_t*>(target);
            for (int64_t index = 0; index < count; ++index) out[index] = f16_of_float(float(values[index]));
            break;
        }
    }
}

// Copies past the caches: whole vectors of memory that will not be read soon are written without being read first.
// settle() makes them visible to other threads.
AWD_INLINE void stream_block(void* target, const void* values, int64_t bytes) {
    char* to = static_cast<char*>(target);
    const char* from = static_cast<const char*>(values);
    const int64_t width = sizeof(Number);
    const int64_t misfit = int64_t(reinterpret_cast<uintptr_t>(to) % 64);
    const int64_t head = misfit == 0 ? 0 : 64 - misfit < bytes ? 64 - misfit : bytes;
    std::memcpy(to, from, size_t(head));
    int64_t at = head;
    for (; at + 64 <= bytes; at += 64) {
        for (int64_t part = at; part < at + 64; part += width) {
            Number vector;
            std::memcpy(&vector, from + part, sizeof vector);
#if AWD_X86 && AWD_VECTOR_LANES == 8
            _mm512_stream_pd(reinterpret_cast<double*>(to + part), (__m512d)vector);
#elif AWD_X86 && AWD_VECTOR_LANES == 4
            _mm256_stream_pd(reinterpret_cast<double*>(to + part), (__m256d)vector);
#elif AWD_X86
            _mm_stream_pd(reinterpret_cast<double*>(to + part), (__m128d)vector);
#else
            std::memcpy(to + part, &vector, sizeof vector);
#endif
        }
    }
    std::memcpy(to + at, from + at, size_t(bytes - at));
}

AWD_INLINE void settle() {
#if AWD_X86
    _mm_sfence();
#endif
}

#endif
