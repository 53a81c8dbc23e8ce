// base + sum_j w_j t_j over a stretch of memory, for one instruction set; combine.cpp includes it through
// foreach_isa.h.

#include "../number.h"
#include "storage.h"

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

// Elements [at, at + count) of memory, all in one row. weight: that of the first element for model 0.
template <class Real>
static inline void combine_chunk(const CombineJob& job, int64_t at, int64_t count, const Real* weight, Real* room) {
    const int64_t stride = job.shape.by_column ? 1 : 0;
    const int64_t across = job.shape.by_column ? job.shape.columns : 1;  // from one model's weight to the next
    Real* sum = room;                                                    // [CHUNK]
    const Real* origin = nullptr;
    if (job.in.base != nullptr) origin = load_block(job.in.base, job.in.dtype, at, count, room + CHUNK);
    for (int first = 0; first < job.in.k; first += TOGETHER) {
        const int together = job.in.k - first < TOGETHER ? job.in.k - first : TOGETHER;
        const Real* models[TOGETHER] = {};
        const Real* weights[TOGETHER] = {};
        for (int j = 0; j < together; ++j) {
            models[j] = load_block(job.in.models[first + j], job.in.dtype, at, count, room + (2 + j) * CHUNK);
            weights[j] = weight + (first + j) * across;
        }
        switch (together) {
            case 4:
                add_models<4>(origin, models, weights, stride, count, first == 0, sum);
                break;
            case 3:
                add_models<3>(origin, models, weights, stride, count, first == 0, sum);
                break;
            case 2:
                add_models<2>(origin, models, weights, stride, count, first == 0, sum);
                break;
            default:
                add_models<1>(origin, models, weights, stride, count, first == 0, sum);
        }
    }
    if (origin != nullptr) {
        for (int64_t e = 0; e < count; ++e) sum[e] += origin[e];
    }
    store_block(job.out, job.out_dtype, at, count, sum);
}

// One item: STRETCH elements of memory, cut at the ends of rows.
template <class Real>
static inline void combine_stretch(const CombineJob& job, int64_t item, double* room) {
    const int64_t columns = job.shape.columns;
    const int64_t total = job.shape.rows * columns;
    const int64_t end = (item + 1) * STRETCH < total ? (item + 1) * STRETCH : total;
    const Real* weights = static_cast<const Real*>(job.weights);
    for (int64_t at = item * STRETCH; at < end;) {
        const int64_t row = at / columns, column = at % columns;
        int64_t count = columns - column < CHUNK ? columns - column : CHUNK;
        if (count > end - at) count = end - at;
        const Real* weight = job.shape.by_column ? weights + column : weights + row * job.in.k;
        combine_chunk<Real>(job, at, count, weight, reinterpret_cast<Real*>(room));
        at += count;
    }
}

static void combine_item(const CombineJob& job, int64_t item, double* room) {
    job.in.dtype == Dtype::f64 ? combine_stretch<double>(job, item, room) : combine_stretch<float>(job, item, room);
}
