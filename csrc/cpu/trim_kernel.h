// Histograms of one digit of the magnitudes of a stretch of elements, for one instruction set; trim.cpp includes it
// through foreach_isa.h.

#include "magnitudes.h"

static inline int64_t trim_numbers() { return 5 * CHUNK + 16 + SIDE_BY_SIDE * BINS / 2; }

// counts[key >> shift] += 1 for each key.
template <class Key>
AWD_INLINE void count_all(const Key* keys, int64_t count, int shift, uint32_t* counts) {
    int64_t e = 0;
    for (; e + SIDE_BY_SIDE <= count; e += SIDE_BY_SIDE) {
#pragma GCC unroll 4
        for (int side = 0; side < SIDE_BY_SIDE; ++side) ++counts[side * BINS + (keys[e + side] >> shift)];
    }
    for (; e < count; ++e) ++counts[keys[e] >> shift];
}

// The keys with this prefix, in order, to `found`, which has room for 16 more. Returns how many they are.
template <class Key>
AWD_INLINE int64_t matching(const Key* keys, int64_t count, Key prefix, int above, Key* found) {
    int64_t used = 0, e = 0;
#if AWD_X86 && AWD_VECTOR_LANES == 8
    if constexpr (sizeof(Key) == 4) {
        const __m512i wanted = _mm512_set1_epi32(int32_t(prefix));
        const __m128i shift = _mm_cvtsi32_si128(above);
        for (; e + 16 <= count; e += 16) {
            const __m512i key = _mm512_loadu_si512(keys + e);
            const __mmask16 same = _mm512_cmpeq_epi32_mask(_mm512_maskz_srl_epi32(0xffff, key, shift), wanted);
            _mm512_storeu_si512(found + used, _mm512_maskz_compress_epi32(same, key));
            used += __builtin_popcount(same);
        }
    }
#endif
    for (; e < count; ++e) {
        found[used] = keys[e];
        used += (keys[e] >> above) == prefix;
    }
    return used;
}

template <class Key>
struct TrimRoom {
    Key *keys, *found;  // [CHUNK], [CHUNK + 16]
    double* stored;     // base and model
    uint32_t* counts;   // [SIDE_BY_SIDE, BINS]

    explicit TrimRoom(double* room)
        : keys(reinterpret_cast<Key*>(room)),
          found(reinterpret_cast<Key*>(room + CHUNK)),
          stored(room + 2 * CHUNK + 16),
          counts(reinterpret_cast<uint32_t*>(room + 5 * CHUNK + 16)) {}
};

// The keys of elements [at, at + count) of one model.
template <class Stored, class Key>
AWD_INLINE void load_keys(const Tensors& in, int model, int64_t at, int64_t count, const TrimRoom<Key>& room) {
    Stored* rooms = reinterpret_cast<Stored*>(room.stored);
    const Stored* origin = nullptr;
    if (in.base != nullptr) origin = stored_block(in.base, in.dtype, at, count, rooms);
    keys_of(origin, stored_block(in.models[model], in.dtype, at, count, rooms + CHUNK), count, room.keys);
}

// Where the counts of a stretch go: beside those of the others where each is kept, else to the sum of all.
static inline void deliver(const TrimJob& job, int64_t item, int index, const uint32_t* counts, int sides) {
    const int bins = 1 << job.bits;
    uint16_t* each = job.each == nullptr ? nullptr : job.each + (item * job.count + index) * bins;
    for (int bin = 0; bin < bins; ++bin) {
        uint32_t sum = 0;
        for (int side = 0; side < sides; ++side) sum += counts[side * BINS + bin];
        if (each != nullptr) {
            each[bin] = uint16_t(sum);
        } else if (sum != 0) {
            __atomic_fetch_add(&job.counts[index * int64_t(BINS) + bin], int64_t(sum), __ATOMIC_RELAXED);
        }
    }
}

template <class Stored, class Key>
static inline void count_stretch(const TrimJob& job, int64_t item, double* numbers) {
    const TrimRoom<Key> room(numbers);
    const Stretch stretch = job.stretches[item];
    const Tensors& in = job.parameters[stretch.parameter];
    const bool first = job.above == int(sizeof(Key)) * 8 - 1;
    for (int index = 0; index < job.count;) {
        const int model = job.targets[index].model;
        const int cuts = index + 1 < job.count && job.targets[index + 1].model == model ? 2 : 1;
        std::memset(room.counts, 0, size_t(SIDE_BY_SIDE) * BINS * sizeof(uint32_t));
        for (int64_t at = stretch.begin; at < stretch.end; at += CHUNK) {
            const int64_t count = stretch.end - at < CHUNK ? stretch.end - at : CHUNK;
            load_keys<Stored>(in, model, at, count, room);
            if (first) {
                count_all(room.keys, count, job.shift, room.counts);
                continue;
            }
            for (int cut = 0; cut < cuts; ++cut) {
                const Key prefix = Key(job.targets[index + cut].prefix);
                const int64_t used = matching(room.keys, count, prefix, job.above, room.found);
                uint32_t* counts = room.counts + cut * BINS;
                for (int64_t e = 0; e < used; ++e) ++counts[(room.found[e] >> job.shift) & ((1 << job.bits) - 1)];
            }
        }
        for (int cut = 0; cut < cuts; ++cut) {
            deliver(job, item, index + cut, room.counts + (first ? 0 : cut * BINS), first ? SIDE_BY_SIDE : 1);
        }
        index += cuts;
    }
}

static void count_item(const TrimJob& job, int64_t item, double* room) {
    switch (job.parameters[0].dtype) {
        case Dtype::f64:
            return count_stretch<double, int64_t>(job, item, room);
        case Dtype::bf16:
            return count_stretch<Bf16, int32_t>(job, item, room);
        default:
            return count_stretch<float, int32_t>(job, item, room);
    }
}

// place: how far behind a stretch's begin the target's last element at its threshold ends.
template <class Stored, class Key>
static inline void locate(const TrimJob& job, int64_t item, double* numbers) {
    const TrimRoom<Key> room(numbers);
    const Stretch stretch = job.stretches[item];
    const Key wanted = Key(job.targets[0].prefix);
    int64_t left = job.targets[0].left;
    for (int64_t at = stretch.begin; at < stretch.end; at += CHUNK) {
        const int64_t count = stretch.end - at < CHUNK ? stretch.end - at : CHUNK;
        load_keys<Stored>(job.parameters[stretch.parameter], job.targets[0].model, at, count, room);
        for (int64_t e = 0; e < count; ++e) {
            left -= room.keys[e] == wanted;
            if (left == 0) {
                *job.place = at + e + 1 - stretch.begin;
                return;
            }
        }
    }
}

static void locate_item(const TrimJob& job, int64_t item, double* room) {
    switch (job.parameters[0].dtype) {
        case Dtype::f64:
            return locate<double, int64_t>(job, item, room);
        case Dtype::bf16:
            return locate<Bf16, int32_t>(job, item, room);
        default:
            return locate<float, int32_t>(job, item, room);
    }
}
