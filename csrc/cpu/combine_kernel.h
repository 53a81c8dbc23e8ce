// One stretch of memory of the combination, for one instruction set; combine.cpp includes it through foreach_isa.h.

#include "weighted_sum.h"

// One item: STRETCH elements of memory, cut at the ends of rows.
template <class Real>
static inline void combine_stretch(const CombineJob& job, int64_t item, double* room) {
    const int64_t columns = job.shape.columns;
    const int64_t total = job.shape.rows * columns;
    const int64_t end = (item + 1) * STRETCH < total ? (item + 1) * STRETCH : total;
    const bool by_column = job.shape.by_column;
    const WeightedSum to{job.in, job.out_dtype, job.out, job.streaming, by_column ? columns : 1, by_column ? 1 : 0};
    const Real* weights = static_cast<const Real*>(job.weights);
    for (int64_t at = item * STRETCH; at < end;) {
        const int64_t row = at / columns, column = at % columns;
        int64_t count = columns - column < CHUNK ? columns - column : CHUNK;
        if (count > end - at) count = end - at;
        const Real* weight = by_column ? weights + column : weights + row * job.in.k;
        combine_chunk<Real>(to, at, count, weight, reinterpret_cast<Real*>(room));
        at += count;
    }
    if (job.streaming) settle();
}

static void combine_item(const CombineJob& job, int64_t item, double* room) {
    job.in.dtype == Dtype::f64 ? combine_stretch<double>(job, item, room) : combine_stretch<float>(job, item, room);
}
