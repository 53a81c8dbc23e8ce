// One block of groups from its elements to its merged elements, for one instruction set; merge_rows.cpp includes it
// through foreach_isa.h.
//
// The block's Gram matrices, all iterations on them and its combination run while its elements are in the cache, and
// the next block is fetched beside the iterations.

#include "column_products.h"
#include "converge_lanes.h"
#include "iterate.h"
#include "products.h"
#include "weighted_sum.h"

// G of the groups [first, last).
template <class Real>
static inline void merge_gram(const MergeJob& job, int64_t first, int64_t last, double* room) {
    const int64_t square = int64_t(job.in.k) * job.in.k, size = job.shape.size();
    double* out = job.gram + first * square;
    if (job.shape.by_column) {
        return sum_columns<Real>(job.in, job.shape, first, last - first, 0, size, out, square, room);
    }
    for (int64_t group = first; group < last; ++group, out += square) {
        sum_elements<Real>(job.in, group * size, (group + 1) * size, 0, out, room);
    }
}

// The weight of model j in a group: factor_j - sum(factors) a_j.
template <class Real>
static inline void merge_weights(const MergeJob& job, int64_t group, int64_t stride, Real* weights) {
    const int k = job.in.k;
    const double* a = job.coefficients + group * k;
    double sum = 0.0;
    for (int j = 0; j < k; ++j) sum += job.factors[j];
    for (int j = 0; j < k; ++j) weights[j * stride] = Real(job.factors[j] - sum * a[j]);
}

template <class Real>
static inline void merge_combine(const MergeJob& job, int64_t first, int64_t last, double* room) {
    const bool by_column = job.shape.by_column;
    const int64_t columns = job.shape.columns;
    Real* weights = reinterpret_cast<Real*>(room);  // [K], or [K][block]
    Real* work = reinterpret_cast<Real*>(room + weight_numbers(job.in, job.shape, job.block));
    const WeightedSum to{job.in, job.out_dtype, job.out, job.streaming, by_column ? job.block : 1, by_column ? 1 : 0};
    if (by_column) {
        for (int64_t group = first; group < last; ++group) {
            merge_weights(job, group, job.block, weights + (group - first));
        }
        for (int64_t row = 0; row < job.shape.rows; ++row) {
            combine_chunk<Real>(to, row * columns + first, last - first, weights, work);
        }
    } else {
        for (int64_t group = first; group < last; ++group) {
            merge_weights(job, group, 1, weights);
            for (int64_t at = 0; at < columns; at += CHUNK) {
                combine_chunk<Real>(to, group * columns + at, std::min(CHUNK, columns - at), weights, work);
            }
        }
    }
    if (job.streaming) settle();
}

// Fetches the row groups of the block after [first, last), `steps` times a part.
static inline Fetcher next_block(const MergeJob& job, int64_t last, int64_t steps, const char** streams) {
    Fetcher fetcher;
    const int64_t groups = std::min(job.block, job.shape.rows - last);
    const int64_t bytes = groups * job.shape.columns * size_of(job.in.dtype);
    const int count = job.in.base != nullptr ? job.in.k + 1 : job.in.k;
    if (job.shape.by_column || groups <= 0 || bytes * count > FETCHED_BYTES) return fetcher;
    for (int j = 0; j < count; ++j) {
        streams[j] = address(j < job.in.k ? job.in.models[j] : job.in.base, job.in.dtype, last * job.shape.columns);
    }
    fetcher.streams = streams;
    fetcher.count = count;
    fetcher.bytes = bytes;
    fetcher.lines = (count * ((bytes + 63) / 64) + steps - 1) / steps;
    return fetcher;
}

template <class Real>
static inline void merge_groups(const MergeJob& job, int64_t item, double* room) {
    const int64_t first = item * job.block, last = std::min(first + job.block, job.shape.groups());
    const char** streams = reinterpret_cast<const char**>(room);  // [K + 1]
    room += job.in.k + 1 + (7 - job.in.k % 8);                    // to the next cache line
    merge_gram<Real>(job, first, last, room);
    if (job.converging) {
        const int64_t at = item - job.converge.first_item, entries = converge_entries(job.converge.options);
        next_block(job, last, 1, streams).fetch();
        converge_groups(job.converge, first, last, job.converge.histories + at * entries,
                        job.converge.lengths + at * WAYS, room);
    } else {
        const int64_t batches = (last - first + LANES - 1) / LANES, entries = job.sgd.stretch;
        Fetcher fetcher = next_block(job, last, batches * entries, streams);
        double* history = job.sgd.histories + (item - job.sgd.first_item) * entries;
        sgd_groups(job.sgd, first, last, history, nullptr, room, fetcher);
    }
    merge_combine<Real>(job, first, last, room);
}

static void merge_block(const MergeJob& job, int64_t item, double* room) {
    job.in.dtype == Dtype::f64 ? merge_groups<double>(job, item, room) : merge_groups<float>(job, item, room);
}
