// Task vectors of a block without the elements that are left out (awd::Drop), for one instruction set.

#include "magnitudes.h"
#include "philox.h"

#ifndef AWD_DROP
#define AWD_DROP

static inline int64_t words_numbers() { return CHUNK / 2 + PHILOX_TILE; }

template <class Key, class Real>
AWD_INLINE void keep_between(Key least, Key end, int64_t count, Real* __restrict t) {
    for (int64_t e = 0; e < count; ++e) {
        const Key key = key_of(t[e]);
        t[e] = (key >= least) & (key < end) ? t[e] : Real(0);
    }
}

// Of t [count], whose first element is at `position`, what lies between two cuts [2].
template <class Real>
AWD_INLINE void keep_between_cuts(const double* thresholds, const int64_t* limits, int64_t position, int64_t count,
                                  Real* t) {
    const auto most = key_of(Real(thresholds[0])), least = key_of(Real(thresholds[1]));
    // Elements at a threshold are before the cut or behind it by their position: within each part, all alike.
    for (int64_t begin = 0; begin < count;) {
        const int64_t here = position + begin;
        int64_t part = count - begin;
        for (int cut = 0; cut < 2; ++cut) {
            if (limits[cut] > here && limits[cut] - here < part) part = limits[cut] - here;
        }
        keep_between<decltype(+most)>(least + (here >= limits[1]), most + (here >= limits[0]), part, t + begin);
        begin += part;
    }
}

// chances: of each element, or (stride 0) of all.
template <class Real>
AWD_INLINE void keep_by_chance(const uint32_t* __restrict words, const int32_t* __restrict chances, int64_t stride,
                               int64_t count, Real* __restrict t) {
    if (stride == 0) {
        const int32_t chance = *chances;
        for (int64_t e = 0; e < count; ++e) t[e] = int32_t(words[e] >> 1) <= chance ? t[e] : Real(0);
    } else {
        for (int64_t e = 0; e < count; ++e) t[e] = int32_t(words[e] >> 1) <= chances[e] ? t[e] : Real(0);
    }
}

constexpr int RANK_BITS = 8;
constexpr int RANK_BINS = 1 << RANK_BITS;
constexpr int64_t INSERTED = 32;  // fewer elements are sorted by insertion

static inline bool by_rank(const Drop& how) { return how.chances != nullptr && how.columns > 1; }

// order [columns]: the places of a row's elements from the smallest key up, equal ones in a row's order. other: room.
template <class Key>
static inline void rank_row(const Key* keys, int64_t columns, int32_t* order, int32_t* other) {
    if (columns <= INSERTED) {
        for (int64_t c = 0; c < columns; ++c) {
            int64_t at = c;
            for (; at > 0 && keys[order[at - 1]] > keys[c]; --at) order[at] = order[at - 1];
            order[at] = int32_t(c);
        }
        return;
    }
    // Digit by digit from the lowest, an even number of times, so that the result is in `order`.
    for (int64_t c = 0; c < columns; ++c) order[c] = int32_t(c);
    for (int shift = 0; shift < int(sizeof(Key)) * 8; shift += RANK_BITS) {
        int64_t starts[RANK_BINS] = {}, start = 0;
        for (int64_t c = 0; c < columns; ++c) ++starts[(keys[c] >> shift) & (RANK_BINS - 1)];
        for (int bin = 0; bin < RANK_BINS; ++bin) {
            const int64_t count = starts[bin];
            starts[bin] = start;
            start += count;
        }
        for (int64_t c = 0; c < columns; ++c) {
            other[starts[(keys[order[c]] >> shift) & (RANK_BINS - 1)]++] = order[c];
        }
        int32_t* const sorted = other;
        other = order;
        order = sorted;
    }
}

static inline int64_t rank_numbers(const Drop& how, int64_t k) {
    return by_rank(how) ? (k * how.columns + 1) / 2 + 2 * how.columns + 2 * CHUNK + 2 : 0;
}

// chances [K, columns]: those of the elements of the row that begins at `at`. room: rank_numbers, of which they are the
// first.
template <class Stored, class Real>
static inline const int32_t* row_chances(const Tensors& in, const Drop& how, int64_t at, double* room) {
    using Key = decltype(key_of(Real()));
    const int64_t columns = how.columns;
    int32_t* chances = reinterpret_cast<int32_t*>(room);
    room += (in.k * columns + 1) / 2;
    Key* keys = reinterpret_cast<Key*>(room);
    int32_t* order = reinterpret_cast<int32_t*>(room + columns);
    Stored* rooms = reinterpret_cast<Stored*>(room + 2 * columns + 1);
    for (int model = 0; model < in.k; ++model) {
        for (int64_t c = 0; c < columns; c += CHUNK) {
            const int64_t count = columns - c < CHUNK ? columns - c : CHUNK;
            const Stored* origin = nullptr;
            if (in.base != nullptr) origin = stored_block(in.base, in.dtype, at + c, count, rooms);
            keys_of(origin, stored_block(in.models[model], in.dtype, at + c, count, rooms + CHUNK), count, keys + c);
        }
        rank_row(keys, columns, order, order + columns);
        for (int64_t rank = 0; rank < columns; ++rank) {
            chances[model * columns + order[rank]] = how.chances[model * columns + rank];
        }
    }
    return chances;
}

// Leaves out of t [count] of one model what is not kept; `at` is the first element's place in the tensor. ranked: what
// row_chances found of the row, where chances are by rank. words: room.
template <class Real>
AWD_INLINE void drop(const Drop& how, int model, int64_t at, int64_t count, const int32_t* ranked, uint32_t* words,
                     Real* t) {
    const int64_t position = how.offset + at;
    if (how.thresholds != nullptr) {
        keep_between_cuts(how.thresholds + 2 * model, how.limits + 2 * model, position, count, t);
    }
    if (how.chances == nullptr) return;
    const uint32_t* own = philox(how.seed, uint32_t(model), position, count, words);
    if (ranked != nullptr) {
        keep_by_chance(own, ranked + model * how.columns + at % how.columns, 1, count, t);
    } else {
        keep_by_chance(own, how.chances + model, 0, count, t);
    }
}

// Calls work(job, at, count, ranked, room) for every block of the elements [begin, end) of a job's tensors, which are
// whole rows where chances are by rank. room: rank_numbers, then the work's own.
template <class Stored, class Real, class Job>
static inline void each_block(const Job& job, int64_t begin, int64_t end, double* room,
                              void (*work)(const Job&, int64_t, int64_t, const int32_t*, double*)) {
    const int64_t columns = job.drop.columns;
    double* own = room + rank_numbers(job.drop, job.in.k);
    const int32_t* ranked = nullptr;
    for (int64_t at = begin; at < end;) {
        int64_t left = end - at;
        if (by_rank(job.drop)) {
            if (at % columns == 0) ranked = row_chances<Stored, Real>(job.in, job.drop, at, room);
            left = columns - at % columns;
        }
        const int64_t count = left < CHUNK ? left : CHUNK;
        work(job, at, count, ranked, own);
        at += count;
    }
}

#endif
