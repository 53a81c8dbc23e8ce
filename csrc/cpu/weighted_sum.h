// base + sum_j w_j t_j over a stretch of memory, for one instruction set.

#include "../number.h"
#include "storage.h"

#ifndef AWD_WEIGHTED_SUM
#define AWD_WEIGHTED_SUM

// sum[e] += w_0 t_0[e] + ... in the order of the models; FIRST: the sum starts from 0. stride: from one weight to that
// of the next element, 0 where a row shares it.
template <int COUNT, class Real>
AWD_INLINE void add_weighted(const Real* origin, const Real* const* models, const Real* const* weights, int64_t stride,
                             int64_t count, bool first, Real* sum) {
    const Real* m[COUNT];
    const Real* w[COUNT];
    for (int j = 0; j < COUNT; ++j) {
        m[j] = models[j];
        w[j] = weights[j];
    }
#pragma GCC ivdep
    for (int64_t e = 0; e < count; ++e) {
        Real total = first ? Real(0) : sum[e];
        for (int j = 0; j < COUNT; ++j) {
            const Real vector = origin == nullptr ? m[j][e] : m[j][e] - origin[e];
            total += w[j][stride * e] * vector;
        }
        sum[e] = total;
    }
}

template <int COUNT, class Real>
AWD_INLINE void add_models(const Real* origin, const Real* const* models, const Real* const* weights, int64_t stride,
                           int64_t count, bool first, Real* sum) {
    // Each case with its constants in place, so that every inner loop is free of conditions.
    if (stride != 0) {
        origin != nullptr ? add_weighted<COUNT>(origin, models, weights, 1, count, first, sum)
                          : add_weighted<COUNT>((const Real*)nullptr, models, weights, 1, count, first, sum);
    } else {
        origin != nullptr ? add_weighted<COUNT>(origin, models, weights, 0, count, first, sum)
                          : add_weighted<COUNT>((const Real*)nullptr, models, weights, 0, count, first, sum);
    }
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

// Elements [at, at + count) of memory, at most CHUNK and all in one row. weight: that of the first element for model 0.
// room: (2 + TOGETHER) * CHUNK.
template <class Real>
static inline void combine_chunk(const WeightedSum& to, int64_t at, int64_t count, const Real* weight, Real* room) {
    const Tensors& in = to.in;
    Real* sum = room;  // [CHUNK]
    const Real* origin = nullptr;
    if (in.base != nullptr) origin = load_block(in.base, in.dtype, at, count, room + CHUNK);
    int together;
    for (int first = 0; first < in.k; first += together) {
        const int left = in.k - first;
        together = left >= TOGETHER ? TOGETHER : left >= 4 ? 4 : left;
        const Real* models[TOGETHER] = {};
        const Real* weights[TOGETHER] = {};
        for (int j = 0; j < together; ++j) {
            models[j] = load_block(in.models[first + j], in.dtype, at, count, room + (2 + j) * CHUNK);
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
        for (int64_t e = 0; e < count; ++e) sum[e] += origin[e];
    }
    void* const out = static_cast<char*>(to.out) + at * size_of(to.out_dtype);
    if (!to.streaming) return round_block(to.out_dtype, count, sum, out);
    const bool rounded = size_of(to.out_dtype) != sizeof(Real);
    if (rounded) round_block(to.out_dtype, count, sum, room + CHUNK);
    stream_block(out, rounded ? room + CHUNK : sum, count * size_of(to.out_dtype));
}

#endif
