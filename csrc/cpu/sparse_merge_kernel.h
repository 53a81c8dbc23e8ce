// Elections and masked sums over a stretch of memory, for one instruction set; sparse_merge.cpp includes it through
// foreach_isa.h.
//
// Each step goes through memory of the first-level cache to the next. So the compiler cannot contract a product and a
// sum into one operation, and every instruction set rounds, and therefore elects, alike.

#include "drop.h"

// Sums of one block [CHUNK]: of positive and of negative elements and of their models' weights; the votes' balance.
template <class Real>
struct Tally {
    Real *positive, *negative, *positive_weight, *negative_weight, *balance;

    explicit Tally(Real* room)
        : positive(room),
          negative(room + CHUNK),
          positive_weight(room + 2 * CHUNK),
          negative_weight(room + 3 * CHUNK),
          balance(room + 4 * CHUNK) {}
};

static inline int64_t sparse_merge_numbers(const Drop& how, int64_t k) {
    return 8 * CHUNK + words_numbers() + rank_numbers(how, k);
}

template <class Real>
AWD_INLINE void clear(int64_t count, Real* sums) {
    for (int64_t e = 0; e < count; ++e) sums[e] = Real(0);
}

template <class Real>
AWD_INLINE void add_all(const Real* __restrict v, int64_t count, Real* __restrict sums) {
    for (int64_t e = 0; e < count; ++e) sums[e] += v[e];
}

// A NaN counts on either side, so that it shows whatever is elected.
template <class Real>
AWD_INLINE void add_by_sign(const Real* __restrict v, int64_t count, Real* __restrict positive,
                            Real* __restrict negative) {
    for (int64_t e = 0; e < count; ++e) {
        positive[e] += v[e] <= Real(0) ? Real(0) : v[e];
        negative[e] += v[e] >= Real(0) ? Real(0) : v[e];
    }
}

template <class Real>
AWD_INLINE void add_weights(const Real* __restrict v, Real weight, int64_t count, Real* __restrict positive,
                            Real* __restrict negative) {
    for (int64_t e = 0; e < count; ++e) {
        positive[e] += v[e] > Real(0) ? weight : Real(0);
        negative[e] += v[e] < Real(0) ? weight : Real(0);
    }
}

template <class Real>
AWD_INLINE void add_votes(const Real* __restrict v, int64_t count, Real* __restrict balance) {
    for (int64_t e = 0; e < count; ++e) {
        balance[e] += (v[e] > Real(0) ? Real(1) : Real(0)) - (v[e] < Real(0) ? Real(1) : Real(0));
    }
}

// The sums of the elected sign to `positive`, and where they are normalised those of its weights to `positive_weight`.
template <class Real>
AWD_INLINE void elect(const Vote& vote, int64_t count, const Tally<Real>& tally) {
    if (vote.election == Election::sum) {
        for (int64_t e = 0; e < count; ++e) tally.balance[e] = tally.positive[e] + tally.negative[e];
    }
#pragma GCC ivdep
    for (int64_t e = 0; e < count; ++e) {
        tally.positive[e] = tally.balance[e] >= Real(0) ? tally.positive[e] : tally.negative[e];
    }
    if (!vote.normalize) return;
#pragma GCC ivdep
    for (int64_t e = 0; e < count; ++e) {
        const Real sum = tally.balance[e] >= Real(0) ? tally.positive_weight[e] : tally.negative_weight[e];
        tally.positive_weight[e] = sum == Real(0) ? Real(1) : sum;
    }
}

template <class Real>
AWD_INLINE void tally_block(const SparseMergeJob& job, int model, int64_t count, const Real* v,
                            const Tally<Real>& tally) {
    if (job.vote.election == Election::none) return add_all(v, count, tally.positive);
    add_by_sign(v, count, tally.positive, tally.negative);
    if (job.vote.normalize) {
        add_weights(v, Real(job.weights[model]), count, tally.positive_weight, tally.negative_weight);
    }
    if (job.vote.election == Election::count) add_votes(v, count, tally.balance);
}

// sum [count] = scale * the elected sums / their divisors.
template <class Real>
AWD_INLINE void scale_block(const Vote& vote, int64_t count, const Tally<Real>& tally) {
    Real* const sum = tally.positive;
    const Real divisor = Real(vote.divisor), scale = Real(vote.scale);
    if (vote.normalize && vote.election == Election::none) {
        for (int64_t e = 0; e < count; ++e) sum[e] /= divisor;
    } else if (vote.normalize) {
#pragma GCC ivdep
        for (int64_t e = 0; e < count; ++e) sum[e] /= tally.positive_weight[e];
    }
    for (int64_t e = 0; e < count; ++e) sum[e] *= scale;
}

template <class Stored, class Real>
static void merge_block(const SparseMergeJob& job, int64_t at, int64_t count, const int32_t* ranked, double* room) {
    const Tensors& in = job.in;
    const Tally<Real> tally(reinterpret_cast<Real*>(room));
    Real* v = reinterpret_cast<Real*>(room + 5 * CHUNK);
    Stored* rooms = reinterpret_cast<Stored*>(room + 6 * CHUNK);
    uint32_t* words = reinterpret_cast<uint32_t*>(room + 8 * CHUNK);
    for (int sums = 0; sums < 5; ++sums) clear(count, tally.positive + sums * CHUNK);
    const Stored* origin = nullptr;
    if (in.base != nullptr) {
        fetch_ahead(in.base, in.dtype, at, count, job.size);
        origin = stored_block(in.base, in.dtype, at, count, rooms);
    }
    for (int model = 0; model < in.k; ++model) {
        fetch_ahead(in.models[model], in.dtype, at, count, job.size);
        const Stored* own = stored_block(in.models[model], in.dtype, at, count, rooms + CHUNK);
        const Real factor = Real(job.factors[model]);
        if (job.drop.thresholds == nullptr && job.drop.chances == nullptr) {
            differences(origin, own, count, factor, v);
        } else {
            differences(origin, own, count, Real(1), v);
            drop(job.drop, model, at, count, ranked, words, v);
            for (int64_t e = 0; e < count; ++e) v[e] *= factor;
        }
        tally_block(job, model, count, v, tally);
    }
    if (job.vote.election != Election::none) elect(job.vote, count, tally);
    scale_block(job.vote, count, tally);
    Real* const sum = tally.positive;
    if (origin != nullptr) {
        for (int64_t e = 0; e < count; ++e) sum[e] += value_of(origin[e]);
    }
    void* const out = static_cast<char*>(job.out) + at * size_of(job.out_dtype);
    if (!job.streaming) return round_block(job.out_dtype, count, sum, out);
    const bool rounded = size_of(job.out_dtype) != sizeof(Real);
    if (rounded) round_block(job.out_dtype, count, sum, v);
    stream_block(out, rounded ? v : sum, count * size_of(job.out_dtype));
}

template <class Stored, class Real>
static inline void merge_stretch(const SparseMergeJob& job, int64_t item, double* room) {
    const int64_t begin = item * job.stretch, end = begin + job.stretch < job.size ? begin + job.stretch : job.size;
    each_block<Stored, Real>(job, begin, end, room, &merge_block<Stored, Real>);
    if (job.streaming) settle();
}

static void sparse_merge_item(const SparseMergeJob& job, int64_t item, double* room) {
    switch (job.in.dtype) {
        case Dtype::f64:
            return merge_stretch<double, double>(job, item, room);
        case Dtype::bf16:
            return merge_stretch<Bf16, float>(job, item, room);
        default:
            return merge_stretch<float, float>(job, item, room);
    }
}
