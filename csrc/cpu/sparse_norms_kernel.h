// Sums of |t| before and after elements are left out, over a stretch of memory, for one instruction set;
// sparse_norms.cpp includes it through foreach_isa.h.
//
// Sums are kept in 8 lanes whatever the instruction set, so each set adds in the same order.

#include "drop.h"

static inline int64_t sparse_norms_numbers(const Drop& how, int64_t k) {
    return 2 * k * SUM_LANES + 3 * CHUNK + words_numbers() + rank_numbers(how, k);
}

// sums [8] += |t|, element e in lane e % 8.
template <class Real>
AWD_INLINE void add_magnitudes(const Real* t, int64_t count, double* sums) {
    double lanes[SUM_LANES];
    std::memcpy(lanes, sums, sizeof lanes);
    int64_t e = 0;
    for (; e + SUM_LANES <= count; e += SUM_LANES) {
#pragma GCC unroll 8
        for (int lane = 0; lane < SUM_LANES; ++lane) lanes[lane] += double(std::fabs(t[e + lane]));
    }
    for (int lane = 0; e < count; ++e, ++lane) lanes[lane] += double(std::fabs(t[e]));
    std::memcpy(sums, lanes, sizeof lanes);
}

// room: sums [K, 2, 8] of the whole item, then blocks.
template <class Stored, class Real>
static void norms_of_block(const SparseNormsJob& job, int64_t at, int64_t count, const int32_t* ranked, double* room) {
    const Tensors& in = job.in;
    double* const sums = room;
    room += 2 * int64_t(in.k) * SUM_LANES;
    Real* t = reinterpret_cast<Real*>(room);
    Stored* rooms = reinterpret_cast<Stored*>(room + CHUNK);
    uint32_t* words = reinterpret_cast<uint32_t*>(room + 3 * CHUNK);
    const Stored* origin = nullptr;
    if (in.base != nullptr) origin = stored_block(in.base, in.dtype, at, count, rooms);
    for (int model = 0; model < in.k; ++model) {
        fetch_ahead(in.models[model], in.dtype, at, count, job.size);
        double* own = sums + 2 * model * SUM_LANES;
        differences(origin, stored_block(in.models[model], in.dtype, at, count, rooms + CHUNK), count, Real(1), t);
        add_magnitudes(t, count, own);
        drop(job.drop, model, at, count, ranked, words, t);
        add_magnitudes(t, count, own + SUM_LANES);
    }
}

template <class Stored, class Real>
static inline void norms_of_stretch(const SparseNormsJob& job, int64_t item, double* room) {
    double* sums = room + rank_numbers(job.drop, job.in.k);
    for (int64_t index = 0; index < 2 * int64_t(job.in.k) * SUM_LANES; ++index) sums[index] = 0.0;
    const int64_t begin = item * job.stretch, end = begin + job.stretch < job.size ? begin + job.stretch : job.size;
    each_block<Stored, Real>(job, begin, end, room, &norms_of_block<Stored, Real>);
    for (int64_t index = 0; index < 2 * int64_t(job.in.k); ++index) {
        double sum = 0.0;
        for (int lane = 0; lane < SUM_LANES; ++lane) sum += sums[index * SUM_LANES + lane];
        job.partial[item * 2 * job.in.k + index] = sum;
    }
}

static void sparse_norms_item(const SparseNormsJob& job, int64_t item, double* room) {
    switch (job.in.dtype) {
        case Dtype::f64:
            return norms_of_stretch<double, double>(job, item, room);
        case Dtype::bf16:
            return norms_of_stretch<Bf16, float>(job, item, room);
        default:
            return norms_of_stretch<float, float>(job, item, room);
    }
}
