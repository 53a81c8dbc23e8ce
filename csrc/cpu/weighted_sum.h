// base + sum_j w_j t_j over a stretch of memory, for one instruction set.

#include "../number.h"
#include "storage.h"

#ifndef AWD_WEIGHTED_SUM
#define AWD_WEIGHTED_SUM

// bfloat16 is read as it is stored: widening it costs nothing beside the sum, where a copy would cost another pass.
struct Bf16 {
    uint16_t bits;
};
AWD_INLINE float value_of(Bf16 stored) { return float_of_bf16(stored.bits); }
AWD_INLINE float value_of(float stored) { return stored; }
AWD_INLINE double value_of(double stored) { return stored; }

// sum[e] += w_0 t_0[e] + ... in the order of the models; FIRST: the sum starts from 0. stride: from one weight to that
// of the next element, 0 where a row shares it.
template <int COUNT, class Stored, class Real>
AWD_INLINE void add_weighted(const Stored* origin, const Stored* const* models, const Real* const* weights,
                             int64_t stride, int64_t count, bool first, Real* sum) {
    const Stored* m[COUNT];
    const Real* w[COUNT];
    for (int j = 0; j < COUNT; ++j) {
        m[j] = models[j];
        w[j] = weights[j];
    }
#pragma GCC ivdep
    for (int64_t e = 0; e < count; ++e) {
        Real total = first ? Real(0) : sum[e];
        for (int j = 0; j < COUNT; ++j) {
            const Real model = value_of(m[j][e]);
            total += w[j][stride * e] * (origin == nullptr ? model : model - value_of(origin[e]));
        }
        sum[e] = total;
    }
}

template <int COUNT, class Stored, class Real>
AWD_INLINE void add_models(const Stored* origin, const Stored* const* models, const Real* const* weights,
                           int64_t stride, int64_t count, bool first, Real* sum) {
    // Each case with its constants in place, so that every inner loop is free of conditions.
    const Stored* const none = nullptr;
    if (stride != 0) {
        origin != nullptr ? add_weighted<COUNT>(origin, models, weights, 1, count, first, sum)
                          : add_weighted<COUNT>(none, models, weights, 1, count, first, sum);
    } else {
        origin != nullptr ? add_weighted<COUNT>(origin, models, weights, 0, count, first, sum)
                          : add_weighted<COUNT>(none, models, weights, 0, count, first, sum);
    }
}

// The elements themselves where they are stored as Stored, else copies of them as Stored in `room`.
AWD_INLINE const Bf16* stored_block(const void* source, Dtype, int64_t offset, int64_t, Bf16*) {
    return static_cast<const Bf16*>(source) + offset;
}
template <class Real>
AWD_INLINE const Real* stored_block(const void* source, Dtype dtype, int64_t offset, int64_t count, Real* room) {
    return load_block(source, dtype, offset, count, room);
}

// Where weighted sums go, and from where. across: from one model's weight to the next; stride: from one element's to
// the next, 0 where a row shares them.
struct WeightedSum {
    const Tensors& in;
    Dtype out_dtype;
    void* out;
    bool streaming;  // past the caches
    int64_t across, stride;
};

// sum [count] = base + sum_j w_j t_j of the elements [at, at + count) of memory. room: (1 + TOGETHER) * CHUNK.
template <class Stored, class Real>
static inline void sum_chunk(const WeightedSum& to, int64_t at, int64_t count, const Real* weight, Real* sum,
                             Stored* room) {
    const Tensors& in = to.in;
    const Stored* origin = nullptr;
    if (in.base != nullptr) origin = stored_block(in.base, in.dtype, at, count, room);
    int together;
    for (int first = 0; first < in.k; first += together) {
        const int left = in.k - first;
        together = left >= TOGETHER ? TOGETHER : left >= 4 ? 4 : left;
        const Stored* models[TOGETHER] = {};
        const Real* weights[TOGETHER] = {};
        for (int j = 0; j < together; ++j) {
            models[j] = stored_block(in.models[first + j], in.dtype, at, count, room + (1 + j) * CHUNK);
            weights[j] = weight + (first + j) * to.across;
        }
        switch (together) {
            case TOGETHER:
                add_models<TOGETHER>(origin, models, weights, to.stride, count, first == 0, sum);
                break;
            case 4:
                add_models<4>(origin, models, weights, to.stride, count, first == 0, sum);
                break;
            case 3:
                add_models<3>(origin, models, weights, to.stride, count, first == 0, sum);
                break;
            case 2:
                add_models<2>(origin, models, weights, to.stride, count, first == 0, sum);
                break;
            default:
                add_models<1>(origin, models, weights, to.stride, count, first == 0, sum);
        }
    }
    if (origin != nullptr) {
        for (int64_t e = 0; e < count; ++e) sum[e] += value_of(origin[e]);
    }
}

AWD_INLINE void sum_stored(const WeightedSum& to, int64_t at, int64_t count, const double* weight, double* sum,
                           double* room) {
    sum_chunk(to, at, count, weight, sum, room);
}
AWD_INLINE void sum_stored(const WeightedSum& to, int64_t at, int64_t count, const float* weight, float* sum,
                           float* room) {
    if (to.in.dtype == Dtype::bf16) {
        sum_chunk(to, at, count, weight, sum, reinterpret_cast<Bf16*>(room));
    } else {
        sum_chunk(to, at, count, weight, sum, room);
    }
}

// Elements [at, at + count) of memory, at most CHUNK and all in one row. weight: that of the first element for model 0.
// room: (2 + TOGETHER) * CHUNK.
template <class Real>
static inline void combine_chunk(const WeightedSum& to, int64_t at, int64_t count, const Real* weight, Real* room) {
    Real* sum = room;  // [CHUNK]
    sum_stored(to, at, count, weight, sum, room + CHUNK);
    void* const out = static_cast<char*>(to.out) + at * size_of(to.out_dtype);
    if (!to.streaming) return round_block(to.out_dtype, count, sum, out);
    const bool rounded = size_of(to.out_dtype) != sizeof(Real);
    if (rounded) round_block(to.out_dtype, count, sum, room + CHUNK);
    stream_block(out, rounded ? room + CHUNK : sum, count * size_of(to.out_dtype));
}

#endif
